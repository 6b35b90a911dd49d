"""Least squares between bounds, in plain torch (kernel: bounded_least_squares.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch


def bounded_least_squares_ref(
    columns: torch.Tensor,
    target: torch.Tensor,
    start: torch.Tensor,
    least: torch.Tensor,
    most: torch.Tensor,
    step: torch.Tensor,
    ridge: float,
    iterations: int,
) -> torch.Tensor:
    """[B, m] in the dtype of `start`: lowers |columns @ w - target|^2 + ridge * |w|^2.

    Args:
        columns: [B, N, m].
        target: [B, N], what the weighted columns are to add up to.
        start: [B, m], between the bounds.
        least, most: [B, m], bounds of the solution.
        step: [B], at most 1 / (the largest eigenvalue of the columns' products + ridge).
        ridge: what the squared solution costs.
        iterations: steps, the same for all problems.
    """

    def slope(solution: torch.Tensor) -> torch.Tensor:
        error = columns @ solution[..., None] - target[..., None]
        return (columns.mT @ error)[..., 0] + ridge * solution

    return bounded_descent_ref(slope, start, least, most, step, iterations)


def bounded_descent_ref(
    slope: Callable[[torch.Tensor], torch.Tensor],
    start: torch.Tensor,
    least: torch.Tensor,
    most: torch.Tensor,
    step: torch.Tensor,
    iterations: int,
) -> torch.Tensor:
    """[B, m]: accelerated projected gradient (FISTA, Beck and Teboulle 2009), with the restart of
    O'Donoghue and Candes (2015): a problem whose momentum points uphill starts its momentum anew.

    Args:
        slope: [B, m] half the gradient at [B, m]. Whoever has the columns' products needs no more.
        start, least, most, step, iterations: as of `bounded_least_squares_ref`.
    """
    solution, ahead, momentum = start, start, torch.ones_like(step)[:, None]
    for _ in range(iterations):
        moved = torch.clamp(ahead - step[:, None] * slope(ahead), least, most)
        is_uphill = ((ahead - moved) * (moved - solution)).sum(1, keepdim=True) > 0
        momentum = momentum.masked_fill(is_uphill, 1)
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        rate = ((momentum - 1) / following).masked_fill(is_uphill, 0)
        ahead = moved + rate * (moved - solution)
        solution, momentum = moved, following
    return solution
