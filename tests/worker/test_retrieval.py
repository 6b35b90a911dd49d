from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from later_swap import LaterSwap
from world import (
    CPU,
    PAGE,
    World,
    assignment_of,
    mixed_assignment,
    slow_page_scores,
    slow_select,
)

from common.forced_triggers import force_triggers
from vllm_heterocache.heads import budget
from vllm_heterocache.heads.assignment import HeadAssignment
from vllm_heterocache.kernels.tables import Moves
from vllm_heterocache.worker import fetching, retrieval
from vllm_heterocache.worker.retrieval import WAVES
from vllm_heterocache.worker.tables.head_maps import head_maps

Head = tuple[int, int]


class SlowRetrieval:
    """Drift and retrieval of one request in plain Python, from K, queries and leaders.

    What a check brings is read two steps later, or with `drift_interval` 1 in the next one.
    """

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
        self.waves = dict.fromkeys(pivots, 0)  # retrievals that a pivot's satellites take part in
        self.resident = {}
        for layer, head in self.leader_of:
            size = len(world.resident(request_id, layer, head))
            scores = self.scores(self.books.last_query, layer, head)
            self.resident[layer, head] = self.select(scores, size)
        self.num_spares = world.num_spares(request_id)
        self.under_way: list[tuple[Head, int, int]] = []  # satellite, page that leaves, that comes
        self.steps = self.checks = self.triggers = self.fetched = 0
        self.cut_short = 0  # satellites that did not get all pages at once

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

    def select(self, scores: list[float], size: int) -> set[int]:
        config = self.world.config
        return slow_select(scores, size, *config.protected)

    def step(self) -> None:
        self.steps += 1
        interval = self.world.config.drift_interval
        since_check = (self.steps - 1) % interval
        if since_check == min(2, interval) % interval:
            for satellite, old, new in self.under_way:
                self.resident[satellite] = self.resident[satellite] - {old} | {new}
        if since_check:
            return
        scores = {pivot: self.scores(self.books.queries, *pivot) for pivot in self.reference}
        for pivot in self.reference:
            drifted = self.check(pivot, scores[pivot])
            self.waves[pivot] = WAVES if drifted else max(0, self.waves[pivot] - 1)
        exchanges = {}
        for satellite in sorted(self.leader_of):
            of_leader = scores[self.leader_of[satellite]]
            held = self.resident[satellite]
            wanted = self.select(of_leader, len(held))
            if not self.waves[self.leader_of[satellite]]:
                wanted = held
            incoming = sorted(wanted - held, key=lambda p: -of_leader[p])
            outgoing = sorted(held - wanted, key=lambda p: of_leader[p])
            exchanges[satellite] = list(zip(outgoing, incoming, strict=True))
        self.under_way = self.share(exchanges)
        self.fetched += len(self.under_way)

    def check(self, pivot: Head, scores: list[float]) -> bool:
        current = self.top(scores)
        chance = Fraction(self.top_k, self.num_pages)
        overlap = Fraction(len(current & self.reference[pivot]), self.top_k)
        threshold = Fraction(str(self.world.config.drift_threshold))
        self.checks += 1
        if (overlap - chance) / (1 - chance) >= threshold:
            return False
        self.triggers += 1
        self.reference[pivot] = current
        return True

    def share(self, exchanges: dict[Head, list]) -> list[tuple[Head, int, int]]:
        """Equal shares of the spare pages, the first come first."""
        allowed = self.num_spares
        share = max(1, allowed // max(1, sum(map(bool, exchanges.values()))))
        chosen: list[tuple[Head, int, int]] = []
        order = list(exchanges)
        first = -((self.steps - 1) // self.world.config.drift_interval) % len(order)
        for satellite in order[first:] + order[:first]:
            moves = exchanges[satellite]
            number = min(len(moves), share, allowed - len(chosen))
            self.cut_short += number < len(moves)
            chosen += [(satellite, *move) for move in moves[:number]]
        return chosen


@pytest.mark.parametrize(
    ("seed", "num_tokens", "spare_share", "options"),
    [
        (0, 373, 0.75, {}),
        (1, 16 * 41, 0.75, {"drift_threshold": 0.4, "sink_pages": 2, "recent_pages": 1}),
        (2, 257, 0.75, {"drift_threshold": 1.0, "sink_pages": 0, "recent_pages": 0}),
        (3, 16 * 42, 1 / 4, {"drift_threshold": 1.0, "drift_interval": 2}),
        (4, 16 * 37 + 9, 1 / 16, {}),
        (5, 16 * 40, 1 / 16, {"drift_threshold": 1.0, "drift_interval": 3}),
        (6, 16 * 30 + 1, 1 / 8, {"drift_threshold": 0.2, "recent_pages": 5}),
    ],
)
def test_retrieval_agrees_with_an_independent_slow_reference(
    monkeypatch, seed, num_tokens, spare_share, options
):
    monkeypatch.setattr(budget, "SPARE_SHARE", spare_share)
    monkeypatch.setattr(budget, "SPARE_PAGES_A_SATELLITE", 64)
    options = {"sink_pages": 1, "recent_pages": 1, **options}
    world = World(mixed_assignment(), gpu_budget=0.8, seed=seed, options=options)
    world.step(prefill={"a": num_tokens})
    slow = SlowRetrieval(world, "a")
    budgets = [len(held) for held in slow.resident.values()]
    assert len(set(budgets)) >= 3, "the satellites' budgets should differ"
    for step in range(24):
        # now and then the attention stays where it was
        same = step % 4 == 3
        queries = world.books["a"].queries if same else 4 * world.random(3, 6, 8)
        world.step(decode=["a"], queries={"a": queries})  # compares page contents too
        slow.step()
        for (layer, head), expected in slow.resident.items():
            held = world.resident("a", layer, head)
            assert len(held) == len(set(held)) and set(held) == expected, (step, layer, head)
        assert world.counted("drift_checks") == slow.checks
        assert world.counted("drift_triggers") == slow.triggers
        assert world.counted("pages_fetched") == slow.fetched
    assert slow.triggers > 0 and slow.fetched > 0
    assert slow.triggers < slow.checks or options["drift_threshold"] == 1.0
    assert bool(slow.cut_short) == (spare_share < 0.7)


def test_heads_that_nobody_leads_keep_what_they_had():
    world = World(mixed_assignment())
    world.step(prefill={"a": 373})
    others = [(0, 0), (0, 2), (1, 1), (1, 2)]  # pivots, anchor, volatile
    before = [world.resident("a", *head) for head in others]
    for _ in range(5):
        world.step(decode=["a"], queries={"a": 4 * world.random(3, 6, 8)})
    assert world.counted("pages_fetched") > 0
    assert [world.resident("a", *head) for head in others] == before


def world_of_one_cluster(assignment: HeadAssignment, **options) -> World:
    world = World(assignment, options={"sink_pages": 0, "recent_pages": 0, **options})
    world.step(prefill={"a": 40 * PAGE})
    return world


@pytest.fixture
def whole_retrievals(monkeypatch):
    """Enough spare pages for a whole retrieval at once."""
    monkeypatch.setattr(budget, "SPARE_SHARE", 0.6)
    monkeypatch.setattr(budget, "SPARE_PAGES_A_SATELLITE", 64)


def test_a_satellite_with_a_smaller_budget_keeps_the_best_pages_not_the_earliest(whole_retrievals):
    """Worked example. The reference code sorts the pages of the cluster's largest budget by
    position and cuts that list at each satellite's budget, so that a small satellite loses the
    latest pages: here, where later pages score higher, the very best ones."""
    leaders = {(0, 1): (0, 0), (0, 2): (0, 0)}
    world = world_of_one_cluster(
        assignment_of("PSS", leaders=leaders, weights={(0, 1): 1, (0, 2): 3})
    )
    small, large = (len(world.resident("a", 0, head)) for head in (1, 2))
    assert 0 < small < large < 40
    for _ in range(2):
        world.step(decode=["a"], scores={"a": torch.arange(40.0)[None]})
    assert sorted(world.resident("a", 0, 1)) == list(range(40 - small, 40))
    assert sorted(world.resident("a", 0, 2)) == list(range(40 - large, 40))


def test_a_pivot_leads_satellites_of_later_layers(whole_retrievals):
    leaders = {(1, 0): (0, 1), (2, 1): (0, 1), (1, 1): (1, 2), (2, 2): (1, 2)}
    world = world_of_one_cluster(assignment_of("APA", "SSP", "ASS", leaders=leaders))
    assert world.maps.pivot_heads.tolist() == [1, 5]
    before = {s: world.resident("a", *s) for s in leaders}
    tables, slot = world.table.tensors, world.compacted("a").table_slot
    first = int(tables.first_stripe[slot]) * tables.pivot_width
    scores = tables.scores[first : first + 80].view(2, 40).clone()
    scores[0] = torch.arange(40.0)  # only the pivot of the first layer looks elsewhere
    for _ in range(2):
        world.step(decode=["a"], scores={"a": scores})
    for satellite, leader in leaders.items():
        held, size = world.resident("a", *satellite), len(before[satellite])
        if leader == (0, 1):
            assert sorted(held) == list(range(40 - size, 40))
        else:
            assert held == before[satellite]


def test_only_missing_pages_are_fetched_each_once(whole_retrievals):
    world = world_of_one_cluster(assignment_of("PS", leaders={(0, 1): (0, 0)}))
    held = set(world.resident("a", 0, 1))
    size = len(held)
    copied = []
    fetch = world.swap.fetch

    def recorded(moves: Moves, after: int) -> object:
        copied.extend(moves.host_page[: int(moves.total)].tolist())
        return fetch(moves, after)

    world.swap.fetch = recorded
    scores = torch.zeros(1, 40)
    wanted = [p for p in range(40) if p not in held][:3] + sorted(held)[: size - 3]
    scores[0, wanted] = torch.arange(size, 0, -1).float()
    for _ in range(2):
        world.step(decode=["a"], scores={"a": scores})
    assert set(world.resident("a", 0, 1)) == set(wanted)
    host = world.compacted("a").host.host_blocks
    assert sorted(copied) == sorted(host[wanted[:3]].tolist())


def test_pages_that_leave_keep_their_place_in_the_list(whole_retrievals):
    world = world_of_one_cluster(assignment_of("PS", leaders={(0, 1): (0, 0)}))
    held = world.resident("a", 0, 1)
    scores = torch.zeros(1, 40)
    scores[0, held[2:]] = 1.0
    new = [p for p in range(40) if p not in held][:2]
    scores[0, new] = 2.0
    for _ in range(2):
        world.step(decode=["a"], scores={"a": scores})
    assert world.resident("a", 0, 1) == new + held[2:]


# --- when ---


@pytest.mark.parametrize("interval", [1, 2, 3, 5])
def test_all_clusters_of_a_request_are_checked_every_interval_of_its_own_steps(interval):
    leaders = {(layer, 1): (layer, 0) for layer in range(3)}
    world = world_of_one_cluster(
        assignment_of("PS", "PS", "PS", leaders=leaders), drift_interval=interval
    )
    checked = []
    for step in range(13):
        before = world.counted("drift_checks")
        if step % 4 == 1:  # steps of others
            world.step()
        world.step(decode=["a"], scores={"a": world.random(3, 40).exp()})
        checked.append(world.counted("drift_checks") - before)
        assert world.due == ({"a"} if checked[-1] else set())
    assert checked == [0 if step % interval else 3 for step in range(13)]


def test_the_first_check_waits_as_long_as_the_pages_may_need_to_reach_the_host(monkeypatch):
    """However soon they are there: cached prompts are served as prefilled ones are."""
    page_bytes = PAGE * 2 * 8 * 4
    monkeypatch.setattr(fetching, "OFFLOAD_BYTES_A_STEP", 20 * page_bytes)
    world = world_of_one_cluster(assignment_of("PS", leaders={(0, 1): (0, 0)}))
    world.step(prefill={"b": 20 * PAGE - 1})
    due = []
    for _ in range(4):
        world.step(decode=["a", "b"])
        due.append(world.due)
    assert due == [{"b"}, {"b"}, {"a", "b"}, {"a", "b"}]


def lists_of(world: World, request_id: str) -> list[list[int]]:
    """What its satellites read, in the order of their lists."""
    return [
        world.resident(request_id, *divmod(flat, world.num_kv_heads))
        for flat in world.maps.satellite_heads.tolist()
    ]


def decode_of_a(interval: int, rng: random.Random, with_others: bool) -> list[list[list[int]]]:
    """What a request reads in each of its steps. Transfers happen when `rng` lets them, and with
    others also the rest of the batch and the request's place in it."""
    world = World(
        mixed_assignment(),
        num_blocks=200,
        swap_class=LaterSwap,
        options={"drift_interval": interval, "drift_threshold": 0.9},
    )
    world.step(prefill={"a": 373})
    attention = torch.Generator().manual_seed(5)
    names, seen = iter(range(10**6)), []
    while len(seen) < 25:
        others = [r for r in world.books if r != "a"]
        leaving = [r for r in others if rng.random() < 0.1]
        decode = [r for r in others if r not in leaving and rng.random() < 0.8]
        joins = with_others and len(others) < 3 and rng.random() < 0.4
        if not with_others or rng.random() < 0.7:
            decode.insert(rng.randint(0, len(decode)), "a")
        scores = {r: world.random(2, 12).exp() for r in decode}
        if "a" in decode:
            scores["a"] = torch.randn(2, 23, generator=attention).exp()
        prefill = {f"other-{next(names)}": 12 * PAGE} if joins else {}
        world.step(prefill, decode, leaving, scores=scores)
        if "a" in decode:
            seen.append(lists_of(world, "a"))
        world.swap.let_offload(rng.randint(0, 9))
        world.swap.let_fetch([f for f in world.swap.fetches if rng.random() < 0.4])
    assert world.counted("pages_fetched") > 20
    return seen


@pytest.mark.parametrize("interval", [1, 2, 3, 4])
def test_what_a_request_reads_depends_on_its_own_steps_alone(interval):
    """Not on when its copies arrive, nor on who else is in the batch: one prompt, one answer."""
    alone = decode_of_a(interval, random.Random(0), with_others=False)
    assert len({str(lists) for lists in alone}) > 5, "its lists do change"
    for seed in range(1, 4):
        for with_others in (False, True):
            assert decode_of_a(interval, random.Random(seed), with_others) == alone


@pytest.mark.parametrize(("due", "limit"), [("a", 6), ("ab", 3), ("abc", 2)])
def test_those_who_are_due_share_the_moves_and_others_take_none(monkeypatch, due, limit):
    monkeypatch.setattr(retrieval, "MAX_MOVES", 6)
    monkeypatch.setattr(budget, "SPARE_SHARE", 0.7)
    monkeypatch.setattr(budget, "SPARE_PAGES_A_SATELLITE", 64)
    world = World(
        assignment_of("PS", leaders={(0, 1): (0, 0)}), num_blocks=600, swap_class=LaterSwap
    )
    world.step(prefill=dict.fromkeys(due, 1280))
    dense = ["dense", "also dense"]
    world.step(prefill=dict.fromkeys(dense, 64), compact=False)
    assert all(world.num_spares(r) > 6 for r in due)
    tops = torch.arange(80.0)[None]
    world.step(decode=[*dense, *due], scores=dict.fromkeys(due, tops))
    (fetch,) = world.swap.fetches
    rows = fetch.moves.row[: int(fetch.moves.total)].tolist()
    assert {row: rows.count(row) for row in rows} == {2 + i: limit for i in range(len(due))}


def test_requests_of_one_retrieval_may_go_apart():
    """Each sees its pages at its own step; further retrievals begin meanwhile."""
    world = World(
        assignment_of("PS", leaders={(0, 1): (0, 0)}),
        num_blocks=300,
        swap_class=LaterSwap,
        options={"drift_interval": 2},
    )
    names = "abcd"
    world.step(prefill=dict.fromkeys(names, 640))
    rising = dict.fromkeys(names, torch.arange(40.0)[None])
    before = {r: world.resident(r, 0, 1) for r in names}
    world.step(decode=names, scores=rising)
    for stay in range(1, 4):  # one more stays behind
        for _ in range(2):
            world.step(decode=names[stay:], scores=rising)
    assert len(world.runtime.retriever._retrievals) == 4, "one is left by each, one is d's"
    world.step(decode=names, scores=rising)
    assert [world.resident(r, 0, 1) == before[r] for r in names] == [True, False, False, False]
    world.step(decode=names, scores=rising)
    assert [world.resident(r, 0, 1) == before[r] for r in names] == [False] * 4
    world.step(gone=names)
    assert not any(r.rows for r in world.runtime.retriever._retrievals)


def test_threshold_zero_never_fetches():
    world = world_of_one_cluster(assignment_of("PS", leaders={(0, 1): (0, 0)}), drift_threshold=0.0)
    before = world.resident("a", 0, 1)
    for _ in range(3):
        world.step(decode=["a"], queries={"a": 4 * world.random(1, 4, 8)})
    assert world.resident("a", 0, 1) == before
    assert world.counted("drift_checks") == 0
    assert not world.runtime.retriever.is_watching


@pytest.mark.parametrize(("share", "triggers"), [(1.0, 20), (0.5, None)])
def test_triggers_can_be_forced(share, triggers):
    """Though the attention stays where it was."""
    world = world_of_one_cluster(assignment_of("PS", leaders={(0, 1): (0, 0)}))
    force_triggers(world.runtime, share)
    tables = world.table.tensors
    scores = tables.scores[int(tables.first_stripe[0]) * tables.pivot_width :][:40].clone()
    for _ in range(20):
        world.step(decode=["a"], scores={"a": scores[None]})
    assert world.counted("drift_checks") == 20
    found = world.counted("drift_triggers")
    assert found == triggers if triggers else 4 <= found <= 16


def test_nothing_is_done_before_the_first_request_and_after_the_last():
    world = World(assignment_of("PS", leaders={(0, 1): (0, 0)}), options={"sink_pages": 0})
    world.step(prefill={"short": 63}, compact=False)
    for _ in range(3):
        world.step(decode=["short"])
    world.step(prefill={"a": 640}, decode=["short"])
    world.step(decode=["short", "a"])
    assert world.counted("drift_checks") == 1
    world.step(gone=["a"], decode=["short"])
    assert world.counted("drift_checks") == 1


def test_requests_drift_on_their_own():
    world = world_of_one_cluster(assignment_of("PS", leaders={(0, 1): (0, 0)}))
    world.step(prefill={"b": 43 * PAGE + 3})
    before = world.resident("a", 0, 1)
    held = set(world.resident("b", 0, 1))
    tables, slot = world.table.tensors, world.compacted("a").table_slot
    first = int(tables.first_stripe[slot]) * tables.pivot_width
    kept = tables.scores[first : first + 40].clone()
    scores = {"a": kept[None], "b": torch.arange(43.0)[None]}
    world.step(decode=["b", "a"], scores=scores)
    assert (world.counted("drift_checks"), world.counted("drift_triggers")) == (2, 1)
    world.step(decode=["b", "a"], scores=scores)
    arrived = set(world.resident("b", 0, 1)) - held
    missing = sorted(set(range(43)) - held)
    assert arrived and arrived == set(missing[-len(arrived) :])
    assert world.resident("a", 0, 1) == before


def test_a_slot_that_is_used_again_starts_without_drift(monkeypatch):
    monkeypatch.setattr(retrieval, "WAVES", 100)
    world = world_of_one_cluster(assignment_of("PS", leaders={(0, 1): (0, 0)}))
    world.step(decode=["a"], scores={"a": torch.arange(40.0)[None]})
    fetched, slot = world.counted("pages_fetched"), world.compacted("a").table_slot
    assert fetched
    world.step(gone=["a"], prefill={"b": 640})
    assert world.compacted("b").table_slot == slot
    tables = world.table.tensors
    first = int(tables.first_stripe[slot]) * tables.pivot_width
    for _ in range(3):
        scores = tables.scores[first : first + 40].clone()
        world.step(decode=["b"], scores={"b": scores[None]})
    assert world.counted("pages_fetched") == fetched


def test_heads_are_numbered_in_order_and_pivots_that_lead_nobody_are_left_out():
    leaders = {(0, 2): (0, 3), (1, 0): (0, 0), (1, 1): (0, 3), (2, 3): (1, 2)}
    maps = head_maps(assignment_of("PVSP", "SSPA", "PAAS", leaders=leaders), CPU)
    assert maps.pivot_heads.tolist() == [0, 3, 6]
    assert maps.satellite_heads.tolist() == [2, 4, 5, 11]
    assert maps.leaders.tolist() == [1, 0, 1, 2]
    assert maps.pivot_of_head.tolist() == [[0, -1, -1, 1], [-1, -1, 2, -1], [-1] * 4]
    assert maps.satellite_of_head.tolist() == [[-1, -1, 0, -1], [1, 2, -1, -1], [-1, -1, -1, 3]]
    assert {tensor.dtype for tensor in maps} == {torch.int32}
