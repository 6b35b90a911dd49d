"""RoPE as a world knows it, and the same by the sines of each angle."""

from __future__ import annotations

import math

import torch

from vllm_heterocache.compat.engine import Rotation

SPEEDS = torch.tensor([1.0, 0.3, 0.02])
ANGLES = torch.arange(2000)[:, None] * SPEEDS
# of six of eight elements, with the factor that some scalings of RoPE multiply queries by
ROTATION = Rotation(1.3 * torch.cat((ANGLES.cos(), ANGLES.sin()), dim=1), 6, True)


def turned(query: torch.Tensor, tokens: int) -> torch.Tensor:
    """A query [..., 8] as if it were asked so many tokens later."""
    result = query.clone()
    for i, angle in enumerate((tokens * SPEEDS).tolist()):
        x, y = query[..., i], query[..., i + 3]
        result[..., i] = x * math.cos(angle) - y * math.sin(angle)
        result[..., i + 3] = y * math.cos(angle) + x * math.sin(angle)
    return result
