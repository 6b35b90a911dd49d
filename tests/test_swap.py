from __future__ import annotations

import random

import pytest
import torch
from worker_fixtures import LaterSwap, World, assignment_of, mixed_assignment, slow_select

from vllm_heterocache.cpu_pool import CpuPool
from vllm_heterocache.swap import SynchronousSwap, Transfer


def ids(*pages: int) -> torch.Tensor:
    return torch.tensor(pages, dtype=torch.int64)


@pytest.fixture
def pools() -> tuple[torch.Tensor, CpuPool]:
    generator = torch.Generator().manual_seed(0)
    host = CpuPool(9, page_size=16, head_dim=4, dtype=torch.bfloat16)
    host.pages.copy_(torch.randn(host.pages.shape, generator=generator))
    return torch.randn(7, 16, 8, generator=generator).bfloat16(), host


def test_offload_copies_gpu_pages_to_the_host_and_nothing_else(pools):
    gpu, host = pools
    expected, unchanged = host.pages.clone(), gpu.clone()
    expected[ids(8, 0, 3)] = gpu[ids(2, 6, 5)]
    SynchronousSwap(gpu, host).offload(Transfer(0, ids(2, 6, 5), ids(8, 0, 3)))
    assert torch.equal(host.pages, expected) and torch.equal(gpu, unchanged)


def test_fetch_copies_host_pages_to_the_gpu_and_nothing_else(pools):
    gpu, host = pools
    expected, unchanged = gpu.clone(), host.pages.clone()
    expected[ids(1, 4)] = host.pages[ids(7, 2)]
    SynchronousSwap(gpu, host).fetch(Transfer(0, ids(1, 4).int(), ids(7, 2)))
    assert torch.equal(gpu, expected) and torch.equal(host.pages, unchanged)


def test_transfers_are_reported_once_in_order_of_completion(pools):
    swap = SynchronousSwap(*pools)
    swap.offload(Transfer(7, ids(0), ids(0)))
    swap.fetch(Transfer(3, ids(1), ids(1)))
    assert swap.take_completed() == [7, 3]
    assert swap.take_completed() == []
    swap.fetch(Transfer(4, ids(), ids()))
    assert swap.take_completed() == [4]


# --- the runtime over a swap manager whose transfers happen later (LaterSwap) ---


@pytest.mark.parametrize("seed", range(4))
def test_no_page_is_exposed_early_or_overwritten_and_no_spare_is_lost(seed):
    """World.step checks after every step: pages being written hold NaN and stand in no list,
    listed pages hold the prompt pages they should, and every page is accounted for."""
    rng = random.Random(seed)
    # 5 satellites need 5 * P host pages a request: not always are there enough
    world = World(
        mixed_assignment(), num_blocks=110, host_pages=300, seed=seed, swap_class=LaterSwap
    )
    names = iter(range(10**6))
    waited = 0
    for _ in range(60):
        alive = list(world.books)
        leaving = [r for r in alive if rng.random() < 0.08]
        staying = [r for r in alive if r not in leaving]
        pivots = len(world.runtime.clusters.pivots)
        scores = {
            r: world.random(pivots, world.books[r].prompt_tokens // 16).exp()
            for r in staying
            if r in world.runtime._requests and rng.random() < 0.8
        }
        waited += sum(bool(r.in_flight) for r in world.runtime._requests.values())
        prefill = {}
        if len(staying) < 4 and rng.random() < 0.5:
            prefill[f"request-{next(names)}"] = rng.randint(176, 300)
        world.step(prefill, staying, leaving, scores)
        tickets = world.swap.open_tickets
        rng.shuffle(tickets)
        world.swap.let_happen(t for t in tickets if rng.random() < 0.4)
    assert waited > 20 and world.runtime.counters.pages_fetched > 50
    assert world.refused and world.done
    while world.swap.open_tickets:
        world.swap.let_happen(world.swap.open_tickets)
        world.step(decode=list(world.books))
    world.step(gone=list(world.books))
    assert len(world.free) == world.num_blocks
    assert world.runtime.host_pool.num_free == world.host_pages


def later_world(*rows: str, leaders, num_tokens: int = 640, **options) -> World:
    world = World(assignment_of(*rows, leaders=leaders), swap_class=LaterSwap, options=options)
    world.step(prefill={"a": num_tokens})
    return world


def finish_offload(world: World, scores: torch.Tensor) -> None:
    world.swap.let_happen(list(world.swap.offloads))
    world.step(decode=["a"], scores={"a": scores})


PAIR = {"leaders": {(0, 1): (0, 0)}}


def test_dense_blocks_are_answered_for_only_when_the_host_copy_is_complete():
    world = later_world("PS", **PAIR)
    scores = world.compacted("a").scores.clone()
    world.step(decode=["a"], scores={"a": scores})
    assert world.done == []
    world.swap.let_happen(list(world.swap.offloads))
    assert world.done == []
    world.step(decode=["a"], scores={"a": scores})
    assert world.done == ["a"]


def test_nothing_is_fetched_before_the_host_copy_is_complete():
    world = later_world("PS", **PAIR)
    rising = torch.arange(40.0)[None]
    for scores in (rising, -rising, rising):
        world.step(decode=["a"], scores={"a": scores})
        assert not world.swap.fetches
    finish_offload(world, rising)
    world.step(decode=["a"], scores={"a": rising})
    assert world.swap.fetches


def test_fetched_pages_are_read_from_the_step_after_their_transfer_on():
    world = later_world("PS", **PAIR)
    finish_offload(world, world.compacted("a").scores.clone())
    before = world.resident("a", 0, 1)
    rising = torch.arange(40.0)[None]
    for _ in range(3):
        world.step(decode=["a"], scores={"a": rising})
        assert world.resident("a", 0, 1) == before
    (fetch,) = world.swap.fetches.values()
    world.swap.let_happen(list(world.swap.fetches))
    assert world.resident("a", 0, 1) == before  # complete, but no step boundary yet
    world.step(decode=["a"], scores={"a": rising})
    assert len(set(world.resident("a", 0, 1)) - set(before)) == fetch.gpu_pages.numel()


def test_a_plan_larger_than_the_spares_goes_in_waves_most_wanted_first():
    leaders = {(0, 1): (0, 0), (0, 2): (0, 0), (1, 1): (1, 0), (1, 2): (1, 0)}
    world = later_world("PSS", "PSS", leaders=leaders)
    finish_offload(world, world.compacted("a").scores.clone())
    satellites = sorted(leaders)
    scores = world.random(2, 40).exp()
    held = {s: set(world.resident("a", *s)) for s in satellites}
    missing = {}
    for satellite, pages in held.items():
        of_pivot = scores[satellite[0]].tolist()
        lacking = slow_select(of_pivot, len(pages), sinks=1, recent=3) - pages
        missing[satellite] = sorted(lacking, key=lambda page: -of_pivot[page])
    num_spares = world.compacted("a").idle_spares.numel()
    assert len(satellites) < num_spares < sum(map(len, missing.values()))
    waves = 0
    while True:
        world.step(decode=["a"], scores={"a": scores})
        if not world.swap.fetches:
            break
        assert sum(t.gpu_pages.numel() for t in world.swap.fetches.values()) <= num_spares
        world.swap.let_happen(list(world.swap.fetches))
        waves += 1
        if waves == 1:
            world.step(decode=["a"], scores={"a": scores})
            for satellite in satellites:
                arrived = set(world.resident("a", *satellite)) - held[satellite]
                share = num_spares // len(satellites)
                best = missing[satellite]
                assert set(best[:share]) <= arrived <= set(best[: share + 1])
    assert waves == -(-sum(map(len, missing.values())) // num_spares)
    for satellite in satellites:
        assert set(missing[satellite]) <= set(world.resident("a", *satellite))


def test_no_pivot_is_forgotten_when_pivots_drift_one_after_the_other_during_the_host_copy():
    leaders = {(0, 1): (0, 0), (1, 1): (1, 0)}
    world = later_world("PS", "PS", leaders=leaders, sink_pages=0, recent_pages=0)
    scores = world.compacted("a").scores.clone()
    for pivot in (0, 1):
        scores[pivot] = torch.arange(40.0)
        world.step(decode=["a"], scores={"a": scores.clone()})
    finish_offload(world, scores)
    for _ in range(40):
        world.step(decode=["a"], scores={"a": scores.clone()})
        world.swap.let_happen(list(world.swap.fetches))
    for satellite in leaders:
        held = world.resident("a", *satellite)
        assert sorted(held) == list(range(40 - len(held), 40))


def test_drift_is_not_checked_again_while_pages_are_under_way():
    world = later_world("PS", **PAIR)
    finish_offload(world, world.compacted("a").scores.clone())
    rising = torch.arange(40.0)[None]
    world.step(decode=["a"], scores={"a": rising})
    checks = world.runtime.counters.drift_checks
    for scores in (-rising, rising):
        world.step(decode=["a"], scores={"a": scores})
    assert world.runtime.counters.drift_checks == checks


@pytest.mark.parametrize("under_way", ["offload", "fetch"])
def test_pages_of_a_request_that_leaves_are_free_of_transfers_when_others_get_them(under_way):
    world = later_world("PS", **PAIR)
    if under_way == "fetch":
        finish_offload(world, world.compacted("a").scores.clone())
        world.step(decode=["a"], scores={"a": torch.arange(40.0)[None]})
    old = world.swap.open_tickets
    assert old
    world.step(gone=["a"])
    assert not set(old) & set(world.swap.open_tickets)
    assert len(world.free) == world.num_blocks
