"""One vLLM engine under measurement, in the process of its own that engine_runs.py starts.

Time stamps are the engine core's, taken when a step's output is complete, so that the client's
work between steps, which runs beside the engine as it does when serving, is not counted. Engines
run as users run them: engine core in its own process, asynchronous scheduling, CUDA graphs.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common import trace
from vllm_heterocache.evaluation.provenance import provenance
from vllm_heterocache.heads.budget import compact_blocks, whole_blocks
from vllm_heterocache.startup.capacity import requests_at_once

if TYPE_CHECKING:
    from vllm_heterocache.compat.other_groups import OtherGroup

PAGE = 16
SETTLE_STEPS = 16
SETTLE_SECONDS = 30.0
POLL_STEPS = 8  # metrics are read this often while the pool settles
POLL_SECONDS = 0.05
KV_SLACK = 1.03


class BadResult(Exception):
    """Something that was measured is not what should have been measured."""


@dataclass(frozen=True)
class Step:
    """Output of one engine step: when, and the tokens of each request."""

    time: float
    tokens: dict[str, list[int]]
    finished: frozenset[str]


@dataclass
class Running:
    """A request that was submitted."""

    prompt_tokens: int
    submitted: float
    tokens: list[int]
    times: list[float]  # of each token
    cached_tokens: int = 0
    finished: bool = False

    @property
    def first_token_s(self) -> float:
        return self.times[0] - self.submitted


def randomize_attention(worker: Any) -> None:
    """Give a model of dummy weights queries and keys that depend on the tokens, so that the pages
    a query attends to change from step to step."""
    import torch

    torch.manual_seed(0)
    for name, weight in worker.get_model().named_parameters():
        if "norm" in name:
            weight.data.fill_(1.0)
        elif "embed" in name:
            weight.data.normal_()
        elif "qkv" in name:
            weight.data.normal_(std=1.5 * weight.shape[-1] ** -0.5)


class Session:
    """An engine and the requests that it was given."""

    def __init__(self, spec: dict[str, Any]) -> None:
        """`spec`: model, llm (keyword arguments of LLM), options (HeteroCache's; None: stock), and
        drift, a level of `set_drift` (its threshold and interval are among the options)."""
        from vllm import LLM

        from common.forced_triggers import EXTENSION

        self.options = spec["options"]
        extra: dict[str, Any] = {}
        if self.options is not None:
            extra["attention_backend"] = "heterocache"
            extra["additional_config"] = {"heterocache": self.options}
            extra["worker_extension_cls"] = EXTENSION
        started = time.monotonic()
        self.llm = LLM(
            spec["model"],
            skip_tokenizer_init=True,
            disable_log_stats=False,
            **(spec["llm"] | extra),
        )
        self.start_s = time.monotonic() - started
        if spec.get("random_attention"):
            self.llm.collective_rpc(randomize_attention)
        self.engine = self.llm.llm_engine
        self.config = self.engine.vllm_config
        self.requests: dict[str, Running] = {}
        self.active: list[str] = []
        if self.options is not None:
            self.force_triggers(spec["drift"])

    @property
    def num_blocks(self) -> int:
        """Blocks of vLLM's KV pool that requests can have."""
        return int(self.config.cache_config.num_gpu_blocks) - 1

    @property
    def block_size(self) -> int:
        """Tokens of a block; beside recurrent layers vLLM makes blocks larger than a page."""
        return int(self.config.cache_config.block_size)

    @functools.cached_property
    def other_groups(self) -> list[OtherGroup]:
        """KV-cache groups beside that of the layers with full attention."""
        from vllm_heterocache.compat.other_groups import expected_groups

        return expected_groups(self.config)

    @property
    def num_drafts(self) -> int:
        """Tokens that a step may verify beside the certain one."""
        speculation = self.config.speculative_config
        return 0 if speculation is None else speculation.num_speculative_tokens

    def describe(self) -> dict[str, Any]:
        """What kind of engine this is, for the row."""
        config = self.config
        return {
            "v2_model_runner": bool(config.use_v2_model_runner),
            "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "prefix_caching": bool(config.cache_config.enable_prefix_caching),
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "gpu_memory_utilization": config.cache_config.gpu_memory_utilization,
            "max_model_len": config.model_config.max_model_len,
            "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
            "kv_cache_dtype": config.cache_config.cache_dtype,
            "num_drafts": self.num_drafts,
            "num_blocks": self.num_blocks,
            "block_size": self.block_size,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "start_s": round(self.start_s, 1),
        }

    def submit(self, prompt: list[int], num_tokens: int | None = None) -> str:
        """Add a request for exactly `num_tokens`, or for as many as the model's length allows."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        name = str(len(self.requests))
        room = self.config.model_config.max_model_len - len(prompt)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=room if num_tokens is None else num_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.requests[name] = Running(len(prompt), time.monotonic(), [], [])
        self.active.append(name)
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    def step(self) -> Step:
        """The next output that carries tokens."""
        while True:
            outputs = [o for o in self.engine.step() if o.request_id in self.active]
            if outputs:
                break
        now = max(output.metrics.last_token_ts for output in outputs)
        for output in outputs:
            request = self.requests[output.request_id]
            new = list(output.outputs[0].token_ids)
            request.tokens += new
            request.times += [now] * len(new)
            request.cached_tokens = output.num_cached_tokens or 0
            request.finished = output.finished
            if output.finished:
                self.active.remove(output.request_id)
        tokens = {o.request_id: list(o.outputs[0].token_ids) for o in outputs}
        return Step(now, tokens, frozenset(o.request_id for o in outputs if o.finished))

    def start(self, prompts: Iterable[list[int]], num_tokens: int | None = None) -> list[str]:
        """Submit one after the other, each when the one before has its first token."""
        names = []
        for prompt in prompts:
            names.append(self.submit(prompt, num_tokens))
            while not self.requests[names[-1]].tokens:
                self.step()
        return names

    def stop(self) -> None:
        """Abort everything that still runs."""
        if self.active:
            # aborted under their own names, which vLLM's requests keep beside its internal ones
            self.engine.abort_request(self.active)
        self.active = []

    def finish(self) -> None:
        """Step until everything has ended by itself."""
        while self.active:
            self.step()

    def forget_prompts(self) -> None:
        """Empty the prefix cache, as soon as no request holds a block any more."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while not self.llm.reset_prefix_cache():
            if time.monotonic() > deadline:
                raise BadResult(f"requests still hold {self.used_blocks()} blocks")
            time.sleep(POLL_SECONDS)

    def set_drift(self, level: str) -> None:
        """`level`: "off", "real", or the share of the checks of every step that triggers."""
        threshold = 0.0 if level == "off" else 0.7
        self.llm.collective_rpc("heterocache_set_drift", args=(threshold,))
        self.force_triggers(level)

    def force_triggers(self, level: str) -> None:
        """Let chance decide which checks trigger, where `level` is a share."""
        share = None if level in ("off", "real") else float(level)
        self.llm.collective_rpc("force_triggers", args=(share,))

    def used_blocks(self) -> int:
        """Blocks that requests hold, from vLLM's own gauge, as of the last step with output."""
        usage = self.metrics()["kv_cache_usage_perc"]
        return round(usage * self.num_blocks)

    def metrics(self) -> dict[str, float]:
        """vLLM's and the plugin's values by name, without labels; decode rows by kind."""
        values: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            if not hasattr(metric, "value"):
                continue
            name = metric.name.removeprefix("vllm:").removeprefix("heterocache_")
            if name in ("pages", "decode_rows"):
                name = f"{name}_{metric.labels['kind']}"
            values[name] = values.get(name, 0.0) + metric.value
        return values

    def trace(self, num_steps: int) -> dict[str, Any]:
        """What `num_steps` decode steps are made of (trace.per_step)."""
        self.llm.start_profile()
        for _ in range(num_steps):
            self.step()
        self.llm.stop_profile()
        folder = Path(self.config.profiler_config.torch_profiler_dir)
        return trace.per_step(trace.take_trace(folder), num_steps)

    def close(self) -> None:
        """End the engine's processes, so that the next engine finds the GPU's memory free."""
        self.stop()
        self.engine.engine_core.shutdown()

    def settle(self, is_settled: Callable[[], bool]) -> None:
        """Step until `is_settled`, and SETTLE_STEPS at least."""
        deadline = time.monotonic() + SETTLE_SECONDS
        count = 0
        while count < SETTLE_STEPS or count % POLL_STEPS or not is_settled():
            self.step()
            count += 1
            if time.monotonic() > deadline:
                raise BadResult(
                    f"after {count} steps the pool still holds {self.used_blocks()} blocks; "
                    f"metrics: {self.metrics()}"
                )

    def window(self, names: list[str], num_steps: int) -> dict[str, Any]:
        """Time `num_steps` decode steps in which every one of `names`, and nothing else, decodes.

        Raises BadResult when a step is anything else, or gives a request more than one token and
        its drafts.
        """
        before, times = self.metrics(), [self.step().time]
        num_tokens = 0
        for _ in range(num_steps):
            step = self.step()
            got = {name: len(tokens) for name, tokens in step.tokens.items()}
            if got.keys() != set(names) or max(got.values()) > 1 + self.num_drafts:
                raise BadResult(f"a step gave tokens {got}, not one to each of {names}")
            num_tokens += sum(got.values())
            times.append(step.time)
        tokens_per_step = num_tokens / (num_steps * len(names))
        after = self.metrics()
        delta = {name: after[name] - before.get(name, 0.0) for name in after}
        steps_ms = np.diff(times) * 1e3
        return {
            "num_steps": num_steps,
            "tokens_per_step": tokens_per_step,  # of a request
            "token_ms": float(steps_ms.mean()) / tokens_per_step,
            "mean_ms": float(steps_ms.mean()),
            "median_ms": float(np.median(steps_ms)),
            "p99_ms": float(np.percentile(steps_ms, 99)),
            "spread_ms": float(np.percentile(steps_ms, 90) - np.percentile(steps_ms, 10)),
            "max_ms": float(steps_ms.max()),
            "decode_rows": {
                kind: round(delta.get(f"decode_rows_{kind}", 0)) for kind in ("compact", "dense")
            },
            "counters": {
                name: round(delta[name])
                for name in delta
                if name.startswith(("drift_", "pages_f", "fetches_"))
            },
            "num_preemptions": round(delta.get("num_preemptions", 0)),
        }


def random_prompt(num_tokens: int, vocab_size: int, seed: int) -> list[int]:
    """Token ids; a shorter prompt of the same seed is the beginning of a longer one."""
    return np.random.default_rng(seed).integers(0, vocab_size, num_tokens).tolist()


def prompt_blocks(session: Session, num_tokens: int) -> int:
    """Blocks that a prompt keeps: those it is compacted into, or in stock vLLM all."""
    if session.options is None:
        return -(-num_tokens // session.block_size)
    kernel_blocks = compact_blocks(num_tokens, session.options["gpu_budget"])
    return whole_blocks(kernel_blocks, session.block_size)


def blocks_of_groups(groups: list[OtherGroup], num_tokens: int) -> tuple[int, int]:
    """Blocks that these groups hold of a request that decodes: usually, and at most.

    A state's block is held twice only while a step copies it to the next block, which prefix
    caching asks for.
    """
    most = [group.decode_blocks(num_tokens) for group in groups]
    usual = [
        max(1, group.num_states - 1)
        if group.num_states
        else -(-num_tokens // group.block_size) - behind(group, num_tokens)
        for group in groups
    ]
    return sum(usual), sum(most)


def behind(group: OtherGroup, num_tokens: int) -> int:
    """Blocks that a group's window has left behind."""
    return 0 if group.window is None else max(0, num_tokens - group.window) // group.block_size


def requests_that_fit(session: Session, num_tokens: int, kept: float, spare: int = 0) -> int:
    """Requests of `num_tokens` that the pool holds at once but for `spare` blocks: each keeps
    `kept` blocks, and the last one to come is dense until its prefill ends."""
    peak = -(-num_tokens // session.block_size)
    peak += sum(group.prefill_blocks(num_tokens) for group in session.other_groups)
    if session.options is not None:
        peak += prompt_blocks(session, num_tokens)
    return requests_at_once(session.num_blocks - spare, peak, math.ceil(kept))


def kv_blocks(session: Session, names: list[str]) -> dict[str, Any]:
    """What the requests hold of vLLM's pool, and of that, what their prompts hold.

    A request also has the partial last block of its prompt, its generated tokens, with a step in
    flight at most one block ahead, and in other groups a window or a state.
    """
    size = session.block_size
    ahead = 2 * (1 + session.num_drafts)
    requests = [session.requests[name] for name in names]
    lengths = [r.prompt_tokens + len(r.tokens) + ahead for r in requests]
    dense = sum(r.prompt_tokens // size for r in requests)
    tails = sum(-(-length // size) for length in lengths) - dense
    others = [blocks_of_groups(session.other_groups, length) for length in lengths]
    compact = sum(prompt_blocks(session, r.prompt_tokens) for r in requests)
    used = session.used_blocks()
    return {
        "used": used,
        "prompts_dense": dense,
        "generated": tails,
        "other_groups": sum(settled for settled, _ in others),
        "prompt_share": (used - tails - sum(settled for settled, _ in others)) / dense,
        "limit": KV_SLACK * compact + tails + sum(most for _, most in others),
    }


def main(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Entry point of the engine's process: SPEC.json in, RESULT.json out."""
    spec_path, result_path = sys.argv[-2:]
    spec = json.loads(Path(spec_path).read_text())
    result = {**measure(spec), **provenance()}
    Path(result_path).write_text(json.dumps(result) + "\n")
