"""Finders in a world of their own: what they score, what comes, and what becomes of their keys."""

from __future__ import annotations

import random

import pytest
import torch
from later_swap import LaterSwap
from random_traffic import MOST_REQUESTS, RandomTraffic
from world import PAGE, World, assert_outputs, assignment_of, attention_over, resident_pages

from vllm_heterocache.kernels import find_pages, paged_decode
from vllm_heterocache.kernels.exchange_pages_ref import MAX_EXCHANGED
from vllm_heterocache.kernels.paged_decode import DecodeWorkspace
from vllm_heterocache.kernels.quantized_keys_ref import keys_of_codes_ref
from vllm_heterocache.kernels.values import DriftCounter
from vllm_heterocache.worker.ops.interface import Geometry, Memory
from vllm_heterocache.worker.ops.triton_ops import TritonOps

FINDERS = {(0, 1): (0, 1), (1, 0): (1, 0), (1, 2): (1, 2), (2, 2): (2, 2)}


def make_world(**settings) -> World:
    assignment = assignment_of("VFA", "FAF", "AVF", leaders=FINDERS)
    return World(assignment, 0.5, **settings)


def quantised(keys: torch.Tensor) -> torch.Tensor:
    """[P, PAGE, D] keys to the nearest of four numbers between the bounds of their page."""
    least, largest = keys.amin(1, keepdim=True), keys.amax(1, keepdim=True)
    step = ((largest - least) / 3).clamp(min=1e-9)
    return least + ((keys - least) / step + 0.5).floor() * step


@pytest.mark.parametrize("num_tokens", [320, 335, 373])
def test_a_finder_scores_all_pages_by_its_own_query_on_quantised_keys(num_tokens):
    world = make_world(seed=num_tokens)
    world.step(prefill={"a": num_tokens})
    num_pages = num_tokens // PAGE
    for _ in range(3):
        world.step(decode=["a"])
        slot = world.compacted("a").table_slot
        tables, keys = world.table.tensors, world.table.finders
        first = int(tables.first_stripe[slot])
        for finder, (layer, head) in enumerate(FINDERS):
            books = world.books["a"]
            dense = books.kv[layer, head, : num_pages * PAGE, : world.head_dim]
            expected = quantised(dense.unflatten(0, (-1, PAGE)))
            places = slice(first * keys.width + finder * num_pages, None)
            found = keys_of_codes_ref(keys, slice(places.start, places.start + num_pages))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            queries = books.queries[layer].view(world.num_kv_heads, world.group, -1)[head]
            logits = queries * world.scale @ expected.flatten(0, 1).T
            lse = logits.unflatten(1, (num_pages, PAGE)).logsumexp(2).T / 0.6931471805599453
            start = first * tables.pivot_width + finder * num_pages
            torch.testing.assert_close(
                tables.page_lse[start : start + num_pages], lse, rtol=1e-4, atol=1e-4
            )


def test_attention_reads_the_best_pages_by_its_own_query():
    """What a query asks for is there before the layer's attention reads the list."""
    world = make_world(seed=5)
    world.step(prefill={"a": 400})
    num_pages, came = 25, 0
    before = resident_pages(world, "a")
    for _ in range(15):
        world.step(decode=["a"])
        after = resident_pages(world, "a")
        assert_outputs(world, "a", attention_over(world, "a", after))
        tables, slot = world.table.tensors, world.compacted("a").table_slot
        first = int(tables.first_stripe[slot]) * tables.pivot_width
        of_finders = tables.scores[first : first + len(FINDERS) * num_pages]
        scores = dict(zip(FINDERS, of_finders.view(-1, num_pages), strict=True))
        for head in after:
            new, gone = set(after[head]) - set(before[head]), set(before[head]) - set(after[head])
            assert len(new) == len(gone) <= MAX_EXCHANGED
            assert not new or head in FINDERS, "only finders fetch"
            came += len(new)
            if head in FINDERS:
                score, last = scores[head].tolist(), num_pages - world.config.recent_pages
                for part in range(MAX_EXCHANGED):
                    of_part = range(part, num_pages, MAX_EXCHANGED)
                    listed = [page for page in of_part if page in before[head]]
                    free = [page for page in listed if world.config.sink_pages <= page < last]
                    missing = [page for page in of_part if page not in before[head]]
                    came_here, went_here = new & {*of_part}, gone & {*of_part}
                    assert len(came_here) == len(went_here) <= 1
                    if not free or not missing:
                        assert not came_here
                        continue
                    best = max(missing, key=score.__getitem__)
                    worst = min(free, key=score.__getitem__)
                    if score[best] > score[worst] * 1.001:
                        assert came_here == {best} and went_here == {worst}
                    elif score[best] < score[worst]:
                        assert not came_here
                assert not gone & {*range(world.config.sink_pages), *range(last, num_pages)}
        before = after
    assert came > 20
    assert world.runtime.ops.memory.counters[DriftCounter.PAGES_FETCHED] == came


def kernel_ops(geometry: Geometry, memory: Memory) -> TritonOps:
    g = geometry
    sizes = g.max_rows, g.num_layers, g.num_kv_heads, g.group, g.head_dim
    late_heads, cpu = memory.finders.heads.tolist(), torch.device("cpu")
    return TritonOps(g, memory, DecodeWorkspace.allocate(*sizes, cpu, 5, late_heads=late_heads))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a World lives on the CPU")
def test_kernels_fetch_as_their_references_do(monkeypatch):
    """In batches of one and of two rows, whose searches are split in other ways."""
    monkeypatch.setattr(find_pages, "MAX_PROGRAMS", 3)  # each costs time in the interpreter
    monkeypatch.setattr(paged_decode, "MERGE_DIM", 64)
    more = {"head_dim": 64, "seed": 8, "num_blocks": 90}
    worlds = [make_world(make_ops=kernel_ops, **more), make_world(**more)]
    for step in ({"prefill": {"a": 330, "b": 300}}, {"decode": ["a", "b"]}, {"decode": ["b"]}):
        for world in worlds:
            world.step(**step)
        kernels, references = (world.table.tensors for world in worlds)
        for name in ("entries", "positions", "is_resident"):
            assert torch.equal(getattr(kernels, name), getattr(references, name)), name
        for request_id, books in worlds[0].books.items():
            other = worlds[1].books[request_id]
            if books.outputs is not None:
                torch.testing.assert_close(books.outputs, other.outputs, rtol=1e-4, atol=1e-5)
    fetched = [one.runtime.ops.memory.counters[DriftCounter.PAGES_FETCHED] for one in worlds]
    assert fetched[0] == fetched[1] > 4


def test_finders_wait_for_their_pages_on_the_way_to_the_host():
    """The compute stream waits for the copy in the first step that may fetch, and in no other."""
    world = make_world(seed=6, swap_class=LaterSwap)
    world.step(prefill={"a": 400})
    world.step(decode=["a"])  # compacts, and decodes for the first time
    assert not world.swap.to_host, "the copies were awaited"
    before = resident_pages(world, "a")
    for _ in range(5):
        world.step(decode=["a"])
        after = resident_pages(world, "a")
        assert_outputs(world, "a", attention_over(world, "a", after))
    assert before != after


@pytest.mark.parametrize("swap_class", [LaterSwap])
def test_batches_come_and_go_and_keys_move_with_their_request(swap_class):
    world = make_world(seed=4, num_blocks=80, swap_class=swap_class)
    world.step(prefill={"a": 400, "b": 300})
    world.step(decode=["a", "b"])
    world.step(decode=["b"], gone=["a"], prefill={"c": 500}, chunk={"c": 100})
    world.step(decode=["b"], chunk={"c": 400})
    for _ in range(6):
        world.step(decode=["b", "c"])
        for request_id in "bc":
            assert_outputs(
                world,
                request_id,
                attention_over(world, request_id, resident_pages(world, request_id)),
            )
    tables, keys = world.table.tensors, world.table.finders
    for request_id in "bc":
        books, slot = world.books[request_id], world.compacted(request_id).table_slot
        num_pages = books.prompt_tokens // PAGE
        for finder, (layer, head) in enumerate(FINDERS):
            dense = books.kv[layer, head, : num_pages * PAGE, : world.head_dim]
            first = int(tables.first_stripe[slot]) * keys.width + finder * num_pages
            found = keys_of_codes_ref(keys, slice(first, first + num_pages))
            expected = quantised(dense.unflatten(0, (-1, PAGE)))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    world.step(gone=["b", "c"])
    assert len(world.free) == world.num_blocks


def test_random_traffic_loses_nothing_and_reads_what_lists_name():
    """World.step checks all books and page contents after every step. Requests leave at any time,
    and start again at once between their last chunk and the compaction; some find no host blocks.
    """
    rng, num_host_blocks = random.Random(3), 40
    world = make_world(
        seed=3,
        num_blocks=120,
        host_blocks=num_host_blocks,
        swap_class=LaterSwap,
        compacts_late=True,
        max_num_seqs=MOST_REQUESTS,
    )
    traffic = RandomTraffic(rng, longest=320, least_free=44, leaving=0.1, arriving=0.6)
    num_waiting = 0
    for _ in range(50):
        prefill, chunk, leaving, decode = traffic.step(world)
        waiting = {r: world.books[r].prompt_tokens for r in leaving if r in world.runtime._finished}
        num_waiting += len(waiting)
        is_long_enough = all(length // PAGE >= 13 for length in prefill.values())
        world.step(
            prefill | waiting,
            decode,
            leaving,
            chunk | waiting,
            queries={r: 3 * world.random(*world.query_shape) for r in decode},
            compact=is_long_enough,
        )
        for request_id in decode:
            request = world.runtime.request(request_id)
            if request is not None and request.num_decodes:
                resident = resident_pages(world, request_id)
                expected = attention_over(world, request_id, resident)
                outputs = world.books[request_id].outputs.double()
                torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    assert num_waiting and world.counted("requests_without_retrieval")
    assert world.counted("pages_fetched") > 50
    world.step(gone=list(world.books))
    assert len(world.free) == world.num_blocks
    assert world.runtime.host_pool.num_free == num_host_blocks
