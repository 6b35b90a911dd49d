"""CentroidKV: what the centroids are made of, where they lie, and decode over them."""

from __future__ import annotations

import pytest
import torch
from world import PAGE, World, assert_outputs, assignment_of, attention_over, resident_pages

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.kernels.kv_scales import FP8_DTYPES
from vllm_heterocache.kernels.soft_matching import soft_matching
from vllm_heterocache.policies import make_policy
from vllm_heterocache.worker.stand_ins import centroids

HEADS = assignment_of("AAA", "AAA")
CHUNK = 32


def make_world(gpu_budget: float = 0.4, **settings) -> World:
    options = {"policy": "centroidkv", "policy_options": {"chunk_tokens": CHUNK}}
    options |= settings.pop("options", {})
    return World(HEADS, gpu_budget, host_blocks=0, options=options, **settings)


def centroids_of(world: World, request_id: str, layer: int, head: int):
    """(K and V [m, 2 * D], bias [m]), as the pages and tables of a head have them."""
    tensors, slot = world.table.tensors, world.compacted(request_id).table_slot
    num_pages = int(tensors.stand_in_pages[slot, layer, head])
    first = int(tensors.start[slot, layer, head] + tensors.count[slot, layer, head])
    ids = tensors.entries[first : first + num_pages].long()
    place = int(tensors.bias_start[slot, layer, head])
    bias = tensors.token_bias[place : place + num_pages].flatten() * 0.6931471805599453
    kv = world.pages[ids].float().flatten(0, 1)
    if world.kv_scales is not None:
        scales = [one[layer, head].expand(world.head_dim) for one in world.kv_scales[:2]]
        kv = kv * torch.cat(scales)
    return kv, bias


def assert_attends_to_centroids(world: World, request_id: str) -> None:
    expected = attention_over(
        world,
        request_id,
        resident_pages(world, request_id),
        lambda layer, head: centroids_of(world, request_id, layer, head),
    )
    assert_outputs(world, request_id, expected)


@pytest.mark.parametrize(("sinks", "recent"), [(1, 3), (0, 0), (2, 0), (0, 4)])
@pytest.mark.parametrize("gpu_budget", [0.3, 0.7])
def test_all_but_the_protected_pages_are_merged_in_the_budget(gpu_budget, sinks, recent):
    world = make_world(gpu_budget, options={"sink_pages": sinks, "recent_pages": recent}, seed=3)
    world.step(prefill={"a": 373})
    assert world.done == ["a"]
    budget = 7 if gpu_budget == 0.3 else 17  # of 23 pages
    assert world.num_blocks - len(world.free) == 1 + budget
    first, last = max(sinks, 1 if not recent else 0), 23 - recent
    listed = [*range(first), *range(last, 23)]
    num_kept = (budget - len(listed)) * PAGE
    for (layer, head), pages in resident_pages(world, "a").items():
        assert pages == listed
        merged = world.books["a"].kv[layer, head, first * PAGE : last * PAGE]
        expected = soft_matching(merged[None], num_kept, CHUNK)
        kv, bias = centroids_of(world, "a", layer, head)
        torch.testing.assert_close(kv, torch.cat((expected.keys, expected.values), -1)[0])
        torch.testing.assert_close(bias, expected.bias[0])
        assert bias.exp().sum().item() == pytest.approx(len(merged), rel=1e-5)
    for _ in range(18):  # crosses a block border
        world.step(decode=["a"])
        assert_attends_to_centroids(world, "a")


def test_pages_that_are_like_others_are_merged_with_these_and_answered_as_if_all_were_there():
    """Of each two neighbours both have one key, so that half of the tokens lose nothing."""
    world = make_world(0.6)
    random_kv = world._random_kv

    def twins(num_tokens: int) -> torch.Tensor:
        kv = random_kv(num_tokens)
        kv[:, :, 1::2] = kv[:, :, 0 : num_tokens - num_tokens % 2 : 2]
        return kv

    world._random_kv = twins
    world.step(prefill={"a": 384})
    world.step(decode=["a"])
    assert_outputs(world, "a", world.dense_attention("a"))


@pytest.mark.parametrize("page_dtype", FP8_DTYPES, ids=str)
def test_fp8_pages(page_dtype):
    world = make_world(page_dtype=page_dtype)
    world.step(prefill={"a": 325})
    world.step(decode=["a"])
    assert_attends_to_centroids(world, "a")


def test_heads_may_be_merged_one_by_one(monkeypatch):
    found = []
    for most in (centroids.MOST_BYTES, 1):
        monkeypatch.setattr(centroids, "MOST_BYTES", most)
        world = make_world()
        world.step(prefill={"a": 373})
        found.append(centroids_of(world, "a", 1, 2))
    torch.testing.assert_close(found[0], found[1])


def test_centroids_come_and_go_with_their_requests():
    """Gaps of the tables are closed meanwhile, so that biases move."""
    world = make_world(seed=3, num_blocks=110, max_num_seqs=3)
    world.step(prefill={"a": 400, "b": 340})
    world.step(decode=["a", "b"])
    world.step(decode=["b"], gone=["a"], prefill={"c": 600})
    for _ in range(3):
        world.step(decode=["b", "c"])
        for request_id in ("b", "c"):
            assert_attends_to_centroids(world, request_id)
    world.step(gone=["b", "c"])
    assert not world.table.tensors.stand_in_pages.any()
    assert len(world.free) == world.num_blocks


def test_as_much_is_read_as_the_budget_says():
    world = make_world()
    world.step(prefill={"a": 373})
    world.step(decode=["a"])
    assert world.counted("decode_pages_read") == 6 * (10 + 1)  # ceil(.4 * 23), and the tail
    assert world.counted("decode_pages_dense") == 6 * 24


@pytest.mark.parametrize("option", [{"evicted_means": True}, {"matched_share": 0.5}], ids=str)
def test_other_stand_ins_are_refused(option):
    with pytest.raises(ValueError, match=r"centroidkv' merges all that it evicts.*remove it"):
        make_policy(HeteroCacheConfig(policy="centroidkv", **option))
