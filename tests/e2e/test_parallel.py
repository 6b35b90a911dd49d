"""Two ranks, each with half of the heads: stock's tokens, the budget's memory, joined counters.

The ranks are tensor-parallel ones of vLLM's two executors, or a pipeline of two.
"""

from __future__ import annotations

import contextlib
import functools

import churn
import even_heads
import gpu_scenarios
import loopback_ray
import parallel
import pytest
from engines import assert_same_completions

from vllm_heterocache.heads.budget import compact_blocks

# vLLM's CPU worker readies a later rank of a pipeline while it warms compiled code up, and an eager
# one fails in its first step, with or without this backend. Tracing alone is the shortest way.
TRACED = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
# Arguments of the engines whose runs are compared
RAY, MULTIPROCESSING = "ray", "multiprocessing"
PIPELINE, ONE_PROCESS = "pipeline", "one process"
KINDS = {
    RAY: {"distributed_executor_backend": "ray"},
    MULTIPROCESSING: {"distributed_executor_backend": "mp"},
    PIPELINE: {"tensor_parallel_size": 1, "pipeline_parallel_size": parallel.RANKS, **TRACED},
    ONE_PROCESS: {"tensor_parallel_size": 1, **TRACED},
}


def check_tokens(stock: dict, ours: dict) -> None:
    assert_same_completions(ours["outputs"], stock["outputs"])
    assert ours["metrics"]["requests_compacted{}"] == len(parallel.LENGTHS) - 1


def check_compression(found: dict) -> None:
    for length, held in zip(parallel.LENGTHS[1:], found["held"], strict=True):
        kept = compact_blocks(length, parallel.BUDGET)
        tail = -(-(length + parallel.NUM_TOKENS) // 16) - length // 16
        # behind the prompt's blocks, those of the answer so far
        assert kept < held <= kept + tail
    at_start, after_triggers = found["at_start"], found["after_triggers"]
    assert len(at_start) == parallel.RANKS and len({rank.num_blocks for rank in at_start}) == 1
    for rank in at_start:
        assert rank.num_led and rank.host_blocks and rank.forced_share == 1
    assert found["is_free"] and not any(rank.host_used for rank in found["at_end"])
    checks = [rank.drift_checks for rank in after_triggers]
    assert all(checks)
    metrics, num_requests = found["metrics"], len(parallel.LENGTHS) - 1
    assert metrics["requests_compacted{}"] == num_requests  # the same ones on both ranks
    # what the device counted may come a step or two later; each rank checks heads of its own
    assert max(checks) < metrics["drift_checks{}"] <= sum(checks)
    assert metrics["drift_triggers{}"] == metrics["drift_checks{}"]
    assert metrics["pages_fetched{}"] > 0
    decoded = num_requests * (parallel.NUM_TOKENS - 1)
    assert abs(metrics[churn.COMPACT] - decoded) <= 3  # and not twice as many
    assert not any(name.startswith("decode_rows{kind=dense") for name in metrics)


def check_finders(found: dict) -> None:
    """Each rank fetches for finders of its own, and a prompt from the prefix cache is answered
    alike."""
    first, again = found["outputs"]
    assert_same_completions(again, first)
    assert len(found["ranks"]) == parallel.RANKS and found["is_free"]
    for rank in found["ranks"]:
        assert rank.num_led and rank.counts["pages_fetched"] > 0
        assert rank.drift_checks == 0 and rank.host_used == 0
    metrics = found["metrics"]
    assert metrics["requests_compacted{}"] == 2 * (len(parallel.LENGTHS) - 1)
    largest = max(rank.counts["pages_fetched"] for rank in found["ranks"])
    assert metrics["pages_fetched{}"] > largest, "of all ranks"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return parallel.write_model(tmp_path_factory.mktemp("two-ranks"), "float32")


@pytest.fixture(scope="module")
def compressed(model, cpu_ranks):
    """`compressed(kind)`: what an engine of that kind does. Each starts once."""

    @functools.cache
    def run(kind: str) -> dict:
        is_ray = kind == RAY
        with loopback_ray.cluster(parallel.RANKS) if is_ray else contextlib.nullcontext():
            return parallel.compress(model, **KINDS[kind])

    return run


@pytest.mark.feature("Tensor parallelism")
def test_full_budget_gives_the_greedy_tokens_of_stock(model, cpu_ranks):
    """Of stock vLLM with one rank, which starts faster; in fp32 the ranks' sums are the same."""
    stock = parallel.greedy(model, None, tensor_parallel_size=1)
    check_tokens(stock, parallel.greedy(model, parallel.options(model, 1.0)))


@pytest.mark.feature("Tensor parallelism")
def test_finders_of_both_ranks_fetch(model, cpu_ranks):
    check_finders(parallel.find(model))


@pytest.mark.parametrize("kind", [MULTIPROCESSING, RAY, PIPELINE])
def test_budget_triggers_and_counters(compressed, kind):
    check_compression(compressed(kind))


def untriggered(found: dict, name: str) -> list[int]:
    """What each rank counted while no drift check triggered."""
    pairs = zip(found["after_triggers"], found["at_end"], strict=True)
    return [end.counts[name] - start.counts[name] for start, end in pairs]


@pytest.mark.feature("Ray")
def test_ray_gives_the_tokens_memory_and_counters_of_multiprocessing(compressed):
    ray, expected = compressed(RAY), compressed(MULTIPROCESSING)
    assert untriggered(ray, "drift_checks") and not any(untriggered(ray, "pages_fetched"))
    for ours, theirs in zip(ray["outputs"], expected["outputs"], strict=True):
        assert ours.token_ids == theirs.token_ids
    assert ray["held"] == expected["held"]
    assert ray["at_end"] == expected["at_end"]
    assert ray["metrics_at_end"] == expected["metrics_at_end"]


@pytest.mark.feature("Pipeline parallelism", "Models traced by Dynamo")
def test_a_pipeline_gives_the_tokens_memory_and_counters_of_one_process(compressed):
    """Its ranks have the roles and budgets that one process gives their layers."""
    pipeline, expected = compressed(PIPELINE), compressed(ONE_PROCESS)
    assert not any(untriggered(pipeline, "pages_fetched"))
    assert_same_completions(pipeline["outputs"], expected["outputs"])
    assert pipeline["held"] == expected["held"]
    (whole,) = expected["at_end"]
    for rank in pipeline["at_end"]:
        assert rank.decode_rows == whole.decode_rows
    for name in ("drift_checks", "decode_pages_read", "decode_pages_dense", "pages_offloaded"):
        parts, (total,) = untriggered(pipeline, name), untriggered(expected, name)
        assert sum(parts) == total and all(parts), name


# --- on two GPUs: pytest -m gpu tests/e2e/test_parallel.py ---


@pytest.fixture(scope="module")
def gpu_model(tmp_path_factory) -> str:
    import torch

    if torch.cuda.device_count() < parallel.RANKS:
        pytest.skip("needs two GPUs")
    return parallel.write_model(tmp_path_factory.mktemp("two-gpus"), "bfloat16")


@pytest.mark.feature("Tensor parallelism")
@pytest.mark.gpu
def test_full_budget_gives_the_greedy_tokens_of_stock_on_gpus(gpu_model):
    """With full CUDA graphs, the V2 runner and async scheduling."""
    stock = gpu_scenarios.alone(parallel.greedy_with_graphs, gpu_model, None)
    ours = gpu_scenarios.alone(
        parallel.greedy_with_graphs, gpu_model, parallel.options(gpu_model, 1.0)
    )
    check_tokens(stock, ours)


@pytest.mark.feature("Tensor parallelism")
@pytest.mark.gpu
def test_budget_triggers_and_counters_on_gpus(gpu_model):
    check_compression(gpu_scenarios.alone(parallel.compress_with_graphs, gpu_model))


@pytest.mark.feature("Tensor parallelism")
@pytest.mark.gpu
def test_finders_of_both_ranks_fetch_on_gpus(gpu_model):
    check_finders(gpu_scenarios.alone(parallel.find_with_graphs, gpu_model))


@pytest.mark.gpu
def test_forced_chains_on_two_gpus_answer_as_on_one(
    gpu_model, long_model, tmp_path, record_property
):
    model = even_heads.write_model(long_model, tmp_path / "even")
    one, two = (
        gpu_scenarios.alone(parallel.chain_answers_with_graphs, model, num_ranks, 0.3)
        for num_ranks in (1, parallel.RANKS)
    )
    record_property("right", f"{one['right']} on one, {two['right']} on two")
    asked = len(gpu_scenarios.CHAIN_LENGTHS) * gpu_scenarios.CHAINS * gpu_scenarios.FACTS
    right_of_one, right_of_two = (sum(run["right"].values()) for run in (one, two))
    assert right_of_one >= 0.85 * asked, "the model cannot do this"
    assert abs(right_of_one - right_of_two) <= 0.03 * asked
    assert two["metrics"][churn.COMPACT] > 0 and two["metrics"]["pages_fetched{}"] > 0
