"""Which launches the operations of CUDA keep; what one does is in test_kept_launch.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_mode  # noqa: F401  before anything that defines kernels

# isort: split
from world import World, mixed_assignment

from vllm_heterocache.kernels.paged_decode import DecodeWorkspace
from vllm_heterocache.kernels.tables import Moves
from vllm_heterocache.kernels.values import DriftRule, Protected
from vllm_heterocache.worker.ops import triton_ops
from vllm_heterocache.worker.ops.interface import Geometry, Memory
from vllm_heterocache.worker.ops.triton_ops import TritonOps

CPU = torch.device("cpu")
RULE, PROTECTED = DriftRule(0.7, 4), Protected(1, 3)


def triton_operations(geometry: Geometry, memory: Memory) -> TritonOps:
    sizes = geometry.max_rows, geometry.num_layers, geometry.num_kv_heads, geometry.group
    workspace = DecodeWorkspace.allocate(*sizes, geometry.head_dim, CPU, num_programs=2)
    return TritonOps(geometry, memory, workspace)


class Launches:
    """Notes what is made and launched in place of kernels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[Any, ...]] = []
        self.launched: list[tuple[int, tuple[int, ...]]] = []  # which of those, with which sizes
        for name in ("drift_check_launch", "retrieval_moves_launches", "flip_pages_launch"):
            monkeypatch.setattr(triton_ops, name, self._make)

    def _make(self, *arguments: Any) -> Callable[..., None]:
        index = len(self.made)
        self.made.append(arguments)
        return lambda *sizes: self.launched.append((index, sizes))


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.fixture
def launches(monkeypatch) -> Launches:
    return Launches(monkeypatch)


@pytest.fixture
def ops() -> TritonOps:
    ops = World(mixed_assignment(), make_ops=triton_operations).runtime.ops
    assert isinstance(ops, TritonOps)
    return ops


def test_a_drift_check_is_launched_anew_for_other_rows_rules_and_size_classes(launches, ops):
    slots, waves = ints(8), ints(9, 2)
    ops.check_drift(slots[:3], waves, RULE, 100)
    ops.check_drift(slots[:5], waves, RULE, 256)  # more rows, of the same size class
    ops.check_drift(slots[:3], waves, RULE, 257)
    ops.check_drift(slots[:3], waves, RULE._replace(threshold=0.5), 100)
    ops.check_drift(ints(8), waves, RULE, 100)
    ops.check_drift(slots[:2], waves, RULE, 1)
    assert [index for index, _ in launches.launched] == [0, 0, 1, 2, 3, 0]
    assert [sizes for _, sizes in launches.launched] == [(n, 2) for n in (3, 5, 3, 3, 8, 2)]


def test_moves_are_listed_anew_for_other_moves_rows_and_size_classes(launches, ops):
    slots, waves, spares, rotations = ints(8), ints(9, 2), ints(8, 2), ints(8)
    moves, others = Moves.allocate(16, CPU), Moves.allocate(16, CPU)

    def list_moves(moves: Moves, num_rows: int, max_pages: int, slots=slots) -> None:
        ops.list_moves(
            slots[:num_rows], waves, spares[:num_rows], moves, PROTECTED, rotations[:num_rows],
            max_pages,
        )  # fmt: skip

    list_moves(moves, 3, 100)
    list_moves(moves, 5, 200)
    list_moves(others, 3, 100)
    list_moves(moves, 3, 5000)
    list_moves(moves, 3, 100, slots=ints(8))
    list_moves(moves, 1, 7)
    assert [index for index, _ in launches.launched] == [0, 0, 1, 2, 3, 0]
    assert [sizes for _, sizes in launches.launched] == [(n,) for n in (3, 5, 3, 3, 3, 1)]


def test_a_flip_is_launched_anew_for_other_moves_and_other_slots(launches, ops):
    moves, others, slots = Moves.allocate(16, CPU), Moves.allocate(16, CPU), ints(8)
    for moved, rows in ((moves, slots[:3]), (moves, ints(8)), (others, slots[:3]), (moves, slots)):
        ops.flip(moved, rows)
    assert [index for index, _ in launches.launched] == [0, 1, 2, 0]
