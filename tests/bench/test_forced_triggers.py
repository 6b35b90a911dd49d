"""Forced triggers: which drift checks trigger is decided by chance, and counted."""

from __future__ import annotations

import itertools

import pytest
import torch
from world import World, assignment_of, mixed_assignment

from common.forced_triggers import BITS, EXTENSION, ForcedTriggers, force_triggers, random_bits
from vllm_heterocache.kernels.values import DriftCounter, DriftRule

RULE = DriftRule(1.0, 4)


class FakeOps:
    """Ops whose attention drifts by itself, under every threshold that it can be under."""

    def __init__(self) -> None:
        self.memory = type("Memory", (), {"counters": torch.zeros(3, dtype=torch.int64)})
        self.rules: list[DriftRule] = []

    def check_drift(self, table_slots, waves_left, rule, max_pages) -> None:
        self.rules.append(rule)
        for slot in table_slots.tolist():
            if slot >= 0:
                waves_left[slot] = (waves_left[slot] - 1).clamp(min=0)


def forced_checks(share: float, num_checks: int = 200) -> torch.Tensor:
    """Slots 2 and 0 of 3, of 2 pivots, are checked; returns `waves_left` after each check."""
    ops = FakeOps()
    check = ForcedTriggers(ops, share)
    slots = torch.tensor([2, -1, 0, -1], dtype=torch.int32)
    seen = []
    waves_left = torch.zeros(4, 2, dtype=torch.int32)
    for _ in range(num_checks):
        before = int(ops.memory.counters[DriftCounter.TRIGGERS])
        check(slots, waves_left, RULE, 9)
        triggered = int(ops.memory.counters[DriftCounter.TRIGGERS]) - before
        assert triggered == int((waves_left == RULE.waves).sum())
        seen.append(waves_left.clone())
    assert all(rule == DriftRule(-1.0, 4) for rule in ops.rules), "attention never decides"
    return torch.stack(seen)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.1, 48, 112), (1.0, 800, 800)])
def test_a_share_of_the_clusters_of_live_rows_triggers(share, low, high):
    seen = forced_checks(share)
    hits = seen == RULE.waves
    assert low <= int(hits.sum()) <= high
    assert not seen[:, [1, 3]].any(), "other slots, and the dense slot"
    if share == 0.1:
        assert hits[:, [0, 2]].any(dim=0).all(), "each of them has its turn"


def test_what_is_not_hit_counts_down():
    seen = forced_checks(0.1)
    for before, after in itertools.pairwise(seen):
        counted = (before - 1).clamp(min=0)
        assert ((after == counted) | (after == RULE.waves)).all()


def test_the_choice_is_the_same_in_every_process_and_another_at_every_check():
    first, again, later = (random_bits(seed, 40, 50) for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert int(first.min()) >= 0 and int(first.max()) < 1 << BITS
    assert 0.45 < float((first < 1 << (BITS - 1)).double().mean()) < 0.55


def test_no_attention_is_under_the_threshold_that_never_triggers():
    world = World(mixed_assignment(), options={"drift_threshold": 1.0})
    force_triggers(world.runtime, 0.0)
    world.step(prefill={"a": 373})
    for _ in range(4):
        world.step(decode=["a"], queries={"a": 4 * world.random(3, 6, 8)})
    assert world.counted("drift_checks") and not world.counted("drift_triggers")
    force_triggers(world.runtime, None)
    world.step(decode=["a"], queries={"a": 4 * world.random(3, 6, 8)})
    assert world.counted("drift_triggers"), "attention decides again"


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_other_shares_are_refused(share):
    with pytest.raises(ValueError, match=f"share={share} is refused: .*choose 0 to 1"):
        force_triggers(World(mixed_assignment()).runtime, share)


def test_a_worker_that_checks_nothing_is_refused():
    world = World(assignment_of("PS", leaders={(0, 1): (0, 0)}), options={"drift_threshold": 0})
    with pytest.raises(ValueError, match="drift_threshold=0"):
        force_triggers(world.runtime, 0.5)


def test_finders_are_refused_for_nothing_of_them_is_checked():
    world = World(assignment_of("VF", leaders={(0, 1): (0, 1)}))
    with pytest.raises(ValueError, match=r"share=0\.5 is refused: finders .* finder_share=0"):
        force_triggers(world.runtime, 0.5)
    force_triggers(world.runtime, None)


@pytest.mark.cpu_worker
def test_workers_get_it_as_vllm_extends_them():
    """What vLLM does with --worker-extension-cls; it refuses names that a worker has already."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from vllm_heterocache.worker.cpu_worker import HeteroCacheCPUWorker

    class Worker(HeteroCacheCPUWorker):
        pass

    extension = resolve_obj_by_qualname(EXTENSION)
    names = [name for name in dir(extension) if not name.startswith("__")]
    assert names == ["force_triggers"] and not hasattr(Worker, "force_triggers")
    Worker.__bases__ += (extension,)
    worker = Worker.__new__(Worker)
    worker.heterocache = World(mixed_assignment()).runtime
    worker.force_triggers(0.25)
    assert worker.heterocache.ops.check_drift.share == 0.25
