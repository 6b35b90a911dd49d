"""An engine that prefills prompts and sends their KV with NIXL, in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Iterator
from typing import Any

import parallel

PREFILL = {"do_remote_decode": True}


def nixl(role: str) -> dict[str, Any]:
    return {"kv_connector": "NixlConnector", "kv_role": role}


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return str(one.getsockname()[1])


class PrefillEngine:
    """The near end of the process."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def prefill(self, prompts: list[list[int]]) -> list[dict[str, Any]]:
        """Prefill all prompts; what the other engine needs to receive each of them."""
        return self._ask(prompts)

    def state(self) -> dict[str, float]:
        """Counters, and how many blocks are held. It waits until nothing is to be sent."""
        return self._ask("state")

    def _ask(self, question: Any) -> Any:
        self._pipe.send(question)
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextlib.contextmanager
def start(model: str, options: dict[str, Any], **settings: Any) -> Iterator[PrefillEngine]:
    spawn = multiprocessing.get_context("spawn")
    near, far = spawn.Pipe()
    # no daemon: an engine may have processes of its own
    process = spawn.Process(target=serve, args=(far, model, options, settings))
    process.start()
    try:
        assert near.recv() == "started"
        yield PrefillEngine(near)
    finally:
        near.send("stop")
        process.join(60)
        process.kill()


def serve(pipe: Any, model: str, options: dict[str, Any], settings: dict[str, Any]) -> None:
    """Answer until told to stop, and keep stepping: blocks that were read are freed in a step."""
    from vllm import SamplingParams

    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = free_port()
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        detokenize=False,
        extra_args={"kv_transfer_params": PREFILL},
    )
    with parallel.start(
        model, options, kv_transfer_config=nixl("kv_producer"), is_last=True, **settings
    ) as engine:
        total = engine.num_free
        pipe.send("started")
        while (question := pipe.recv()) != "stop":
            try:
                if question == "state":
                    _step(engine, while_unfinished=False)
                    answer = {"held": total - engine.num_free, **engine.metrics()}
                else:
                    answer = _prefill(engine, question, sampling)
                pipe.send(answer)
            except Exception as error:
                pipe.send(error)
                raise


def _prefill(engine: Any, prompts: list[list[int]], sampling: Any) -> list[dict[str, Any]]:
    for index, prompt in enumerate(prompts):
        name, one = f"sent-{index}", {"prompt_token_ids": prompt}
        engine.llm.llm_engine.add_request(name, one, sampling)
    outputs = _step(engine, while_unfinished=True)
    return [outputs[f"sent-{index}"].kv_transfer_params for index in range(len(prompts))]


def _step(engine: Any, while_unfinished: bool) -> dict[str, Any]:
    finished: dict[str, Any] = {}
    core = engine.llm.llm_engine
    while core.has_unfinished_requests() if while_unfinished else engine.scheduler.has_requests():
        finished |= {output.request_id: output for output in core.step() if output.finished}
        engine.check_integrity()
    return finished
