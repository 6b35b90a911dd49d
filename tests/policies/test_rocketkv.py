"""RocketKV: what its first stage keeps, and what each step reads of that."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from world import PAGE, World, assert_outputs, assignment_of, attention_over, resident_pages

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.kernels.hybrid_step_select_ref import approximate_attention
from vllm_heterocache.policies import make_policy
from vllm_heterocache.policies.policy import Shard
from vllm_heterocache.policies.rocketkv import RocketKV, paper_read_share
from vllm_heterocache.worker.warm_up import warm_up

HEADS = assignment_of("AAA", "AAA")


def make_world(gpu_budget: float = 0.7, **settings) -> World:
    policy_options = {"read_share": 0.4, **settings.pop("policy_options", {})}
    options = {"policy": "rocketkv", "policy_options": policy_options}
    return World(HEADS, gpu_budget, host_blocks=0, options=options, **settings)


def held(world: World, request_id: str, layer: int, head: int) -> dict[int, int]:
    """Prompt page -> pool page of all that a head keeps, listed or idle."""
    tables, slot = world.table.tensors, world.compacted(request_id).table_slot
    start = int(tables.start[slot, layer, head])
    size = int(tables.count[slot, layer, head] + tables.idle_pages[slot, layer, head])
    places = slice(start, start + size)
    return dict(
        zip(tables.positions[places].tolist(), tables.entries[places].tolist(), strict=True)
    )


def all_held(world: World, request_id: str) -> dict[tuple[int, int], set[int]]:
    heads = [(i, j) for i in range(world.num_layers) for j in range(world.num_kv_heads)]
    return {head: set(held(world, request_id, *head)) for head in heads}


def test_kept_pages_are_those_of_the_window_pooled_over_three_and_the_rest_is_freed():
    pages = []
    for policy, options in (("rocketkv", {}), ("snapkv", {"pool_pages": 3})):
        world = World(HEADS, 0.5, options={"policy": policy, "policy_options": options})
        world.step(prefill={"a": 373})
        assert world.done == ["a"]
        assert world.num_blocks - len(world.free) == 1 + 12  # ceil(.5 * 23), and the partial block
        resident = all_held if policy == "rocketkv" else resident_pages
        pages.append({head: set(kept) for head, kept in resident(world, "a").items()})
    assert pages[0] == pages[1]


@pytest.mark.parametrize("num_tokens", [320, 335, 373])
@pytest.mark.parametrize("channel_share", [1.0, 0.5])
def test_each_step_reads_the_best_of_the_kept_pages_by_its_own_query(num_tokens, channel_share):
    world = make_world(seed=num_tokens, policy_options={"channel_share": channel_share})
    num_pages = num_tokens // PAGE
    world.step(prefill={"a": num_tokens})
    kept, read = all_held(world, "a"), set()
    assert all(len(pages) == math.ceil(0.7 * num_pages) for pages in kept.values())
    for _ in range(20):  # crosses a block border
        world.step(decode=["a"])
        assert all_held(world, "a") == kept
        lists = resident_pages(world, "a")
        for (layer, head), pages in lists.items():
            assert len(pages) == math.ceil(0.4 * num_pages)
            assert pages == sorted(world.resident("a", layer, head))
            assert_best(world, layer, head, set(pages), channel_share)
        assert_outputs(world, "a", attention_over(world, "a", lists))
        read.add(tuple(lists[1, 1]))
    assert len(read) > 10, "the choice hardly follows the query"


def assert_best(world: World, layer: int, head: int, read: set[int], channel_share: float) -> None:
    books = world.books["a"]
    keys = world._prompt_pages(books, layer, head)[..., : world.head_dim]
    of_page = held(world, "a", layer, head)
    for page, pool_page in of_page.items():  # idle pages, too, hold what the table says
        assert torch.equal(world.pages[pool_page][:, : world.head_dim], keys[page])
    kept = sorted(of_page)
    boxes = torch.stack((keys[kept].amin(dim=1), keys[kept].amax(dim=1)), dim=1)
    queries = books.queries[layer].view(world.num_kv_heads, world.group, -1)[head]
    scores = approximate_attention(queries, boxes, world.scale, channel_share)
    score = dict(zip(kept, scores.tolist(), strict=True))
    last = len(keys) - world.config.recent_pages
    protected = {page for page in kept if page < world.config.sink_pages or page >= last}
    assert protected <= read
    worst = min(score[page] for page in read - protected)
    assert worst >= max(score[page] for page in set(kept) - read) * (1 - 1e-3)


def test_batches_come_and_go_and_gaps_are_closed():
    world = make_world(seed=4, num_blocks=80)
    world.step(prefill={"a": 400, "b": 300})
    world.step(decode=["a", "b"])
    kept = all_held(world, "b")
    world.step(decode=["b"], gone=["a"], prefill={"c": 500}, chunk={"c": 100})
    world.step(decode=["b"], chunk={"c": 400})
    for _ in range(3):
        world.step(decode=["b", "c"])
        assert all_held(world, "b") == kept
        for request_id in "bc":
            lists = resident_pages(world, request_id)
            assert_outputs(world, request_id, attention_over(world, request_id, lists))
    world.step(gone=["b", "c"])
    assert len(world.free) == world.num_blocks
    assert not world.table.tensors.idle_pages.any()


def test_what_a_step_reads_is_counted_with_what_choosing_reads():
    """Of 6 heads with 23 pages, 17 are kept and 10 read; half of one key of each kept page."""
    world = make_world(policy_options={"channel_share": 0.5})
    world.step(prefill={"a": 373})
    world.step(decode=["a"])
    choosing = int(6 * 17 / 32 / 2)
    assert world.counted("decode_pages_read") == 6 * (10 + 1) + choosing
    assert world.counted("decode_pages_dense") == 6 * 24


@pytest.mark.parametrize("ratio", [2, 8, 27.3, 100, 1024, 4000])
def test_the_split_of_the_compression_is_the_papers(ratio):
    first_stage = ratio ** min(0.2 + 0.06 * math.log2(ratio), 0.8)
    assert paper_read_share(1 / first_stage) == pytest.approx(1 / (2 * ratio))


def test_a_step_reads_by_the_papers_split_but_the_protected_pages_and_one_at_least():
    config = HeteroCacheConfig(policy="rocketkv", gpu_budget=0.2)
    budgets = np.array([[200, 3]])
    assert RocketKV().pages_read(budgets, 1000, config).tolist() == [[19, 3]]  # 1.83 %
    assert RocketKV().pages_read(budgets, 100, config).tolist() == [[5, 3]]
    assert RocketKV(read_share=0.05).pages_read(budgets, 1000, config).tolist() == [[50, 3]]
    assert paper_read_share(1.0) == 0.5 and paper_read_share(0.99) < 0.5


def test_a_budget_of_one_is_full_attention():
    policy = make_policy(HeteroCacheConfig(policy="rocketkv", gpu_budget=1.0))
    shard = Shard(range(2), range(3), 2)
    assignment = policy.assign(HeteroCacheConfig(policy="rocketkv", gpu_budget=0.5), shard)
    assert assignment.num_full == 0 and (assignment.weights == 1).all()
    world = make_world(1.0)
    world.step(prefill={"a": 250})
    world.step(decode=["a"])
    assert_outputs(world, "a", world.dense_attention("a"))


def test_warm_up_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    world = make_world(num_blocks=700, compact_min_tokens=176)
    world.pool.zero_()
    world.runtime.ops.memory.last_queries.zero_()
    fresh = world.runtime.snapshot()
    warm_up(world.runtime, 1000 * PAGE)
    assert world.runtime.snapshot() == fresh
    assert not world.table.tensors.idle_pages.any()
    world.runtime.check_integrity()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"read_share": 0}, "it is the share of a prompt's pages that a step reads"),
        ({"read_share": 1.5}, "choose a number above 0 and up to 1"),
        ({"read_share": "x"}, "read_share"),
        ({"channel_share": 0.0}, "it must be a number, above 0, at most 1 (policy 'rocketkv')"),
        ({"pool_pages": 2}, "so it is odd (policy 'rocketkv')"),
    ],
)
def test_options_are_checked(options, sentence):
    with pytest.raises(ValueError, match=r"policy_options.*is refused") as refusal:
        make_policy(HeteroCacheConfig(policy="rocketkv", policy_options=options))
    assert sentence in str(refusal.value)
    defaults = dataclasses.asdict(make_policy(HeteroCacheConfig(policy="rocketkv")))
    assert defaults["read_share"] is None and defaults["pool_pages"] == 3


@pytest.mark.parametrize("option", [{"evicted_means": True}, {"matched_share": 0.5}], ids=str)
def test_stand_ins_are_refused(option):
    with pytest.raises(ValueError, match=r"rocketkv' reads a part of the pages.*remove it"):
        make_policy(HeteroCacheConfig(policy="rocketkv", **option))
