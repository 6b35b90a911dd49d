"""Memory that the worker of CUDA leaves free beside the KV pool."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from allocated_bytes import AllocatedBytes

from vllm_heterocache.compat.engine import Rotation
from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.policies import make_policy
from vllm_heterocache.worker.device_memory import (
    bytes_beside_pool,
    compaction_bytes,
    matching_bytes,
    merging_bytes,
    observation_bytes,
    working_bytes,
)
from vllm_heterocache.worker.host.cuda_swap import STAGING_BYTES
from vllm_heterocache.worker.observe.moved_queries import query_mover
from vllm_heterocache.worker.observe.observed_prompt import Observation
from vllm_heterocache.worker.ops import triton_ops
from vllm_heterocache.worker.ops.interface import Geometry
from vllm_heterocache.worker.ops.triton_ops import TritonOps
from vllm_heterocache.worker.requests import FinishedPrefill, References

MIB = 1 << 20
META = torch.device("meta")


def geometry(num_layers: int = 32, window: int = 1) -> Geometry:
    """Of Llama-3.1-8B: 256 KV heads, 1,024 query heads."""
    sizes = num_layers, 32, 8, 128, 1.0, torch.bfloat16
    return Geometry(*sizes, max_rows=8, max_queries=1, num_query_windows=8, window=window)


def test_compacting_two_million_tokens_takes_what_its_page_scores_and_lists_take():
    scores = 256 * 131072 * 4
    # the scores of each layer, and of all of them
    assert compaction_bytes(geometry(), 0.25, 2097152) == 2 * scores == 256 * MIB
    # two numbers for each page that is kept
    assert compaction_bytes(geometry(), 0.75, 2097152) == scores + 2 * 0.75 * scores
    # the log-sum-exps of 32 query heads, and of 1,024 runs of tokens, 4 query heads each
    assert compaction_bytes(geometry(1), 0.25, 2097152) == (8 + 32) * 131072 * 4 + 1024 * 4 * 4


def scoring_bytes(geometry: Geometry, num_tokens: int, num_scoring: int) -> int:
    """What scoring a prompt takes at most at a time, where kernels do nothing."""
    with META:
        last_queries = torch.empty(8, *geometry.query_shape, dtype=geometry.dtype)
        queries = torch.empty(128, *geometry.query_shape, dtype=geometry.dtype)
        rotation = Rotation(torch.empty(4096, geometry.head_dim), geometry.head_dim, True)
        blocks = torch.empty(num_tokens // 16, dtype=torch.int32)
    ops: Any = object.__new__(TritonOps)  # without buffers of its own
    ops._geometry = geometry
    ops.memory = SimpleNamespace(
        last_queries=last_queries, pool=None, kv_scales=None, sink_logits=None
    )
    order: Any = SimpleNamespace(num_tokens=num_tokens)
    references = References(queries, behind=128)
    finished = FinishedPrefill(order, 0, blocks, None, references)
    move_queries = query_mover([rotation] * geometry.num_layers)
    observation = Observation(ops, geometry, finished, 1, move_queries, num_scoring)
    before = last_queries, queries, rotation.cos_sin, blocks
    with AllocatedBytes(META, *before) as allocated:
        observation.query_scores()
    return allocated.peak


@pytest.mark.parametrize("num_scoring", [1, 8])
@pytest.mark.parametrize("group", [1, 4, 7, 16, 32, 64])
@pytest.mark.parametrize(("num_layers", "num_tokens"), [(126, 16384), (2, 2097152)])
def test_scoring_takes_no_more_than_is_left_for_it(
    num_layers, num_tokens, group, num_scoring, monkeypatch
):
    """Of many layers the queries count, and of many pages the scores."""
    monkeypatch.setattr(triton_ops, "page_scores", lambda *args, **kwargs: None)
    sizes = num_layers, 2 * group, 2, 128, 1.0, torch.bfloat16
    geometry = Geometry(*sizes, max_rows=8, max_queries=1, num_query_windows=8)
    taken = scoring_bytes(geometry, num_tokens, num_scoring)
    assert taken <= compaction_bytes(geometry, 0.1, num_tokens, num_scoring)


@pytest.mark.parametrize(
    ("max_model_len", "expected"),
    [(1, 96), (131072, 96), (786432, 96), (1048576, 128), (2097152, 256)],
)
def test_long_prompts_take_more_working_memory_than_usual_ones(max_model_len, expected):
    taken = working_bytes(geometry(), 0.25, max_model_len) - STAGING_BYTES
    assert taken == expected * MIB


def test_a_window_of_queries_takes_its_masses_twice():
    masses = 32 * 32 * 131072 * 4
    queries = 8 * 32 * (32 * 32 * 128) * 4
    assert observation_bytes(geometry(window=32), 2097152) == queries + 2 * masses
    assert observation_bytes(geometry(), 2097152) == queries // 32


def test_a_small_budget_takes_less_for_fewer_matched_tokens():
    """Candidates of 3,968 tokens less, four each, for the four heads whose shares are made."""
    of_candidate = 4 * 128 + 5 * 128 * 4
    fewer = matching_bytes(geometry(), 0.2, 131072) - matching_bytes(geometry(), 0.1, 131072)
    assert fewer == 4 * (4096 - 128) * 4 * of_candidate == 186 * MIB


@pytest.mark.parametrize("options", [{"policy": "snapkv"}, {}, {"policy": "centroidkv"}], ids=str)
def test_what_a_policy_computes_takes_memory_beside_the_pool(options):
    config, longest, sizes = HeteroCacheConfig(**options), 131072, geometry()
    policy = make_policy(config)
    needed = working_bytes(sizes, config.gpu_budget, longest) + observation_bytes(sizes, longest)
    if config.share_of_matched:
        needed += matching_bytes(sizes, config.gpu_budget, longest)
    if options.get("policy") == "centroidkv":
        needed += merging_bytes(sizes, longest, policy.merged_chunk)
    plan = SimpleNamespace(config=config, policy=policy)
    assert bytes_beside_pool(plan, sizes, longest) == needed
