"""An engine that prefills prompts and sends their KV with NIXL, in a process of its own, and one
that goes on with them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import parallel
import pytest

PREFILL = {"do_remote_decode": True}
NUM_TOKENS = 8


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


def go_on(
    model: str,
    options: dict[str, Any],
    prompts: list[list[int]],
    beside: Sequence[dict[str, Any]] = (),
    elsewhere_gpu: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Prefill prompts here, and then receive the same ones; where connectors are `beside` NIXL,
    a third time with what they have.

    Args:
        elsewhere_gpu: the one that the other engine sees; None: those that this one sees.

    Returns:
        Completions of each time, how many tokens came through connectors up to then, blocks that
        are not free in the end, counters here, and the state of the other engine.
    """
    transfer = nixl("kv_consumer")
    if beside:
        extra = {"connectors": [transfer, *beside]}
        transfer = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}
        transfer["kv_connector_extra_config"] = extra
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = free_port()
    settings = {"tensor_parallel_size": 1, **settings}
    with (
        start(
            model, parallel.options(model, 1.0, debug_poison=True), elsewhere_gpu, **settings
        ) as elsewhere,
        parallel.start(model, options, kv_transfer_config=transfer, **settings) as engine,
    ):
        total = engine.num_free
        times = [_complete(engine, prompts, [None] * len(prompts))]
        times.append(_complete(engine, prompts, elsewhere.prefill(prompts)))
        if beside:
            times.append(_complete(engine, prompts, [None] * len(prompts)))
        return {
            "completions": [completions for completions, _ in times],
            "loaded": [loaded for _, loaded in times],
            "held": total - engine.num_free,
            "metrics": engine.metrics(),
            "elsewhere": elsewhere.state(),
        }


def _complete(
    engine: Any, prompts: list[list[int]], transfers: Sequence[dict[str, Any] | None]
) -> tuple[list[Any], float]:
    """Completions without a prefix cache, and the tokens that connectors have loaded so far."""
    from vllm import SamplingParams

    assert engine.llm.reset_prefix_cache()
    sampling = [
        SamplingParams(
            temperature=0.0,
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            detokenize=False,
            logprobs=2,
            extra_args=None if transfer is None else {"kv_transfer_params": transfer},
        )
        for transfer in transfers
    ]
    outputs = engine.run(prompts, sampling)
    counters = {one.name: one for one in engine.llm.get_metrics()}
    loaded = counters["vllm:external_prefix_cache_hits"].value
    return [outputs[str(index)].outputs[0] for index in range(len(prompts))], loaded


@contextlib.contextmanager
def start(
    model: str, options: dict[str, Any], gpu: str | None, **settings: Any
) -> Iterator[PrefillEngine]:
    spawn = multiprocessing.get_context("spawn")
    near, far = spawn.Pipe()
    # no daemon: an engine may have processes of its own
    process = spawn.Process(target=serve, args=(far, model, options, settings))
    with pytest.MonkeyPatch.context() as patch:
        if gpu is not None:
            patch.setenv("CUDA_VISIBLE_DEVICES", gpu)
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
