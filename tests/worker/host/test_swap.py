from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from later_swap import LaterSwap
from random_traffic import RandomTraffic
from world import CPU, PAGE, World, assignment_of, mixed_assignment

from vllm_heterocache.kernels.tables import HeadMaps, Moves
from vllm_heterocache.worker import retrieval
from vllm_heterocache.worker.host.host_pool import HostPool
from vllm_heterocache.worker.host.swap import SynchronousSwap, satellite_pages
from vllm_heterocache.worker.tables.head_maps import head_maps


@pytest.fixture
def maps() -> HeadMaps:
    """3 layers of 3 heads; the flat heads 1, 3, 6, 7 and 8 are satellites."""
    return head_maps(mixed_assignment(), CPU)


@pytest.fixture
def pools() -> tuple[torch.Tensor, HostPool]:
    """7 blocks of 9 pages, and 6 host blocks of 5."""
    generator = torch.Generator().manual_seed(0)
    host = HostPool(6, num_satellites=5, page_size=16, head_dim=4, dtype=torch.bfloat16)
    host.pages.copy_(torch.randn(host.pages.shape, generator=generator))
    return torch.randn(7 * 9, 16, 8, generator=generator).bfloat16(), host


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_satellite_pages_go_block_by_block_as_host_blocks_hold_them(maps):
    pages = satellite_pages(int32(9, 0, 4), maps)
    assert pages.tolist() == [[b * 9 + h for h in (1, 3, 6, 7, 8)] for b in (9, 0, 4)]
    assert pages.dtype == torch.int32


def test_offload_copies_the_satellites_of_each_block_and_nothing_else(pools, maps):
    gpu, host = pools
    expected, unchanged = host.pages.clone(), gpu.clone()
    for dense, block in ((2, 5), (6, 0), (3, 3)):
        for i, head in enumerate((1, 3, 6, 7, 8)):
            expected[block * 5 + i] = gpu[dense * 9 + head]
    SynchronousSwap(gpu, host, maps).offload(int32(2, 6, 3), np.array([5, 0, 3]))
    assert torch.equal(host.pages, expected) and torch.equal(gpu, unchanged)


@pytest.mark.parametrize("total", [0, 1, 2])
def test_fetch_copies_the_moves_in_use_and_nothing_else(pools, maps, total):
    gpu, host = pools
    moves = Moves.allocate(4, CPU)
    moves.host_page.copy_(int32(7, 2, 1000, 1000))
    moves.gpu_page.copy_(int32(1, 40, 1000, 1000))
    moves.total.fill_(total)
    expected, unchanged = gpu.clone(), host.pages.clone()
    for source, target in [(7, 1), (2, 40)][:total]:
        expected[target] = host.pages[source]
    swap = SynchronousSwap(gpu, host, maps)
    fetch = swap.fetch(moves, after=swap.mark())
    swap.settle(fetch)
    assert swap.take_late() == 0
    assert torch.equal(gpu, expected) and torch.equal(host.pages, unchanged)


def test_marks_are_reported_once_in_order(pools, maps):
    swap = SynchronousSwap(*pools, maps)
    first, second = swap.mark(), swap.mark()
    assert first != second
    assert swap.take_completed() == [first, second]
    assert swap.take_completed() == []
    third = swap.mark()
    assert third not in (first, second) and swap.take_completed() == [third]


# --- the runtime over a swap manager whose transfers happen later (LaterSwap) ---


@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_no_page_is_exposed_early_or_overwritten_and_no_spare_is_lost(seed, interval):
    """World.step checks after every step: pages being written hold NaN and stand in no list,
    listed pages hold the prompt pages they should, and every page is accounted for."""
    rng = random.Random(seed)
    # not always are there enough host blocks
    world = World(
        mixed_assignment(),
        num_blocks=110,
        host_blocks=54,
        seed=seed,
        swap_class=LaterSwap,
        options={"drift_interval": interval},
    )
    traffic = RandomTraffic(rng, longest=300, least_free=36, leaving=0.08, arriving=0.5)
    waited = left_with_fetch = 0
    for _ in range(70):
        prefill, chunk, leaving, complete = traffic.step(world)
        decode = [r for r in complete if rng.random() < 0.9]
        scores = {
            r: world.random(2, world.books[r].prompt_tokens // PAGE).exp()
            for r in decode
            if world.runtime.request(r) and rng.random() < 0.8
        }
        waited += bool(world.swap.fetches)
        gone = {world.compacted(r).table_slot for r in leaving if world.runtime.request(r)}
        left_with_fetch += bool(gone and world.swap.fetches)
        world.step(prefill, decode, leaving, chunk, scores)
        if rng.random() < 0.6:
            world.swap.let_offload(rng.randint(0, 6))
        world.swap.let_fetch(f for f in world.swap.fetches if rng.random() < 0.4)
    assert waited > 10 and left_with_fetch and world.swap.settled
    assert world.counted("pages_fetched") > 20 and world.counted("fetches_late")
    assert world.counted("requests_without_retrieval") and world.done and not world.refused
    world.step(gone=list(world.books))
    assert len(world.free) == world.num_blocks
    assert world.runtime.host_pool.num_free == world.host_blocks
    world.swap.let_offload()
    assert world.runtime.take_answers() == ([], []), "those who left are not answered for"


PAIR = {"leaders": {(0, 1): (0, 0)}}
RISING = {"a": torch.arange(40.0)[None]}
FALLING = {"a": torch.arange(40.0).flip(0)[None]}


def later_world(*rows: str, leaders, num_tokens: int = 640, **options) -> World:
    world = World(
        assignment_of(*rows, leaders=leaders),
        num_blocks=200,
        swap_class=LaterSwap,
        options=options,
    )
    world.step(prefill={"a": num_tokens})
    return world


def with_host_copy(world: World) -> World:
    world.swap.let_offload()
    world.runtime.begin_step([])
    world._take_answers()
    assert world.done == ["a"] and world.num_spares("a") == 1
    return world


def pair_world() -> World:
    """A request whose host copy is complete; one satellite, one spare page."""
    return with_host_copy(later_world("PS", **PAIR))


def best_missing(held: Iterable[int], number: int = 1) -> set[int]:
    """What a retrieval brings of a prompt of 40 pages, of which the later ones score higher."""
    return set(sorted(set(range(40)) - set(held))[-number:])


def test_dense_blocks_are_answered_for_only_when_the_host_copy_is_complete():
    world = later_world("PS", **PAIR)
    world.step()
    assert world.done == []
    world.swap.let_offload(len(world.swap.to_host) - 1)  # all but the mark
    world.step()
    assert world.done == []
    world.swap.let_offload()
    assert world.done == []
    world.step()
    assert world.done == ["a"]


def test_a_fetch_comes_after_the_copies_to_the_host_that_it_reads():
    """Host blocks hold NaN until then, and World.check compares what the lists name."""
    world = later_world("PS", **PAIR)
    before = world.resident("a", 0, 1)
    for _ in range(2):
        world.step(decode=["a"], scores=RISING)
    assert set(world.resident("a", 0, 1)) - set(before) == best_missing(before)
    assert not world.swap.to_host and world.counted("fetches_late") == 1
    world.step(decode=["a"], scores=RISING)
    assert world.done == ["a"] and world.swap.fetches[-1].after == 0, "the host has seen the copy"


def test_pages_go_to_the_host_chunk_by_chunk_and_the_rest_at_compaction():
    world = World(assignment_of("PS", **PAIR), swap_class=LaterSwap)
    under_way = []
    for tokens, new in ((100, {"a": 645}), (15, {}), (1, {}), (200, {}), (329, {})):
        world.step(prefill=new, chunk={"a": tokens})
        copies = [c for c in world.swap.to_host if not isinstance(c, int)]
        under_way.append(sum(copy.gpu_pages.numel() for copy in copies))
    assert under_way == [6, 7, 7, 19, 40]
    assert isinstance(world.swap.to_host[-1], int), "one mark, after all of them"
    assert sum(isinstance(c, int) for c in world.swap.to_host) == 1
    world.swap.let_offload()
    world.step(decode=["a"])
    assert world.done == ["a"]


@pytest.mark.parametrize("when", ["during its prefill", "after its compaction"])
def test_host_blocks_of_a_request_that_left_hold_what_the_next_one_sends(when):
    """Its copies may be under way when its host blocks are given away; they come first."""
    world = World(assignment_of("PS", **PAIR), host_blocks=42, swap_class=LaterSwap)
    world.step(prefill={"a": 640}, chunk={"a": 640 if when == "after its compaction" else 400})
    old = len(world.swap.to_host)
    assert old
    world.step(gone=["a"])
    world.step(prefill={"b": 650})
    assert world.runtime.host_pool.num_free == 2, "they share most host blocks"
    world.swap.let_offload(old)
    world.step(decode=["b"])
    assert world.done == []
    world.swap.let_offload()
    for _ in range(3):
        world.step(decode=["b"])  # World.check compares what the host holds
    assert world.done == ["b"]


@pytest.mark.parametrize("arrives", ["at once", "late"])
@pytest.mark.parametrize("interval", [1, 2, 3])
def test_fetched_pages_are_read_a_fixed_number_of_steps_later(interval, arrives):
    world = with_host_copy(later_world("PS", **PAIR, drift_interval=interval))
    before = world.resident("a", 0, 1)
    world.step(decode=["a"], scores=RISING)
    if arrives == "at once":
        world.swap.let_fetch()
    for _ in range(min(2, interval)):
        assert world.resident("a", 0, 1) == before
        world.step()  # of others
        world.step(decode=["a"], scores=RISING)
    assert set(world.resident("a", 0, 1)) - set(before) == best_missing(before)
    assert world.counted("fetches_late") + world.swap.take_late() == (arrives == "late")


def test_a_page_that_is_wanted_again_while_it_is_fetched_is_listed_once():
    """The attention goes forth and back before the first retrieval has arrived."""
    world = pair_world()
    for scores in (RISING, FALLING, RISING, FALLING):
        world.step(decode=["a"], scores=scores)
        world.swap.let_fetch(world.swap.fetches[1:])
    world.swap.let_fetch()
    for scores in (RISING, RISING):
        world.step(decode=["a"], scores=scores)
        world.swap.let_fetch()
    world.step()


@pytest.mark.parametrize("waves", [1, 100])
def test_a_plan_larger_than_the_spares_takes_the_most_wanted_first(monkeypatch, waves):
    monkeypatch.setattr(retrieval, "WAVES", waves)
    leaders = {(0, 1): (0, 0), (0, 2): (0, 0), (1, 1): (1, 0), (1, 2): (1, 0)}
    world = later_world("PSS", "PSS", leaders=leaders, num_tokens=1280, sink_pages=0)
    satellites = sorted(leaders)
    num_spares = world.num_spares("a")
    share = num_spares // len(satellites)
    assert share >= 1
    scores = {"a": torch.stack([torch.arange(1, 81.0), torch.arange(80.0, 0, -1)])}
    lacking = {}
    for satellite in satellites:
        held = set(world.resident("a", *satellite))
        best = list(range(79, -1, -1) if satellite[0] == 0 else range(80))
        protected = {77, 78, 79}
        wanted = protected | set([p for p in best if p not in protected][: len(held) - 3])
        lacking[satellite] = [p for p in best if p in wanted - held]
        assert len(lacking[satellite]) > 2 * share, "more than fit"
    for step in range(30):
        held = {s: set(world.resident("a", *s)) for s in satellites}
        world.step(decode=["a"], scores=scores)
        moved = sum(f.gpu_pages.numel() for f in world.swap.fetches)
        assert moved <= num_spares
        for satellite in satellites:
            arrived = set(world.resident("a", *satellite)) - held[satellite]
            missing = [p for p in lacking[satellite] if p not in held[satellite]]
            assert arrived == set(missing[: len(arrived)]), "the best of those it lacks"
            if waves > 1 and step:
                assert len(arrived) >= min(share, len(missing))
    left = [set(lacking[s]) - set(world.resident("a", *s)) for s in satellites]
    if waves == 1:  # the reference set has followed: no more drift, no more waves
        assert all(left) and world.counted("drift_triggers") == 2
    else:
        assert not any(left)


@pytest.mark.parametrize("under_way", ["offload", "fetch"])
def test_pages_of_a_request_that_leaves_are_free_of_transfers_when_others_get_them(under_way):
    world = later_world("PS", **PAIR) if under_way == "offload" else pair_world()
    if under_way == "fetch":
        world.step(decode=["a"], scores=RISING)
    fetches = list(world.swap.fetches)
    assert len(fetches) == (under_way == "fetch")
    world.step(gone=["a"])
    assert world.swap.settled == fetches and all(fetch.has_arrived for fetch in fetches)
    assert len(world.free) == world.num_blocks
    assert bool((world.table.tensors.entries == -1).all())
    before = [tensor.clone() for tensor in world.table.tensors if torch.is_tensor(tensor)]
    world.swap.let_fetch()
    world.step()  # nothing becomes visible
    after = [tensor for tensor in world.table.tensors if torch.is_tensor(tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    world.step(prefill={"b": 640})
    world.swap.let_offload()
    world.step(decode=["b"])
    assert world.done[-1] == "b"


def test_poison_outlasts_a_fetch_of_the_request_that_left():
    """Its blocks come with the same step: the pages that were on their way must not come later."""
    world = pair_world()
    world.step(decode=["a"], scores=RISING)
    assert world.swap.fetches
    blocks = world.compacted("a").order.block_ids
    world._free_all(world.books.pop("a"))
    world.runtime.begin_step(["a"], poison=blocks)
    assert bool(world.pool[blocks].isnan().all())


def test_moves_of_the_others_survive_when_a_request_leaves():
    """All share a retrieval, and the newcomer gets the slot and the pages of the one that left."""
    options = {"drift_interval": 2}
    world = World(
        assignment_of("PS", **PAIR), num_blocks=220, swap_class=LaterSwap, options=options
    )
    world.step(prefill={"a": 640, "b": 640, "c": 640})
    world.swap.let_offload()
    world.step()
    world.step(decode=["c", "b", "a"], scores=dict.fromkeys("abc", RISING["a"]))
    (fetch,) = world.swap.fetches
    assert sorted(fetch.moves.row[: int(fetch.moves.total)].tolist()) == [0, 1, 2]
    held = {r: set(world.resident(r, 0, 1)) for r in "abc"}
    slot = world.compacted("b").table_slot
    world.step(gone=["b"], prefill={"new": 640}, decode=["a", "c"])
    assert world.compacted("new").table_slot == slot
    kept = world.resident("new", 0, 1)
    assert world.swap.settled == [fetch]
    for request_id in "ac":
        assert set(world.resident(request_id, 0, 1)) == held[request_id]
    world.swap.let_fetch()
    world.step(decode=["a", "c"])
    for request_id in "ac":
        arrived = set(world.resident(request_id, 0, 1)) - held[request_id]
        assert arrived == best_missing(held[request_id])
    assert world.resident("new", 0, 1) == kept


def test_a_retrieval_arrives_where_it_should_though_its_request_was_moved_meanwhile(monkeypatch):
    """Closing gaps moves the rows of all arenas. It waits for what runs beside the step and lists
    moves from them; moves that are listed are relative to them."""
    world = World(
        mixed_assignment(), num_blocks=100, max_num_seqs=14, swap_class=LaterSwap, padding=0
    )
    names = [f"r{i}" for i in range(11)]
    staying, leaving = names[::2], names[1::2]

    def places() -> list[int]:
        return [world.table.base(world.compacted(r).table_slot) for r in staying]

    at_waits: list[list[int]] = []
    monkeypatch.setattr(world.swap, "settle_all", lambda: at_waits.append(places()))
    for name in names:  # 8 compact blocks each
        world.step(prefill={name: 176})
        world.swap.let_offload()
        world.step()
    scores = {r: world.random(2, 11).exp() for r in staying}
    world.step(decode=staying, scores=scores)
    (fetch,) = world.swap.fetches
    assert fetch.gpu_pages.numel() > 3
    held = {r: world.resident(r, 1, 0) for r in staying}
    noted = {r: arenas_of(world, r) for r in staying}
    before = places()
    world.step(gone=leaving, prefill={"big": 16 * 26})  # 19 blocks, in one piece
    assert at_waits == [before], "before the rows move, and for no other prompt"
    assert all(now < then for now, then in zip(places()[1:], before[1:], strict=True))
    for request_id in staying:
        assert world.resident(request_id, 1, 0) == held[request_id]
        assert arenas_of(world, request_id) == noted[request_id]
    assert not world.swap.settled and fetch in world.swap.fetches
    world.swap.let_fetch()
    listed = {r: set(listed_positions(world, r)) for r in staying}
    world.step(decode=staying)
    arrived = [len(set(listed_positions(world, r)) - listed[r]) for r in staying]
    assert sum(arrived) == fetch.gpu_pages.numel()


def listed_positions(world: World, request_id: str) -> list[tuple[int, int, int]]:
    heads = [(i, j) for i in range(world.num_layers) for j in range(world.num_kv_heads)]
    return [(*head, page) for head in heads for page in world.resident(request_id, *head)]


def arenas_of(world: World, request_id: str) -> list[list[float]]:
    """What the arenas hold of a request, wherever its rows are."""
    tables, slot = world.table.tensors, world.compacted(request_id).table_slot
    row, pages = int(tables.first_stripe[slot]), int(tables.prompt_pages[slot])
    pivots, satellites = world.maps.pivot_heads.numel(), world.maps.satellite_heads.numel()
    return [
        tables.page_lse[row * tables.pivot_width :][: pivots * pages].flatten().tolist(),
        tables.scores[row * tables.pivot_width :][: pivots * pages].tolist(),
        tables.is_reference[row * tables.pivot_width :][: pivots * pages].tolist(),
        tables.is_resident[row * tables.satellite_width :][: satellites * pages].tolist(),
        tables.host_blocks[row * tables.host_width :][:pages].tolist(),
    ]
