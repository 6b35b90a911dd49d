"""Least squares between bounds (specification: bounded_least_squares_ref.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ELEMENTS, MOST_ROWS = 32768, 64  # of a tile
NUM_WARPS = 8
MOST_COLUMNS = 8192  # a program holds tiles of whole rows


def bounded_least_squares(
    columns: torch.Tensor,
    target: torch.Tensor,
    start: torch.Tensor,
    least: torch.Tensor,
    most: torch.Tensor,
    step: torch.Tensor,
    ridge: float,
    iterations: int,
) -> torch.Tensor:
    """One launch for all iterations, a program a problem; each iteration reads the columns once.

    Args:
        columns: [B, N, m] fp32, contiguous, m <= MOST_COLUMNS; the others are fp32 and contiguous
            too.
    """
    num_problems, num_rows, num_columns = columns.shape
    tensors = columns, target, start, least, most, step
    assert all(one.is_contiguous() and one.dtype == torch.float32 for one in tensors)
    assert num_columns <= MOST_COLUMNS
    width = max(16, triton.next_power_of_2(num_columns))
    solution = torch.empty_like(start)
    _bounded_least_squares_kernel[(num_problems,)](
        *tensors,
        solution,
        ridge,
        iterations,
        num_rows,
        num_columns,
        ROWS=min(MOST_ROWS, ELEMENTS // width),
        COLUMNS=width,
        num_warps=NUM_WARPS,
    )
    return solution


@triton.jit(do_not_specialize=["iterations", "num_rows", "num_columns"])
def _bounded_least_squares_kernel(
    columns,
    target,
    start,
    least,
    most,
    step,
    solution,
    ridge,
    iterations,
    num_rows,
    num_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program i: problem i."""
    i_problem = tl.program_id(0).to(tl.int64)
    o_column = tl.arange(0, COLUMNS)
    is_column = o_column < num_columns
    o_solution = i_problem * num_columns + o_column
    b_solution = tl.load(start + o_solution, mask=is_column, other=0.0)
    b_least = tl.load(least + o_solution, mask=is_column, other=0.0)
    b_most = tl.load(most + o_solution, mask=is_column, other=0.0)
    b_step = tl.load(step + i_problem)
    p_columns = columns + i_problem * num_rows * num_columns
    p_target = target + i_problem * num_rows
    b_ahead = b_solution
    momentum = 1.0
    for _ in range(0, iterations):
        b_slope = ridge * b_ahead
        for row in range(0, num_rows, ROWS):
            o_row = row + tl.arange(0, ROWS)
            is_row = o_row < num_rows
            o_tile = o_row[:, None].to(tl.int64) * num_columns + o_column[None, :]
            is_tile = is_row[:, None] & is_column[None, :]
            b_tile = tl.load(p_columns + o_tile, mask=is_tile, other=0.0)
            b_error = tl.sum(b_tile * b_ahead[None, :], 1)
            b_error -= tl.load(p_target + o_row, mask=is_row, other=0.0)
            b_slope += tl.sum(b_tile * b_error[:, None], 0)
        b_moved = tl.minimum(tl.maximum(b_ahead - b_step * b_slope, b_least), b_most)
        is_uphill = tl.sum((b_ahead - b_moved) * (b_moved - b_solution), 0) > 0
        momentum = tl.where(is_uphill, 1.0, momentum)
        following = (1 + tl.sqrt(1 + 4 * momentum * momentum)) / 2
        rate = tl.where(is_uphill, 0.0, (momentum - 1) / following)
        b_ahead = b_moved + rate * (b_moved - b_solution)
        b_solution = b_moved
        momentum = following
    tl.store(solution + o_solution, b_solution, mask=is_column)
