from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from worker_fixtures import (
    PAGE,
    World,
    assignment_of,
    mixed_assignment,
    slow_page_scores,
    slow_select,
)

from vllm_heterocache.head_profile import HeadAssignment
from vllm_heterocache.retrieval import Clusters
from vllm_heterocache.swap import Transfer


class SlowRefresh:
    """The whole refresh of one request in plain Python, from K, queries and leaders."""

    def __init__(self, world: World, request_id: str) -> None:
        self.world, self.books = world, world.books[request_id]
        self.num_pages = self.books.prompt_tokens // PAGE
        self.top_k = min(self.num_pages, max(4, math.ceil(0.05 * self.num_pages)))
        leaders = world.assignment.leaders
        self.leader_of = {
            tuple(map(int, s)): divmod(int(leaders[tuple(s)]), world.num_kv_heads)
            for s in np.argwhere(leaders >= 0)
        }
        pivots = sorted(set(self.leader_of.values()))
        self.reference = {p: self.top(self.scores(self.books.last_query, *p)) for p in pivots}
        self.resident = {}
        for layer, head in self.leader_of:
            budget = len(world.resident(request_id, layer, head))
            scores = self.scores(self.books.last_query, layer, head)
            self.resident[layer, head] = self.select(scores, budget)
        self.checks = self.triggers = self.fetched = 0

    def scores(self, queries: torch.Tensor, layer: int, head: int) -> list[float]:
        group, width = self.world.group, self.world.head_dim
        return slow_page_scores(
            queries[layer, head * group : (head + 1) * group],
            self.books.kv[layer, head, :, :width],
            self.num_pages,
            self.world.scale,
        )

    def top(self, scores: list[float]) -> set[int]:
        return set(sorted(range(self.num_pages), key=lambda p: (-scores[p], p))[: self.top_k])

    def select(self, scores: list[float], budget: int) -> set[int]:
        config = self.world.config
        return slow_select(scores, budget, config.sink_pages, config.recent_pages)

    def step(self) -> None:
        for pivot, reference in self.reference.items():
            scores = self.scores(self.books.queries, *pivot)
            current = self.top(scores)
            chance = Fraction(self.top_k, self.num_pages)
            overlap = (Fraction(len(current & reference), self.top_k) - chance) / (1 - chance)
            self.checks += 1
            if overlap < self.world.config.drift_threshold:
                self.triggers += 1
                self.reference[pivot] = current
                for satellite, leader in self.leader_of.items():
                    if leader == pivot:
                        wanted = self.select(scores, len(self.resident[satellite]))
                        self.fetched += len(wanted - self.resident[satellite])
                        self.resident[satellite] = wanted


@pytest.mark.parametrize(
    "seed, num_tokens, options",
    [
        (0, 373, {}),
        (1, 16 * 41, {"drift_threshold": 0.4, "sink_pages": 2, "recent_pages": 1}),
        (2, 257, {"drift_threshold": 1.0, "sink_pages": 0, "recent_pages": 0}),
        (3, 16 * 30 + 1, {"drift_threshold": 0.2, "recent_pages": 5}),
    ],
)
def test_refresh_agrees_with_an_independent_slow_reference(seed, num_tokens, options):
    world = World(mixed_assignment(), seed=seed, options=options)
    world.step(prefill={"a": num_tokens})
    slow = SlowRefresh(world, "a")
    budgets = [len(held) for held in slow.resident.values()]
    assert len(set(budgets)) >= 3, "the satellites' budgets should differ"
    counters = world.runtime.counters
    for step in range(14):
        # now and then the attention stays where it was
        same = step % 3 == 1
        queries = world.books["a"].queries if same else 4 * world.random(3, 6, 8)
        world.step(decode=["a"], queries={"a": queries})  # compares page contents too
        slow.step()
        for (layer, head), expected in slow.resident.items():
            held = world.resident("a", layer, head)
            assert len(held) == len(set(held)) and set(held) == expected, (step, layer, head)
        assert counters.drift_checks == slow.checks
        assert counters.drift_triggers == slow.triggers
        assert counters.pages_fetched == slow.fetched
    assert 0 < slow.triggers < slow.checks and slow.fetched > 0


def test_heads_that_nobody_leads_keep_what_they_had():
    world = World(mixed_assignment())
    world.step(prefill={"a": 373})
    others = [(0, 0), (0, 2), (1, 1), (1, 2)]  # pivots, anchor, volatile
    before = [world.resident("a", *head) for head in others]
    for _ in range(5):
        world.step(decode=["a"], queries={"a": 4 * world.random(3, 6, 8)})
    assert world.runtime.counters.pages_fetched > 0
    assert [world.resident("a", *head) for head in others] == before


def world_of_one_cluster(assignment: HeadAssignment, **options) -> World:
    world = World(assignment, options={"sink_pages": 0, "recent_pages": 0, **options})
    world.step(prefill={"a": 40 * PAGE})
    return world


def test_a_satellite_with_a_smaller_budget_keeps_the_best_pages_not_the_earliest():
    """Worked example. The reference code sorts the pages of the cluster's largest budget by
    position and cuts that list at each satellite's budget, so that a small satellite loses the
    latest pages: here, where later pages score higher, the very best ones."""
    leaders = {(0, 1): (0, 0), (0, 2): (0, 0)}
    world = world_of_one_cluster(
        assignment_of("PSS", leaders=leaders, weights={(0, 1): 1, (0, 2): 3})
    )
    small, large = (len(world.resident("a", 0, head)) for head in (1, 2))
    assert 0 < small < large < 40
    world.step(decode=["a"], scores={"a": torch.arange(40.0)[None]})
    assert sorted(world.resident("a", 0, 1)) == list(range(40 - small, 40))
    assert sorted(world.resident("a", 0, 2)) == list(range(40 - large, 40))


def test_a_pivot_leads_satellites_of_later_layers():
    leaders = {(1, 0): (0, 1), (2, 1): (0, 1), (1, 1): (1, 2), (2, 2): (1, 2)}
    world = world_of_one_cluster(assignment_of("APA", "SSP", "ASS", leaders=leaders))
    assert world.runtime.clusters.pivots.tolist() == [1, 5]
    before = {s: world.resident("a", *s) for s in leaders}
    scores = world.compacted("a").scores.clone()
    scores[0] = torch.arange(40.0)  # only the pivot of the first layer looks elsewhere
    world.step(decode=["a"], scores={"a": scores})
    for satellite, leader in leaders.items():
        held, size = world.resident("a", *satellite), len(before[satellite])
        if leader == (0, 1):
            assert sorted(held) == list(range(40 - size, 40))
        else:
            assert held == before[satellite]


def test_only_missing_pages_are_fetched_each_once():
    world = world_of_one_cluster(assignment_of("PS", leaders={(0, 1): (0, 0)}))
    held = set(world.resident("a", 0, 1))
    size = len(held)
    copied = []
    fetch = world.swap.fetch

    def recorded(transfer: Transfer) -> None:
        copied.extend(transfer.host_pages.tolist())
        fetch(transfer)

    world.swap.fetch = recorded
    scores = torch.zeros(1, 40)
    wanted = [p for p in range(40) if p not in held][:3] + sorted(held)[: size - 3]
    scores[0, wanted] = torch.arange(size, 0, -1).float()
    world.step(decode=["a"], scores={"a": scores})
    assert set(world.resident("a", 0, 1)) == set(wanted)
    host = world.compacted("a").host_pages[0]
    assert sorted(copied) == sorted(host[wanted[:3]].tolist())


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_drift_is_checked_every_interval_steps(interval):
    world = world_of_one_cluster(
        assignment_of("PS", leaders={(0, 1): (0, 0)}), drift_interval=interval
    )
    checked = []
    for _ in range(11):
        before = world.runtime.counters.drift_checks
        world.step(decode=["a"], scores={"a": world.random(1, 40).exp()})
        checked.append(world.runtime.counters.drift_checks - before)
    assert checked == [int((step + 1) % interval == 0) for step in range(11)]


def test_threshold_zero_never_refreshes():
    world = world_of_one_cluster(assignment_of("PS", leaders={(0, 1): (0, 0)}), drift_threshold=0.0)
    before = world.resident("a", 0, 1)
    for sign in (1, -1, 1):
        world.step(decode=["a"], scores={"a": sign * torch.arange(40.0)[None]})
    assert world.resident("a", 0, 1) == before
    assert world.runtime.counters.drift_checks == 0


def test_requests_drift_on_their_own():
    world = world_of_one_cluster(assignment_of("PS", leaders={(0, 1): (0, 0)}))
    world.step(prefill={"b": 43 * PAGE + 3}, decode=["a"])
    before = world.resident("a", 0, 1)
    kept = world.compacted("a").scores.clone()
    world.compacted("a").reference = kept.argsort(descending=True)[:, :4]
    scores = {"a": kept, "b": torch.arange(43.0)[None]}
    world.step(decode=["b", "a"], scores=scores)
    held = world.resident("b", 0, 1)
    assert sorted(held) == list(range(43 - len(held), 43))
    assert world.resident("a", 0, 1) == before


def test_clusters_know_pivots_by_layer_and_their_followers():
    leaders = {(0, 2): (0, 3), (1, 0): (0, 0), (1, 1): (0, 3), (2, 3): (1, 2)}
    clusters = Clusters(assignment_of("PVSP", "SSPA", "PAAS", leaders=leaders))
    # pivot (2, 0) leads nobody: nothing needs its scores
    assert clusters.pivots.tolist() == [0, 3, 6]
    assert clusters.satellites.tolist() == [2, 4, 5, 11]
    assert [followers.tolist() for followers in clusters.followers] == [[1], [0, 2], [3]]
    assert clusters.pivots_of_layer(0) == [(0, 0), (3, 1)]
    assert clusters.pivots_of_layer(1) == [(2, 2)]
    assert clusters.pivots_of_layer(2) == []
