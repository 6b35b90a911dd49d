"""Whose attention chooses the pages of a prompt: the last query's, and that of tokens before it."""

from __future__ import annotations

import weakref

import pytest
import torch
from rotation import ROTATION, turned
from world import World, assignment_of, resident_pages, slow_page_scores, slow_select

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.policies.heterocache import SCORING_QUERIES, HeteroCache
from vllm_heterocache.worker.observe.moved_queries import SPREAD
from vllm_heterocache.worker.observe.scoring_queries import MOST_ROWS, queries_at_a_time
from vllm_heterocache.worker.ops.torch_ops import TorchOps

GOLDEN = (5**0.5 - 1) / 2
SMALL = {"matched_share": 0.5}


class NotedOps(TorchOps):
    """Notes how many queries scored at a time, and how many scores there were at a time."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.scored: list[int] = []
        self.held: list[int] = []
        self._scores: list[weakref.ref] = []

    def score_prompt(self, queries, *args) -> torch.Tensor:
        self.scored.append(queries.shape[0])
        scores = super().score_prompt(queries, *args)
        self._scores.append(weakref.ref(scores))
        self.held.append(sum(reference() is not None for reference in self._scores))
        return scores


def make_world(**settings) -> World:
    """Whose heads are all compressed to a tenth of a prompt, or as `settings` say. No head is a
    finder, though the options have them."""
    sizes = {"gpu_budget": 0.1, "num_blocks": 400, "host_blocks": 0, "rotation": ROTATION}
    return World(
        assignment_of("AAA", "AAA", "AAA"),
        **{**sizes, "options": SMALL, "make_ops": NotedOps, **settings},
    )


def asked(world: World, request_id: str, positions: list[int], num_references: int) -> torch.Tensor:
    """[n, L, Hq, D]: queries of prompt tokens as if asked behind the prompt, and the last one."""
    books = world.books[request_id]
    first = books.prompt_tokens - num_references
    moved = [
        turned(
            books.prompt_queries[position],
            books.prompt_tokens - position + int((position - first) * GOLDEN % 1 * SPREAD),
        )
        for position in positions
    ]
    return torch.stack([*moved, books.last_query])


def expected_pages(world: World, request_id: str, queries: torch.Tensor):
    """(layer, head) -> pages of the largest mass of any of the queries [n, L, Hq, D]."""
    books, pages = world.books[request_id], {}
    for (layer, head), kept in resident_pages(world, request_id).items():
        rows = queries[:, layer].unflatten(1, (world.num_kv_heads, -1))[:, head].flatten(0, 1)
        keys = books.kv[layer, head, : books.prompt_tokens, : world.head_dim]
        num_pages = books.prompt_tokens // 16
        scores = slow_page_scores(rows, keys, num_pages, world.scale)
        pages[layer, head] = sorted(slow_select(scores, len(kept), 1, 3))
    return pages


def test_pages_are_those_of_the_largest_mass_under_any_scoring_query():
    world = make_world()
    world.step(prefill={"a": 1605}, chunk={"a": 900})
    world.step(chunk={"a": 705})
    assert world.runtime.ops.scored == [SCORING_QUERIES]
    positions = [1605 - 128 + place for place in (15, 31, 47, 63, 79, 95, 111)]
    expected = expected_pages(world, "a", asked(world, "a", positions, 128))
    assert resident_pages(world, "a") == expected
    assert expected != expected_pages(world, "a", world.books["a"].last_query[None])


@pytest.mark.parametrize(("last_chunk", "places"), [(20, range(5, 18, 2)), (5, range(4)), (1, [])])
def test_fewer_references_choose_as_far_as_they_go(last_chunk, places, monkeypatch):
    module = "vllm_heterocache.worker.observe.reference_queries"
    monkeypatch.setattr(f"{module}.REFERENCE_POSITIONS", last_chunk)
    world = make_world()
    world.step(prefill={"a": 1600})
    positions = [1600 - last_chunk + place for place in places]
    queries = asked(world, "a", positions, last_chunk)
    assert resident_pages(world, "a") == expected_pages(world, "a", queries)
    assert world.runtime.ops.scored == [SCORING_QUERIES]  # one shape of kernels


@pytest.mark.parametrize(
    "settings",
    [
        {"rotation": None},
        {"gpu_budget": 0.11},
        {"options": SMALL | {"finder_share": 0.0}},
    ],
    ids=str,
)
def test_the_last_query_is_alone(settings):
    world = make_world(**settings)
    world.step(prefill={"a": 1600})
    last = world.books["a"].last_query
    assert resident_pages(world, "a") == expected_pages(world, "a", last[None])


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"gpu_budget": 0.1}, SCORING_QUERIES),
        ({"gpu_budget": 0.05}, SCORING_QUERIES),
        ({"gpu_budget": 0.049}, 1),
        ({"gpu_budget": 0.2}, 1),
        ({"gpu_budget": 0.1, "matched_share": 0.0}, 1),
        ({"gpu_budget": 0.1, "finder_share": 0.0}, 1),
        ({"gpu_budget": 0.1, "recipe": "paper"}, 1),
    ],
    ids=str,
)
def test_small_budgets_with_matched_tokens_and_finders_have_more_queries(options, count):
    assert HeteroCache().scoring_queries(HeteroCacheConfig(**options)) == count


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 9, 16, 17, 64, 71])
def test_parts_are_of_one_size_and_no_wider_than_kernels_take(group):
    at_a_time = queries_at_a_time(SCORING_QUERIES, group)
    assert SCORING_QUERIES % at_a_time == 0
    assert at_a_time == 1 or at_a_time * group <= MOST_ROWS
    assert at_a_time == SCORING_QUERIES or 2 * at_a_time * group > MOST_ROWS


@pytest.mark.parametrize(("most_rows", "at_a_time"), [(8, 4), (2, 1)])
def test_parts_choose_what_all_choose_at_a_time(most_rows, at_a_time, monkeypatch):
    """As groups of 16 and 64 have it, with the scores of one part beside the largest so far."""
    whole = make_world()
    whole.step(prefill={"a": 1600})
    monkeypatch.setattr("vllm_heterocache.worker.observe.scoring_queries.MOST_ROWS", most_rows)
    parts = make_world()
    parts.step(prefill={"a": 1600})
    num_parts = SCORING_QUERIES // at_a_time
    assert parts.runtime.ops.scored == [at_a_time] * num_parts
    assert parts.runtime.ops.held == [1, *[2] * (num_parts - 1)]
    assert resident_pages(parts, "a") == resident_pages(whole, "a")
