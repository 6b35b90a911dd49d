"""Launches that are made again and again with the same arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton_mode  # noqa: F401  before anything that defines kernels

# isort: split
from kernel_checks import check_kept_launches
from triton.runtime.jit import JITFunction

from vllm_heterocache.kernels import kept_launch
from vllm_heterocache.kernels.kept_launch import KeptLaunch


def test_checks_and_their_retrievals_are_those_of_the_references_each_time():
    assert check_kept_launches() == 0


class Compiled:
    """A compiled kernel that notes its launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *values: self.launches.append((grid, *values))


def kernel(first, second, third, BLOCK, WIDE):
    """What Triton would compile."""


@pytest.fixture
def compiled(monkeypatch) -> Compiled:
    """What each launch by Triton itself finds; `kernel.launches` are the grids of those."""
    one = Compiled()

    def run(self, *arguments, grid, warmup, **options):
        one.launches.append(("by Triton", grid, arguments, options))
        return one

    monkeypatch.setattr(JITFunction, "run", run)
    return one


def test_later_launches_hand_over_all_values_in_the_order_of_the_kernel(compiled, monkeypatch):
    monkeypatch.setattr(kept_launch, "_address", lambda a: 77 if torch.is_tensor(a) else a)
    tensor = torch.zeros(3)
    launch = KeptLaunch(JITFunction(kernel), tensor, 5, tensor, num_warps=4, WIDE=True, BLOCK=64)
    launch(3, 2)
    launch(9)
    launch(7, 1, 2)
    (_, grid, arguments, options), *later = compiled.launches
    assert grid == (3, 2) and options == {"num_warps": 4, "WIDE": True, "BLOCK": 64}
    assert arguments[0] is arguments[2] is tensor and arguments[1] == 5
    values = 77, 5, 77, 64, True
    assert later == [((9, 1, 1), *values), ((7, 1, 2), *values)]


def test_a_tensor_on_the_host_is_handed_over_as_it_is(compiled):
    tensor = torch.zeros(3)
    launch = KeptLaunch(JITFunction(kernel), tensor, 5, 6, num_warps=4, BLOCK=64, WIDE=True)
    launch(1)
    launch(1)
    assert compiled.launches[1][1] is tensor


@pytest.mark.parametrize("grid", [(0,), (3, 0), (0, 4)], ids=str)
def test_no_programs_are_no_launch(compiled, grid):
    launch = KeptLaunch(JITFunction(kernel), 1, 2, 3, num_warps=4, BLOCK=64, WIDE=True)
    launch(*grid)
    launch(1)
    launch(*grid)
    assert [one[1] for one in compiled.launches] == [(1,)]
