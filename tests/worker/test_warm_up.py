from __future__ import annotations

import pytest
import torch
from later_swap import LaterSwap
from world import PAGE, World, mixed_assignment

from common.forced_triggers import force_triggers
from vllm_heterocache.heads.recipes import all_full
from vllm_heterocache.worker.warm_up import warm_up


@pytest.fixture(autouse=True)
def no_device_to_wait_for(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)


def rehearsed(world: World) -> list[int]:
    """Full prompt pages of each compaction; the pool holds what vLLM allocated: zeros."""
    world.pool.zero_()
    world.runtime.ops.memory.last_queries.zero_()
    sizes = []
    select = world.runtime.ops.select

    def recorded(scores, *args):
        sizes.append(scores.shape[-1])
        return select(scores, *args)

    world.runtime.ops.select = recorded
    return sizes


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize(
    ("max_model_len", "pages"),
    [(256 * PAGE, [256]), (300 * PAGE + 5, [256, 300]), (1500 * PAGE, [256, 1024, 1500])],
)
def test_every_size_class_is_rehearsed_and_nothing_is_left_behind(max_model_len, pages, interval):
    sizes = {"num_blocks": 1100, "host_blocks": 1500, "compact_min_tokens": 176}
    world = World(mixed_assignment(), **sizes, options={"drift_interval": interval})
    force_triggers(world.runtime, 1.0)
    fresh = world.runtime.snapshot()
    prompt_pages = world.table.tensors.prompt_pages.clone()
    sizes, fetches = rehearsed(world), []
    fetch = world.swap.fetch
    world.swap.fetch = lambda *args: fetches.append(args) or fetch(*args)
    warm_up(world.runtime, max_model_len)
    assert sizes == pages and len(fetches) == len(pages) * (3 if interval == 1 else 2)
    assert world.runtime.snapshot() == fresh
    assert world.runtime.take_answers() == ([], [])
    assert torch.equal(world.table.tensors.prompt_pages, prompt_pages)
    assert bool((world.table.tensors.entries == -1).all())
    assert world.runtime.host_pool.num_free == 1500
    world.runtime.check_integrity()
    world.pool.fill_(torch.nan)
    world.step(prefill={"a": 373})
    world.step(decode=["a"])
    assert world.done == ["a"]


def test_fetches_of_the_rehearsal_are_not_counted_as_late():
    sizes = {"num_blocks": 1100, "host_blocks": 1500, "compact_min_tokens": 176}
    world = World(mixed_assignment(), **sizes, swap_class=LaterSwap)
    force_triggers(world.runtime, 1.0)
    rehearsed(world)
    warm_up(world.runtime, 256 * PAGE)
    assert world.swap.settled and world.counted("fetches_late") == 0


def test_lengths_that_are_never_compacted_are_left_out():
    world = World(
        mixed_assignment(), num_blocks=1100, host_blocks=1500, compact_min_tokens=1000 * PAGE
    )
    sizes = rehearsed(world)
    warm_up(world.runtime, 1500 * PAGE)
    assert sizes == [1024, 1500]
    sizes.clear()
    warm_up(world.runtime, 2000 * PAGE)  # 1400 blocks
    assert sizes == [1024]


@pytest.mark.parametrize("option", [{}, {"drift_threshold": 0}], ids=str)
def test_a_worker_without_retrieval_is_rehearsed_too(option):
    assignment = mixed_assignment() if option else all_full(3, 3)
    sizes = {"num_blocks": 320, "host_blocks": 0, "compact_min_tokens": 176}
    world = World(assignment, gpu_budget=1.0, **sizes, options=option)
    sizes = rehearsed(world)
    warm_up(world.runtime, 300 * PAGE)
    assert sizes == [256, 300]
    world.runtime.check_integrity()
