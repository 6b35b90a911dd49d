"""Least squares between bounds: the reference is optimal, the kernel takes its steps."""

from __future__ import annotations

import pytest
import torch
from triton_mode import DEVICE

# isort: split
from least_squares_case import make_least_squares

from vllm_heterocache.kernels.bounded_least_squares import bounded_least_squares
from vllm_heterocache.kernels.bounded_least_squares_ref import bounded_least_squares_ref


def make_problem(*arguments):
    return [one.to(DEVICE) for one in make_least_squares(*arguments)]


def test_the_reference_ends_where_no_bounded_change_is_better(generator):
    columns, target, start, least, most, step = make_problem(generator, 3, 40, 9)
    problem = [one.double() for one in (columns, target, start, least, most, step)]
    solution = bounded_least_squares_ref(*problem, 0.01, 3000)
    error = columns.double() @ solution[..., None] - target.double()[..., None]
    slope = (columns.double().mT @ error)[..., 0] + 0.01 * solution
    low, high = solution <= problem[3], solution >= problem[4]
    assert low.any() and high.any() and not (low | high).all()
    assert (slope[~low & ~high].abs() < 1e-6).all()
    assert (slope[low] > -1e-6).all() and (slope[high] < 1e-6).all()


@pytest.mark.parametrize(
    ("num_problems", "num_rows", "num_columns"), [(1, 1, 1), (3, 37, 21), (2, 130, 300)]
)
@pytest.mark.parametrize("iterations", [0, 1, 20])
def test_the_kernel_takes_the_steps_of_the_reference(
    generator, num_problems, num_rows, num_columns, iterations
):
    problem = make_problem(generator, num_problems, num_rows, num_columns)
    actual = bounded_least_squares(*problem, 0.01, iterations)
    expected = bounded_least_squares_ref(*problem, 0.01, iterations)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_rows_of_many_columns_make_small_tiles(generator):
    problem = make_problem(generator, 1, 5, 5000)
    actual = bounded_least_squares(*problem, 0.01, 3)
    expected = bounded_least_squares_ref(*problem, 0.01, 3)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
