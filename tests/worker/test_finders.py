"""Finders in a world of their own: what they score, what comes, and what becomes of their keys."""

from __future__ import annotations

import pytest
import torch
from later_swap import LaterSwap
from world import PAGE, World, assert_outputs, assignment_of, attention_over, resident_pages

from vllm_heterocache.kernels.exchange_pages_ref import MAX_EXCHANGED
from vllm_heterocache.kernels.quantized_keys_ref import keys_of_codes_ref
from vllm_heterocache.kernels.values import DriftCounter

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
                free = [page for page in before[head] if world.config.sink_pages <= page < last]
                missing = [page for page in range(num_pages) if page not in before[head]]
                best, worst = max(missing, key=score.__getitem__), min(free, key=score.__getitem__)
                if score[best] > score[worst] * 1.001:
                    assert best in new and worst in gone
                for come, go in zip(
                    sorted(score[page] for page in new)[::-1],
                    sorted(score[page] for page in gone),
                    strict=True,
                ):
                    assert come > go
                assert not gone & {*range(world.config.sink_pages), *range(last, num_pages)}
        before = after
    assert came > 20
    assert world.runtime.ops.memory.counters[DriftCounter.PAGES_FETCHED] == came


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
