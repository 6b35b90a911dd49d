"""Problems for the tests of `bounded_least_squares`."""

from __future__ import annotations

import torch


def make_least_squares(generator, num_problems, num_rows, num_columns):
    """Columns, target, start, bounds and step, fp32 on the CPU."""
    columns = torch.rand(num_problems, num_rows, num_columns, generator=generator)
    target = columns[..., ::3].sum(2) + torch.randn(num_problems, num_rows, generator=generator)
    least = torch.full((num_problems, num_columns), 0.05)
    most = torch.full((num_problems, num_columns), 0.9)
    start = torch.rand(num_problems, num_columns, generator=generator).clamp(0.05, 0.9)
    step = 1 / torch.linalg.matrix_norm(columns, 2).square()
    return columns, target, start, least, most, step
