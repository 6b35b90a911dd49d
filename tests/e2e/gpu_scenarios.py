"""What the GPU tests do with an engine, each in a process of its own.

One process, one engine: vLLM keeps graph pools and switches in globals that a second engine of
another kind trips over.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import churn
import engines
import preloaded

CHAIN_LENGTHS = (8000, 32000, 126000)
CHAINS, FACTS = 2, 16
TIMEOUT_S = 400
# Several engines fit the GPU at once: tests may run beside one another.
KV_BYTES, HOST_GIB = 16 << 30, 8


def alone(scenario: Callable[..., Any], *args: Any) -> Any:
    """Run a function of this module in a fresh process; its exceptions come back."""
    fresh = multiprocessing.get_context("spawn") if engines.ON_GPU else preloaded.context()
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        return pool.submit(scenario, *args).result(timeout=TIMEOUT_S)


def serving_engine(model: str, options: dict | None, **kwargs: Any):
    """An engine as users start it: V2 runner, full graphs, async scheduling, prefix caching."""
    defaults = {
        "enforce_eager": False,
        "kv_cache_memory_bytes": KV_BYTES,
        "gpu_memory_utilization": 0.2,
        "max_num_seqs": 8,
        "max_model_len": 130000,
    }
    if options is not None:
        options = {"cpu_pool_gib": HOST_GIB} | options
    return engines.start(model, options, **(defaults | kwargs))


def describe(engine) -> dict[str, Any]:
    return {
        "runner": type(engine.worker.model_runner).__module__,
        "cudagraph_mode": engine.core.vllm_config.compilation_config.cudagraph_mode.name,
    }


def greedy(
    model: str, options: dict | None, prompts: list[list[int]], times: int, kwargs: dict
) -> dict:
    """Greedy completions of all prompts at once, several times over."""
    with serving_engine(model, options, max_model_len=6400, **kwargs) as engine:
        outputs = [engines.run_greedy(engine, prompts) for _ in range(times)]
        metrics = {} if options is None else engine.metrics()
        found = {"outputs": outputs, "metrics": metrics, "drafts": engine.drafts()}
        return found | describe(engine)


def forgotten_and_loaded(model: str, prompts: list[list[int]], kwargs: dict) -> dict[str, Any]:
    """The same prompts twice; the GPU forgets them in between, and the host does not."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=16, logprobs=2, ignore_eos=True)
    options = {"gpu_budget": 0.3, "min_prompt_tokens": 64, "drift_threshold": 0.0}
    with serving_engine(model, options, max_model_len=6400, **kwargs) as engine:
        engine.check_every = 1 << 30  # vLLM holds blocks back that no table names
        runs = [engine.run(prompts, params)]
        assert engine.llm.reset_prefix_cache()
        runs.append(engine.run(prompts, params))
    names = [str(index) for index in range(len(prompts))]
    return {
        "outputs": [[run[name].outputs[0] for name in names] for run in runs],
        "cached": [[run[name].num_cached_tokens for name in names] for run in runs],
    }


def chain_answers(model: str, options: dict | None, kwargs: dict) -> dict[str, Any]:
    """Right answers of forced chains by length. Custom logits processors ask for the V1 runner."""
    from transformers import AutoTokenizer

    from vllm_heterocache.evaluation.chain import make_chain
    from vllm_heterocache.evaluation.haystacks import prose

    tokenizer, text = AutoTokenizer.from_pretrained(model), prose() * 4
    right = {}
    kwargs = {"logits_processors": [engines.FORCED], **kwargs}
    with serving_engine(model, options, **kwargs) as engine:
        engine.check_every = 16
        for length in CHAIN_LENGTHS:
            texts = [text[30000 * i :][: 8 * length] for i in range(CHAINS)]
            chains = [
                make_chain(tokenizer, texts[i], length, FACTS, seed=length + i)
                for i in range(CHAINS)
            ]
            outputs = engines.run_chains(engine, chains)
            right[length] = engines.num_right(chains, outputs)
        return {"right": right, "metrics": {} if options is None else engine.metrics()}


def run_churn(
    model: str, options: dict, tokens: list[int], num_blocks: int, kwargs: dict
) -> dict[str, Any]:
    """`churn.run` with graphs, in a pool so small that requests are preempted."""
    is_fp8 = kwargs.get("kv_cache_dtype") == "fp8"
    with serving_engine(
        model,
        churn.OPTIONS | options,
        max_model_len=6400,
        max_num_batched_tokens=1024,
        kv_cache_memory_bytes=num_blocks * engines.BLOCK_BYTES // (2 if is_fp8 else 1),
        **kwargs,
    ) as engine:
        return churn.run(engine, tokens, num_late=60, longest=4800)


def blocks_held(model: str, prompt: list[int], gpu_budget: float) -> int:
    """Most blocks that one decoding request holds once its prompt was given back."""
    from vllm import SamplingParams

    with serving_engine(model, {"gpu_budget": gpu_budget}) as engine:
        total = engine.num_free
        params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
        engine.run([prompt], params)
        settled = engine.free_blocks[-30:-3]
    return total - min(settled)
