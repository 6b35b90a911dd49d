"""An engine of two ranks: what the tests of every executor and of both platforms do with it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import churn
import engines
import gpu_scenarios
import numpy as np

from common import profiles
from common.forced_triggers import EXTENSION
from vllm_heterocache.metrics import COUNTERS

RANKS = 2
LENGTHS = (40, 500, 900)  # the first one stays dense
MIN_PROMPT = 128
BUDGET = 0.3
NUM_TOKENS = 24
SHARPNESS = 8.0  # of the next token's distribution, so that rounding does not decide


def write_model(folder: Path, dtype: str, **changes: Any) -> str:
    """A Llama of random weights with 4 layers of 4 KV heads, and a profile in which all heads are
    alike, the nearer the more, so that each rank has pivots and satellites, or finders.

    The upper layers score as the lower ones do, no two heads of a half score alike, and its best
    one is in its first layer. So roles and budgets in a pipeline of two are those of one rank.

    Args:
        changes: of the model's shape.
    """
    shape = dataclasses.replace(profiles.TINY, dtype=dtype, **changes)
    profiles.write_model(shape, folder)
    profiles.write_weights(shape, folder, {"lm_head": SHARPNESS})
    profile = profiles.retrieval_profile(shape)
    distance = np.arange(len(profile.similarity), dtype=np.float32).reshape(-1, 1, 1, 1)
    alike = np.where(np.isnan(profile.similarity), np.nan, 0.9 - 0.05 * distance)
    scores = np.tile(np.float32([[7, 8, 6, 5], [3, 1, 4, 2]]) / 8, (2, 1))
    profile = dataclasses.replace(profile, similarity=alike, retrieval=scores)
    profile.save(folder / "alike.json")
    return str(folder)


def options(model: str, gpu_budget: float, **more: Any) -> dict[str, Any]:
    return {
        "gpu_budget": gpu_budget,
        "min_prompt_tokens": MIN_PROMPT,
        "profile": f"{model}/alike.json",
        "cpu_pool_gib": 0.125,
        **more,
    }


class RankState(NamedTuple):
    """What a test asks of a rank."""

    num_blocks: int
    host_blocks: int
    host_used: int
    num_led: int  # satellites, or finders
    forced_share: float | None
    counts: dict[str, int]
    decode_rows: dict[str, int]

    @property
    def drift_checks(self) -> int:
        return self.counts["drift_checks"]


def state_of(worker: Any) -> RankState:
    """Runs on every rank."""
    runtime = worker.heterocache
    snapshot = runtime.snapshot()
    return RankState(
        runtime.num_blocks,
        runtime.host_pool.num_blocks,
        runtime.host_pool.num_blocks - runtime.host_pool.num_free,
        runtime.rank.assignment.num_led,
        getattr(runtime.ops.check_drift, "share", None),
        {name: snapshot[name] for name in COUNTERS},
        snapshot["decode_rows"],
    )


def start(model: str, heterocache: dict[str, Any] | None, **kwargs: Any):
    settings = {
        "tensor_parallel_size": RANKS,
        "skip_tokenizer_init": True,
        "kv_cache_memory_bytes": 64 << 20,
        "max_model_len": 1024,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 8,
        **({} if heterocache is None else {"worker_extension_cls": EXTENSION}),
    }
    return engines.start(model, heterocache, **(settings | kwargs))


def prompts(seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 499, length).tolist() for length in LENGTHS]


def greedy(model: str, heterocache: dict[str, Any] | None, **kwargs: Any) -> dict[str, Any]:
    """Greedy completions of all prompts at once, and the counters."""
    with start(model, heterocache, **kwargs) as engine:
        outputs = engines.run_greedy(engine, prompts())
        return {"outputs": outputs, "metrics": {} if heterocache is None else engine.metrics()}


def compress(model: str, **kwargs: Any) -> dict[str, Any]:
    """At BUDGET one prompt after the other, of which every drift check triggers; then others, all
    at once, of which none does, so that their tokens do not depend on when fetches finish."""
    from vllm import SamplingParams

    found: dict[str, Any] = {"held": []}
    sampling = SamplingParams(
        temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False
    )
    with_satellites = options(model, BUDGET, drift_interval=1, **churn.SATELLITES)
    with start(model, with_satellites, **kwargs) as engine:
        engine.llm.collective_rpc("force_triggers", args=(1.0,))
        found["at_start"] = engine.llm.collective_rpc(state_of)
        total = engine.num_free
        for prompt in prompts()[1:]:
            engine.run([prompt], sampling)
            found["held"].append(total - min(engine.free_blocks[-8:-3]))
        found["after_triggers"] = engine.llm.collective_rpc(state_of)
        found["metrics"] = engine.metrics()
        engine.llm.collective_rpc("force_triggers", args=(0.0,))
        found["outputs"] = engines.run_greedy(engine, prompts(seed=1))
        found["is_free"] = engine.num_free == total
        found["at_end"] = engine.llm.collective_rpc(state_of)
        found["metrics_at_end"] = engine.metrics()
    return found


def find(model: str, **kwargs: Any) -> dict[str, Any]:
    """At BUDGET all prompts at once, and again from the prefix cache; finders fetch by default."""
    with start(model, options(model, BUDGET, debug_poison=True), **kwargs) as engine:
        total = engine.num_free
        outputs = [engines.run_greedy(engine, prompts()) for _ in range(2)]
        return {
            "outputs": outputs,
            "is_free": engine.num_free == total,
            "ranks": engine.llm.collective_rpc(state_of),
            "metrics": engine.metrics(),
        }


# As users start engines on CUDA. NVLink multicast can harm a host that others share.
ON_GPUS = {"enforce_eager": False, "gpu_memory_utilization": 0.2, "is_last": True}
GPU_ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}


def greedy_with_graphs(model: str, heterocache: dict[str, Any] | None) -> dict[str, Any]:
    os.environ.update(GPU_ENVIRONMENT)
    return greedy(model, heterocache, **ON_GPUS)


def compress_with_graphs(model: str) -> dict[str, Any]:
    os.environ.update(GPU_ENVIRONMENT)
    return compress(model, **ON_GPUS)


def find_with_graphs(model: str) -> dict[str, Any]:
    os.environ.update(GPU_ENVIRONMENT)
    return find(model, **ON_GPUS)


def chain_answers_with_graphs(model: str, num_ranks: int, gpu_budget: float) -> dict[str, Any]:
    os.environ.update(GPU_ENVIRONMENT)
    options = {"gpu_budget": gpu_budget}
    return gpu_scenarios.chain_answers(model, options, {"tensor_parallel_size": num_ranks})
