"""Drift by chance: a share of a worker's drift checks triggers, whatever the attention.

Benchmarks and tests need retrievals at a known rate, which no attention has.

A test calls `force_triggers(worker.heterocache, share)`. An engine is started with
`worker_extension_cls=EXTENSION`; then `llm.collective_rpc("force_triggers", args=(share,))` reaches
its worker processes, as long as the folder above this one is in the Python path of the process
that starts it.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from vllm_heterocache.kernels.values import DriftCounter, DriftRule
from vllm_heterocache.worker.ops.interface import Ops

EXTENSION = "common.forced_triggers.WorkerExtension"
BITS = 24  # of the random numbers
NEVER = -1.0  # no overlap, corrected for chance, is lower


class ForcedTriggers:
    """An operation `check_drift` (ops.Ops) in which chance decides."""

    def __init__(self, ops: Ops, share: float) -> None:
        self.share = share
        self._ops, self._check_drift = ops, ops.check_drift
        self._bound = math.ceil(share * (1 << BITS))
        self._num_checks = 0

    def __call__(
        self,
        table_slots: torch.Tensor,
        waves_left: torch.Tensor,
        rule: DriftRule,
        max_pages: int,
    ) -> None:
        """As `Ops.check_drift`; nothing waits for the device."""
        self._num_checks += 1
        self._check_drift(table_slots, waves_left, rule._replace(threshold=NEVER), max_pages)
        num_pivots = waves_left.shape[1]
        bits = random_bits(self._num_checks, table_slots.numel(), num_pivots, waves_left.device)
        is_hit = bits < self._bound
        is_hit &= (table_slots >= 0)[:, None]
        # slot -1 is the dense slot, which keeps the 0 that it has
        slots = table_slots.long()
        waves_left[slots] = torch.where(is_hit, rule.waves, waves_left[slots])
        self._ops.memory.counters[DriftCounter.TRIGGERS].add_(is_hit.sum())


def random_bits(
    seed: int, num_rows: int, num_pivots: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """[num_rows, num_pivots] int64 below 2**BITS: a hash of (seed, row, pivot), equal on every
    device."""
    rows = torch.arange(num_rows, device=device)[:, None]
    pivots = torch.arange(num_pivots, device=device)
    return _mix(_mix(rows ^ (seed & 0x7FFFFFFF)) ^ pivots) >> (32 - BITS)


def _mix(state: torch.Tensor) -> torch.Tensor:
    """32 bits in an int64."""
    for _ in range(2):
        state = ((state ^ (state >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return state ^ (state >> 16)


def force_triggers(runtime: Any, share: float | None) -> None:
    """Let this share of a worker's drift checks trigger, from the next one on.

    Args:
        runtime: the worker's HeteroCacheRuntime, whose pool is bound.
        share: 0 to 1; None: attention decides again.

    Raises:
        ValueError: for another share, or where the worker checks nothing: finders look in every
            step, whatever their attention was.
    """
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"share={share!r} is refused: it is a share of the checks; choose 0 to 1.")
    if share is not None and not runtime.retriever.rule.threshold:
        raise ValueError(
            f"share={share!r} is refused: with drift_threshold=0 there are no checks; choose a "
            "drift_threshold above 0."
        )
    if share is not None and runtime.ops.memory.finders is not None:
        raise ValueError(
            f"share={share!r} is refused: finders look in every step, and no drift is checked; "
            "choose finder_share=0."
        )
    vars(runtime.ops).pop("check_drift", None)
    if share is not None:
        runtime.ops.check_drift = ForcedTriggers(runtime.ops, share)


class WorkerExtension:
    """What an engine's workers get from `worker_extension_cls=EXTENSION`."""

    def force_triggers(self, share: float | None) -> None:
        force_triggers(self.heterocache, share)  # type: ignore[attr-defined]
