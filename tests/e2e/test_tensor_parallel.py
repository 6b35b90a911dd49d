"""Two ranks, each with half of the heads: stock's tokens, the budget's memory, joined counters."""

from __future__ import annotations

import churn
import gpu_scenarios
import pytest
import tensor_parallel as tp
from engines import assert_same_greedy_tokens

from vllm_heterocache.heads.budget import compact_blocks


def check_tokens(stock: dict, ours: dict) -> None:
    pairs = list(zip(ours["outputs"], stock["outputs"], strict=True))
    compared = sum(assert_same_greedy_tokens(a.token_ids, b) for a, b in pairs)
    assert compared > 0.6 * sum(len(b.token_ids) for _, b in pairs)
    assert ours["metrics"]["requests_compacted{}"] == len(tp.LENGTHS) - 1


def check_compression(found: dict) -> None:
    for length, held in zip(tp.LENGTHS[1:], found["held"], strict=True):
        tail = -(-(length + tp.NUM_TOKENS) // 16) - length // 16
        # behind the prompt's blocks, those of the answer so far
        assert compact_blocks(length, tp.BUDGET) < held <= compact_blocks(length, tp.BUDGET) + tail
    at_start, at_end = found["at_start"], found["at_end"]
    assert len(at_start) == tp.RANKS and len({rank.num_blocks for rank in at_start}) == 1
    for rank in at_start:
        assert rank.satellites and rank.host_blocks and rank.forced_share == 1
    assert found["is_free"] and not any(rank.host_used for rank in at_end)
    checks = [rank.drift_checks for rank in at_end]
    assert all(checks)
    metrics, num_requests = found["metrics"], len(tp.LENGTHS) - 1
    assert metrics["requests_compacted{}"] == num_requests  # the same ones on both ranks
    # what the device counted may come a step or two later; each rank checks heads of its own
    assert max(checks) < metrics["drift_checks{}"] <= sum(checks)
    assert metrics["drift_triggers{}"] == metrics["drift_checks{}"]
    assert metrics["pages_fetched{}"] > 0
    decoded = num_requests * (tp.NUM_TOKENS - 1)
    assert abs(metrics[churn.COMPACT] - decoded) <= 3  # and not twice as many
    assert not any(name.startswith("decode_rows{kind=dense") for name in metrics)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tp.write_model(tmp_path_factory.mktemp("two-ranks"), "float32")


@pytest.fixture
def cpu_ranks(monkeypatch):
    """Ranks that share the cores of this test."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def test_full_budget_gives_the_greedy_tokens_of_stock(model, cpu_ranks):
    """Of stock vLLM with one rank, which starts faster; in fp32 the ranks' sums are the same."""
    stock = tp.greedy(model, None, tensor_parallel_size=1)
    check_tokens(stock, tp.greedy(model, tp.options(model, 1.0)))


def test_budget_triggers_and_counters(model, cpu_ranks):
    check_compression(tp.compress(model))


# --- on two GPUs: pytest -m gpu tests/e2e/test_tensor_parallel.py ---


@pytest.fixture(scope="module")
def gpu_model(tmp_path_factory) -> str:
    import torch

    if torch.cuda.device_count() < tp.RANKS:
        pytest.skip("needs two GPUs")
    return tp.write_model(tmp_path_factory.mktemp("two-gpus"), "bfloat16")


@pytest.mark.gpu
def test_full_budget_gives_the_greedy_tokens_of_stock_on_gpus(gpu_model):
    """With full CUDA graphs, the V2 runner and async scheduling."""
    stock = gpu_scenarios.alone(tp.greedy_with_graphs, gpu_model, None)
    ours = gpu_scenarios.alone(tp.greedy_with_graphs, gpu_model, tp.options(gpu_model, 1.0))
    check_tokens(stock, ours)


@pytest.mark.gpu
def test_budget_triggers_and_counters_on_gpus(gpu_model):
    check_compression(gpu_scenarios.alone(tp.compress_with_graphs, gpu_model))
