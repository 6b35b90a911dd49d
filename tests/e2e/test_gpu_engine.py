"""The engine on CUDA as users start it: V2 runner, full CUDA graphs, async scheduling."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import churn
import gpu_scenarios
import pytest
from engines import assert_same_greedy_tokens
from gpu_scenarios import CHAINS, FACTS, alone

from vllm_heterocache.compat.hooks import WORKER_PATHS
from vllm_heterocache.heads.budget import compact_blocks

pytestmark = pytest.mark.gpu


def test_paths_lead_to_the_cuda_worker():
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from vllm_heterocache.compat import GPUWorker
    from vllm_heterocache.worker.worker import HeteroCacheWorkerMixin

    worker = resolve_obj_by_qualname(WORKER_PATHS["cuda"])
    assert worker.__mro__[1] is HeteroCacheWorkerMixin
    assert issubclass(worker, GPUWorker)


def test_full_budget_gives_the_greedy_tokens_of_stock(long_model, mixed_prompts):
    """The second time from the prefix cache, where prefills of one token replay decode graphs."""
    stock = alone(gpu_scenarios.greedy, long_model, None, mixed_prompts, 1)
    options = {"gpu_budget": 1.0, "min_prompt_tokens": 64}
    ours = alone(gpu_scenarios.greedy, long_model, options, mixed_prompts, 2)
    assert ours["runner"] == stock["runner"] == "vllm.v1.worker.gpu.model_runner"
    assert ours["cudagraph_mode"] == stock["cudagraph_mode"] == "FULL_AND_PIECEWISE"
    for outputs in ours["outputs"]:
        compared = [
            assert_same_greedy_tokens(output.token_ids, expected)
            for output, expected in zip(outputs, stock["outputs"][0], strict=True)
        ]
        assert sum(compared) > 0.6 * sum(len(o.token_ids) for o in stock["outputs"][0])
    metrics = ours["metrics"]
    assert metrics["requests_compacted{}"] == 2 * (len(mixed_prompts) - 1)
    assert metrics[churn.COMPACT] > 0 and metrics[churn.DENSE] > 0


def test_churn_under_drift_triggers_reads_nothing_stale(long_model, text_tokens):
    churn.check(alone(gpu_scenarios.run_churn, long_model, text_tokens(0, 90000), 560))


def test_memory_after_compaction_is_the_budget(long_model, text_tokens):
    prompt = text_tokens(0, 90000)
    held = alone(gpu_scenarios.blocks_held, long_model, prompt, 0.25)
    assert held <= compact_blocks(len(prompt), 0.25) + 1 + 4  # partial block, 60 tokens
    assert held <= 1.03 * 0.25 * (len(prompt) // 16)


def test_no_step_waits_for_the_device(long_model):
    """vLLM's own check: any synchronisation inside a worker's step is an error."""
    script = Path(__file__).parent / "sync_check.py"
    done = subprocess.run(
        [sys.executable, str(script), long_model], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "steps without a wait" in done.stdout


@pytest.fixture(scope="module")
def right_of_stock(long_model) -> dict[int, int]:
    right = alone(gpu_scenarios.chain_answers, long_model, None)["right"]
    assert all(n >= 0.9 * CHAINS * FACTS for n in right.values()), "the model cannot do this"
    return right


@pytest.mark.parametrize(("gpu_budget", "share"), [(1.0, 1.0), (0.3, 0.95)])
def test_forced_chains_answer_as_stock_does(
    long_model, right_of_stock, gpu_budget, share, record_property
):
    """8K, 32K and 128K; `profile` is "auto", so the first engine below 1.0 calibrates."""
    run = alone(gpu_scenarios.chain_answers, long_model, {"gpu_budget": gpu_budget})
    record_property("right", f"{run['right']} of {right_of_stock}")
    for length, count in run["right"].items():
        assert count >= share * right_of_stock[length], (run["right"], right_of_stock)
    metrics = run["metrics"]
    assert metrics[churn.COMPACT] > 0
    assert not any("decode_rows{kind=dense" in name for name in metrics)
    if gpu_budget < 1:
        assert metrics["drift_triggers{}"] > 0 and metrics["pages_fetched{}"] > 0
