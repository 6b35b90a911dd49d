"""The engine on CUDA as users start it: V2 runner, full CUDA graphs, async scheduling."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import churn
import drafters
import gpu_scenarios
import parallel
import pytest
import test_speculation
from engines import BLOCK_BYTES, NGRAM, assert_same_completions
from gpu_scenarios import CHAINS, FACTS, alone

from vllm_heterocache.compat.hooks import WORKER_PATHS
from vllm_heterocache.heads.budget import compact_blocks

pytestmark = pytest.mark.gpu

FP8 = {"kv_cache_dtype": "fp8"}
DRAFTS = {"speculative_config": NGRAM}
MATCHED = {"matched_share": 0.5}
WITH_DRAFTS = pytest.param(DRAFTS, id="drafts", marks=pytest.mark.feature("n-gram drafts"))
WEIGHTS_ON_THE_HOST = pytest.param(
    {"cpu_offload_gb": 0.1},
    id="weights-on-the-host",
    marks=pytest.mark.feature("Weights on the host"),
)
OF_FP8 = pytest.mark.feature("fp8 KV cache, e4m3")
NUM_DRAFTING_LAYERS = 24  # of 30
ON_GPU = {"enforce_eager": False, "gpu_memory_utilization": 0.2}


def test_paths_lead_to_the_cuda_worker():
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from vllm_heterocache.compat import GPUWorker
    from vllm_heterocache.worker.worker import HeteroCacheWorkerMixin

    worker = resolve_obj_by_qualname(WORKER_PATHS["cuda"])
    assert worker.__mro__[1] is HeteroCacheWorkerMixin
    assert issubclass(worker, GPUWorker)


def same_tokens(ours: dict, expected: dict) -> None:
    """Each time that the prompts were asked; of the other engine the same time, or the only one."""
    times = expected["outputs"]
    if len(times) == 1:
        times = times * len(ours["outputs"])
    for outputs, others in zip(ours["outputs"], times, strict=True):
        assert_same_completions(outputs, others)


@pytest.mark.feature(
    "V2 model runner", "CUDA graphs, full and piecewise", "bfloat16", "Prefix caching"
)
@pytest.mark.parametrize(
    "kwargs", [pytest.param({}, id="one-token"), WITH_DRAFTS, WEIGHTS_ON_THE_HOST]
)
def test_full_budget_gives_the_greedy_tokens_of_stock(long_model, mixed_prompts, kwargs):
    """The second time from the prefix cache, where prefills of one token replay decode graphs."""
    stock = alone(gpu_scenarios.greedy, long_model, None, mixed_prompts, 1, kwargs)
    options = {"gpu_budget": 1.0, "min_prompt_tokens": 64}
    ours = alone(gpu_scenarios.greedy, long_model, options, mixed_prompts, 2, kwargs)
    assert ours["runner"] == stock["runner"] == "vllm.v1.worker.gpu.model_runner"
    assert ours["cudagraph_mode"] == stock["cudagraph_mode"] == "FULL_AND_PIECEWISE"
    same_tokens(ours, stock)
    metrics = ours["metrics"]
    assert metrics["requests_compacted{}"] == 2 * (len(mixed_prompts) - 1)
    assert metrics[churn.COMPACT] > 0 and metrics[churn.DENSE] > 0


@pytest.mark.feature("CUDA graphs, other modes")
def test_other_modes_of_cuda_graphs_give_the_greedy_tokens_of_stock(long_model, mixed_prompts):
    stock = alone(gpu_scenarios.greedy, long_model, None, mixed_prompts, 1, {})
    options = {"gpu_budget": 1.0, "min_prompt_tokens": 64}
    for mode in ("PIECEWISE", "FULL_DECODE_ONLY", "NONE"):
        kwargs = {"compilation_config": {"cudagraph_mode": mode}}
        ours = alone(gpu_scenarios.greedy, long_model, options, mixed_prompts, 1, kwargs)
        assert ours["cudagraph_mode"] == mode
        same_tokens(ours, stock)
        assert ours["metrics"]["requests_compacted{}"] == len(mixed_prompts) - 1


@pytest.mark.feature("n-gram drafts")
@pytest.mark.parametrize(
    "kwargs", [pytest.param({}, id="bf16"), pytest.param(FP8, id="fp8", marks=OF_FP8)]
)
def test_less_budget_gives_the_tokens_of_the_same_engine_without_drafts(
    long_model, mixed_prompts, kwargs
):
    options = {"gpu_budget": 0.3, "min_prompt_tokens": 64, "drift_threshold": 0.0}
    # FlashAttention rounds probabilities to fp8 by tiles, so a cached prefix may answer otherwise
    without = alone(gpu_scenarios.greedy, long_model, options, mixed_prompts, 2, kwargs)
    ours = alone(gpu_scenarios.greedy, long_model, options, mixed_prompts, 2, DRAFTS | kwargs)
    same_tokens(ours, without)
    # a row of accepted drafts is one row; a finished request may have one row more, in flight
    rows, rows_without = (run["metrics"][churn.COMPACT] for run in (ours, without))
    assert 0 < rows < 2 * (rows_without + len(mixed_prompts))


@pytest.mark.feature("Draft models")
def test_a_draft_model_drafts_what_it_drafts_for_stock(long_model, mixed_prompts, tmp_path):
    """Its layers are stock's: vLLM's FLASH_ATTN, over blocks of our layout."""
    drafter = drafters.write_draft_model(long_model, tmp_path / "drafter", NUM_DRAFTING_LAYERS)
    kwargs = {"speculative_config": drafter | {"num_speculative_tokens": drafters.NUM_DRAFTS}}
    stock = alone(gpu_scenarios.greedy, long_model, None, mixed_prompts, 1, kwargs)
    options = {"gpu_budget": 1.0, "min_prompt_tokens": 64}
    ours = alone(gpu_scenarios.greedy, long_model, options, mixed_prompts, 1, kwargs)
    same_tokens(ours, stock)
    assert ours["runner"] == stock["runner"]
    # asynchronous scheduling drafts once more, or once less, where a request ends
    last_drafts = drafters.NUM_DRAFTS * len(mixed_prompts)
    for count in ("draft_tokens", "accepted_tokens"):
        assert stock["drafts"][count] > last_drafts
        assert abs(ours["drafts"][count] - stock["drafts"][count]) <= last_drafts
    assert ours["drafts"]["accepted_tokens"] < ours["drafts"]["draft_tokens"]
    assert ours["metrics"]["requests_compacted{}"] == len(mixed_prompts) - 1


@pytest.mark.feature("KV offloading of vLLM")
def test_a_prompt_that_the_gpu_forgot_is_loaded_from_the_host(long_model, text_tokens):
    prompts = [text_tokens(20000 * i, 5000) for i in range(4)]
    kwargs = {"kv_offloading_size": 4.0, "kv_cache_memory_bytes": 800 * BLOCK_BYTES}
    run = alone(gpu_scenarios.forgotten_and_loaded, long_model, prompts, kwargs)
    first, again = run["outputs"]
    assert_same_completions(again, first)
    assert run["cached"][0] == [0] * len(prompts)
    assert min(run["cached"][1]) >= 5000 - 128, "only what the policy looks at is prefilled"


def drafted_as_for_stock(model: str, drafter: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """What ours found at a budget of 1, with tokens of stock and the same drafter."""
    generate = functools.partial(test_speculation.generate, **(ON_GPU | settings))
    stock, ours = (
        alone(generate, model, options, drafter) for options in (None, parallel.options(model, 1.0))
    )
    assert_same_completions(ours["outputs"], stock["outputs"])
    assert stock["drafts"]["draft_tokens"] > 0 and ours["drafts"]["draft_tokens"] > 0
    assert ours["metrics"]["requests_compacted{}"] == 2 * 3
    assert ours["is_free"]
    return ours


@pytest.mark.feature("EAGLE")
def test_eagle_heads_draft_what_they_draft_for_stock(tmp_path):
    """Random heads, whose drafts are all rejected."""
    model = parallel.write_model(tmp_path, "bfloat16")
    drafted_as_for_stock(model, test_speculation.with_drafter("eagle3", model, tmp_path))


@pytest.mark.feature("MTP")
def test_mtp_layers_draft_what_they_draft_for_stock(tmp_path):
    """A layer whose drafts are sometimes right. In bf16 this model's best tokens are often tied."""
    ours = drafted_as_for_stock(drafters.write_mimo(tmp_path), drafters.MTP, dtype="float16")
    assert 0 < ours["drafts"]["accepted_tokens"] < ours["drafts"]["draft_tokens"]


@pytest.mark.feature("Asynchronous scheduling", "Preemption", "Reset of the prefix cache")
@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({}, id="one-token"),
        WITH_DRAFTS,
        pytest.param(FP8, id="fp8", marks=OF_FP8),
    ],
)
def test_churn_under_drift_triggers_reads_nothing_stale(long_model, text_tokens, kwargs):
    tokens = text_tokens(0, 90000)
    run = alone(gpu_scenarios.run_churn, long_model, churn.SATELLITES, tokens, 560, kwargs)
    churn.check(run)


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({}, id="one-token"),
        pytest.param(DRAFTS, id="drafts"),
        pytest.param(FP8, id="fp8"),
    ],
)
def test_churn_of_finders_reads_nothing_stale(long_model, text_tokens, kwargs):
    tokens = text_tokens(0, 90000)
    run = alone(gpu_scenarios.run_churn, long_model, {}, tokens, 560, kwargs)
    assert run["has_finders"]
    churn.check(run)


def test_memory_after_compaction_is_the_budget(long_model, text_tokens):
    prompt = text_tokens(0, 90000)
    held = alone(gpu_scenarios.blocks_held, long_model, prompt, 0.25)
    assert held <= compact_blocks(len(prompt), 0.25) + 1 + 4  # partial block, 60 tokens
    assert held <= 1.03 * 0.25 * (len(prompt) // 16)


@pytest.mark.feature("Offline API")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="finders-and-matched-tokens"),
        pytest.param(churn.SATELLITES | {"matched_share": 0}, id="satellites-and-means"),
    ],
)
def test_no_step_waits_for_the_device(long_model, options):
    """vLLM's own check: any synchronisation inside a worker's step is an error."""
    command = [sys.executable, str(Path(__file__).parent / "sync_check.py")]
    command += [long_model, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "steps without a wait" in done.stdout


@pytest.fixture(scope="module")
def right_of_stock(long_model):
    """`right_of_stock(dtype)`: right answers by length, with that KV cache."""

    @functools.cache
    def answers(kv_cache_dtype: str) -> dict[int, int]:
        kwargs = {"kv_cache_dtype": kv_cache_dtype}
        right = alone(gpu_scenarios.chain_answers, long_model, None, kwargs)["right"]
        # a cache of fp8 without scales costs stock itself some answers
        least = 0.9 if kv_cache_dtype == "auto" else 0.5
        assert all(n >= least * CHAINS * FACTS for n in right.values()), f"stock answers {right}"
        return right

    return answers


@pytest.mark.feature("Custom logits processors")
@pytest.mark.parametrize(
    ("kv_cache_dtype", "gpu_budget", "share", "more"),
    [
        ("auto", 1.0, 1.0, {}),
        ("auto", 0.3, 0.95, {}),
        pytest.param("auto", 0.1, 0.9, MATCHED, id="matched-tokens"),
        pytest.param("fp8", 1.0, 0.95, {}, marks=OF_FP8),
        pytest.param("fp8", 0.3, 0.95, {}, marks=OF_FP8),
    ],
)
def test_forced_chains_answer_as_stock_does(
    long_model, right_of_stock, kv_cache_dtype, gpu_budget, share, more, record_property
):
    """8K, 32K and 128K; `profile` is "auto", so the first engine below 1.0 calibrates. Stock rounds
    queries to fp8 where the cache is, and this backend does not, so a few answers may differ."""
    options, kwargs = {"gpu_budget": gpu_budget, **more}, {"kv_cache_dtype": kv_cache_dtype}
    expected = right_of_stock(kv_cache_dtype)
    run = alone(gpu_scenarios.chain_answers, long_model, options, kwargs)
    record_property("right", f"{run['right']} of {expected}")
    for length, count in run["right"].items():
        assert count >= share * expected[length], (run["right"], expected)
    metrics = run["metrics"]
    assert metrics[churn.COMPACT] > 0
    assert not any("decode_rows{kind=dense" in name for name in metrics)
    if gpu_budget < 1:
        assert metrics["pages_fetched{}"] > 0
        assert metrics["drift_checks{}"] == 0, "finders look in every step"
