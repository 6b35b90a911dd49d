"""Policies that choose at each step, on the made-up worker: what is read, and whose blocks."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from world import (
    PAGE,
    Books,
    World,
    assert_outputs,
    assignment_of,
    attention_over,
    resident_pages,
)

from vllm_heterocache.heads.recipes import all_full
from vllm_heterocache.kernels import paged_decode, step_select
from vllm_heterocache.kernels.paged_decode import DecodeWorkspace
from vllm_heterocache.policies import make_policy
from vllm_heterocache.worker.ops.interface import Geometry, Memory
from vllm_heterocache.worker.ops.triton_ops import TritonOps
from vllm_heterocache.worker.step_selection import step_bytes_per_block, step_tables
from vllm_heterocache.worker.tables.page_table import PageTable
from vllm_heterocache.worker.worker import HeteroCacheWorkerMixin

# a layer that is read whole, as Quest's first ones, and heads of unequal budgets
HEADS = assignment_of("VVV", "AAA", "AVA", weights={(1, 0): 0.5, (2, 2): 1.5})
SIZES = {"gpu_budget": 0.7, "host_blocks": 0}


def make_world(policy: str = "quest", **settings) -> World:
    options = {"policy": policy, **settings.pop("options", {})}
    return World(settings.pop("assignment", HEADS), options=options, **{**SIZES, **settings})


def bounds(queries: torch.Tensor, pages: torch.Tensor, scale: float) -> list[float]:
    """For each page [PAGE, D] the most that any key in its box may have with any query [G, D]."""
    best = []
    for page in pages.double().numpy():
        least, largest = page.min(axis=0), page.max(axis=0)
        best.append(max(np.maximum(q * least, q * largest).sum() for q in queries.double().numpy()))
    return best


def masses(queries: torch.Tensor, pages: torch.Tensor, scale: float) -> list[float]:
    """For each page [PAGE, D] the most of a query's attention to all pages that it gets."""
    best = np.zeros(len(pages))
    for query in queries.double().numpy():
        powers = np.exp(pages.double().numpy() @ query * scale)
        best = np.maximum(best, (powers / powers.sum()).sum(axis=1))
    return best.tolist()


def assert_best_are_read(world: World, request_id: str, score) -> None:
    """Each head has sinks, recent pages and the best others, by this step's query."""
    books = world.books[request_id]
    sinks, recent = world.config.protected
    for layer in range(world.num_layers):
        for head in range(world.num_kv_heads):
            pages = world._prompt_pages(books, layer, head)[..., : world.head_dim]
            read = world.resident(request_id, layer, head)
            assert read == sorted(set(read)), "in the order of the prompt, none twice"
            last = range(len(pages) - recent, len(pages))
            assert {*range(sinks), *last} <= set(read)
            others = set(range(sinks, len(pages) - recent))
            queries = books.queries[layer].view(world.num_kv_heads, world.group, -1)[head]
            scores = score(queries, pages, world.scale)
            if left := others - set(read):
                worst = min(scores[page] for page in others & set(read))
                best_left = max(scores[page] for page in left)
                assert worst >= best_left - 1e-3 * abs(best_left), (layer, head)


def assert_reads_its_lists(world: World, request_id: str) -> None:
    """The outputs are full attention with all but the chosen pages and the tail masked."""
    lists = resident_pages(world, request_id)
    assert_outputs(world, request_id, attention_over(world, request_id, lists))


def assert_dense(world: World, request_id: str) -> None:
    assert_outputs(world, request_id, world.dense_attention(request_id))


def one_bit_logits(queries: torch.Tensor, pages: torch.Tensor, scale: float) -> list[float]:
    """For each page [PAGE, D] the most that any query [G, D] has with a key whose channels are
    rounded to the least or to the largest of the page."""
    best = []
    for page in pages.double().numpy():
        least, largest = page.min(axis=0), page.max(axis=0)
        keys = np.where(page - least > largest - page, largest, least)
        best.append((queries.double().numpy() @ keys.T).max())
    return best


@pytest.mark.parametrize(
    ("policy", "score"), [("quest", bounds), ("fier", one_bit_logits), ("oracle", masses)]
)
@pytest.mark.parametrize("num_tokens", [320, 321, 335, 373])
def test_each_step_reads_the_best_pages_by_its_own_query(policy, score, num_tokens):
    world = make_world(policy, seed=num_tokens)
    world.step(prefill={"a": num_tokens})
    seen = set()
    for step in range(20):  # crosses a block border
        world.step(decode=["a"])
        if step % 5 == 0:
            assert_best_are_read(world, "a", score)
        assert_reads_its_lists(world, "a")
        seen.add(tuple(world.resident("a", 1, 1)))
    assert len(seen) > 10, "the choice hardly follows the query"
    assert world.resident("a", 0, 1) == world.resident("a", 2, 1) == list(range(num_tokens // PAGE))
    assert world.snapshot_rows() == {"compact|compacted": 20}


@pytest.mark.parametrize("policy", ["quest", "fier", "oracle"])
def test_a_prompt_stays_in_its_blocks_and_all_go_back_at_the_end(policy):
    world = make_world(policy)
    world.step(prefill={"a": 373, "b": 200})
    assert world.done == ["a", "b"]
    assert world.num_blocks - len(world.free) == 24 + 13  # nothing freed, nothing taken
    world.step(decode=["a", "b"])
    counts = world.runtime.snapshot()["requests"]
    assert set(map(tuple, counts.values())) == {(0, 0, 0)}, "they hold no page beside dense blocks"
    assert world.counted("requests_compacted") == 2 and world.counted("pages_offloaded") == 0
    world.step(gone=["a"], decode=["b"])
    assert_reads_its_lists(world, "b")
    world.step(gone=["b"])
    assert len(world.free) == world.num_blocks
    assert bool((world.table.tensors.entries == -1).all())


@pytest.mark.parametrize("chunks", [(200, 173), (372, 1), (1, 372), (16, 356, 1)], ids=str)
def test_chunks_and_rows_of_all_kinds_share_batches(chunks):
    world = make_world(seed=5)
    world.step(prefill={"other": 200})
    world.step(prefill={"short": 90}, compact=False, decode=["other"])
    world.step(prefill={"a": 373}, chunk={"a": chunks[0]}, decode=["other", "short"])
    for size in chunks[1:]:
        world.step(chunk={"a": size}, decode=["short", "other"])
    assert world.done == ["other", "a"]
    for _ in range(3):
        world.step(decode=["other", "a", "short"])
        for request_id in ("other", "a"):
            assert_best_are_read(world, request_id, bounds)
            assert_reads_its_lists(world, request_id)
        assert_dense(world, "short")


@pytest.mark.parametrize("policy", ["quest", "fier", "oracle"])
def test_a_budget_of_one_reads_everything(policy):
    world = make_world(policy, gpu_budget=1.0, assignment=all_full(3, 2))
    world.step(prefill={"a": 250})
    for _ in range(3):
        world.step(decode=["a"])
        assert_dense(world, "a")


class SharingWorld(World):
    """Later prompts begin with the first one's full blocks, as from vLLM's prefix cache."""

    def _new_books(self, num_tokens: int, compact: bool) -> Books:
        books = super()._new_books(num_tokens, compact)
        if not self.books:
            return books
        first = next(iter(self.books.values()))
        shared = first.prompt_tokens // PAGE
        self._give_back(books.blocks[:shared])
        books.blocks[:shared] = first.blocks[:shared]
        books.kv[:, :, : shared * PAGE] = first.kv[:, :, : shared * PAGE]
        books.num_computed = shared * PAGE
        return books

    def _give_back(self, blocks) -> None:
        used = {block for books in self.books.values() for block in books.blocks}
        super()._give_back([block for block in blocks if block not in used])


def sharing_world(**settings) -> World:
    return SharingWorld(HEADS, options={"policy": "quest"}, **{**SIZES, **settings})


def test_requests_that_share_blocks_choose_among_them_each_by_its_own_query():
    world = sharing_world()
    world.step(prefill={"a": 321})
    world.step(prefill={"b": 373}, chunk={"b": 53}, decode=["a"])
    world.step(prefill={"c": 345}, chunk={"c": 25}, decode=["a", "b"])
    assert world.done == ["a", "b", "c"]
    for _ in range(3):
        world.step(decode=["c", "a", "b"])
        for request_id in "abc":
            assert_best_are_read(world, request_id, bounds)
            assert_reads_its_lists(world, request_id)
    world.step(gone=["a"], decode=["b", "c"])
    assert_reads_its_lists(world, "b")
    assert_reads_its_lists(world, "c")


def test_a_prompt_whose_lists_find_no_room_stays_dense():
    """Prompts that share blocks may want more entries than the pool has pages."""
    world = sharing_world(num_blocks=64)
    world.step(prefill={"a": 320})  # 20 blocks, 14 of 64 rows
    for name in "bcde":
        world.step(prefill={name: 325}, chunk={name: 5}, decode=["a"])
    assert world.done == ["a", "b", "c", "d"] and world.refused == ["e"]
    world.step(decode=["a", "b", "e"])
    assert world.snapshot_rows() == {"compact|compacted": 6, "dense|table_full": 1}
    assert_dense(world, "e")
    assert_reads_its_lists(world, "b")
    world.step(gone=["a"])
    world.step(prefill={"f": 325}, chunk={"f": 5})
    assert world.done[-1] == "f" and world.refused == ["e"]


# --- the kernels in the place of their references ---


class GridWorld(World):
    """Keys and queries are multiples of 1/4: bounds are exact, and ties many."""

    def random(self, *shape: int) -> torch.Tensor:
        return (super().random(*shape) * 2).round() / 4


def kernel_ops(geometry: Geometry, memory: Memory) -> TritonOps:
    g = geometry
    sizes = g.max_rows, g.num_layers, g.num_kv_heads, g.group, g.head_dim
    return TritonOps(g, memory, DecodeWorkspace.allocate(*sizes, torch.device("cpu"), 5))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a World lives on the CPU")
@pytest.mark.parametrize(("policy", "score"), [("quest", bounds), ("fier", one_bit_logits)])
def test_kernels_choose_as_their_references_do(policy, score, monkeypatch):
    monkeypatch.setattr(step_select, "MAX_PROGRAMS", 16)  # each costs time in the interpreter
    monkeypatch.setattr(paged_decode, "MERGE_DIM", 64)
    options = {"policy": policy, "sink_pages": 2, "recent_pages": 1}
    more = {"head_dim": 64, "seed": 3, "options": options, "num_blocks": 90, **SIZES}
    worlds = [GridWorld(HEADS, make_ops=kernel_ops, **more), GridWorld(HEADS, **more)]
    steps = [
        {"prefill": {"a": 321}},
        {"decode": ["a"], "prefill": {"b": 230, "c": 100}, "chunk": {"b": 90}},
        {"decode": ["a", "c"], "chunk": {"b": 140}},
        {"decode": ["b", "c"], "gone": ["a"]},
    ]
    for step in steps:
        for world in worlds:
            world.step(**step)
        kernels, references = (world.table.tensors for world in worlds)
        assert torch.equal(kernels.entries, references.entries)
        assert torch.equal(kernels.positions, references.positions)
        for request_id, books in worlds[0].books.items():
            other = worlds[1].books[request_id]
            if books.outputs is not None:
                torch.testing.assert_close(books.outputs, other.outputs, rtol=1e-4, atol=1e-5)
    assert_best_are_read(worlds[0], "b", score)


# --- sizes ---


@pytest.mark.parametrize("policy", ["quest", "fier", "rocketkv", "oracle", "streaming"])
@pytest.mark.parametrize("gpu_budget", [0.3, 1 / 3, 0.07])
def test_bytes_per_block_are_what_the_tables_take(policy, gpu_budget):
    world = make_world(policy)
    geometry, made = world.runtime.rank.geometry, make_policy(world.config)
    sizes = []
    for num_blocks in (10, 17):
        pool = torch.zeros(num_blocks * 9, PAGE, 2 * world.head_dim, dtype=torch.bfloat16)
        tables = step_tables(made, pool, num_blocks, geometry, gpu_budget)
        parts = [] if tables is None else [tables.summaries, tables.keys, tables.bits]
        sizes.append(sum(one.nbytes for one in parts if one is not None))
    block_bytes = pool.nbytes // num_blocks
    taken = step_bytes_per_block(made, block_bytes, geometry, gpu_budget)
    assert sizes[1] - sizes[0] == 7 * taken
    keys = 4 * math.ceil(3 / gpu_budget)
    keys_and_ids = 4 * math.ceil(6 / gpu_budget)
    more = {"quest": keys, "fier": keys + block_bytes // 32, "rocketkv": keys_and_ids}
    assert taken == (block_bytes // 16 + more[policy] if policy in more else 0)


@pytest.mark.parametrize("policy", ["quest", "streaming"])
def test_a_worker_counts_summaries_beside_the_page_tables(policy):
    world = make_world(policy)
    block_bytes = world.pool[0].nbytes
    worker = SimpleNamespace(
        heterocache_rank=world.runtime.rank, kernel_block_bytes=lambda: block_bytes
    )
    taken = HeteroCacheWorkerMixin.table_bytes_per_block(worker)
    tables = PageTable.bytes_per_block(world.maps, world.group, world.gpu_budget)
    keys = 4 * 5  # ceil(3 heads / .7)
    summaries = world.pool[0].nbytes // 16 + keys if policy == "quest" else 0
    assert taken == tables + summaries
