"""Worker side: queries of a prompt's tokens, as if they were asked behind the prompt.

A query at its own place says what its token looked for among the tokens before. Decode asks from
behind the prompt. RoPE makes logits depend on distances, so a query that is not moved weighs the
prompt by wrong distances: matched tokens that are fitted to such queries are worse than none
(docs/quality.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_heterocache.compat.engine import Rotation
    from vllm_heterocache.worker.requests import References

# (layer, queries [n, num_q_heads, head_dim], distances [n] int64) -> the moved ones, fp32
MoveQueries = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
SPREAD = 64  # moved queries are spread evenly over so many places behind the prompt
# Multiples of it, modulo 1, are spread evenly whatever their number.
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def query_mover(rotations: Sequence[Rotation | None]) -> MoveQueries:
    """A function that moves queries on by some tokens.

    Args:
        rotations: of each layer; None where queries are not rotated.
    """

    def move(layer: int, queries: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        rotation = rotations[layer]
        return queries.float() if rotation is None else rotate(rotation, queries, distances)

    return move


def rotate(rotation: Rotation, queries: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """[n, num_q_heads, head_dim] fp32, queries after RoPE, each rotated by `distances` more."""
    last = rotation.cos_sin.shape[0] - 1
    # some scalings of RoPE multiply queries by a factor, which the queries have already
    factor = rotation.cos_sin[0, 0].float()
    cos, sin = (rotation.cos_sin[distances.clamp(max=last)].float() / factor).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned, rest = queries.float().split([rotation.size, queries.shape[-1] - rotation.size], dim=-1)
    pairs = turned.unflatten(-1, (2, -1) if rotation.is_neox else (-1, 2))
    axis = -2 if rotation.is_neox else -1
    x, y = pairs.unbind(axis)
    turned = torch.stack((x * cos - y * sin, y * cos + x * sin), dim=axis).flatten(-2)
    return torch.cat((turned, rest), dim=-1)


def distances_behind(references: References) -> torch.Tensor:
    """[n] int64: how far the queries are moved, to places right behind the prompt."""
    i = torch.arange(references.queries.shape[0], device=references.queries.device)
    # in float64, as neighbours are to be far apart on every device alike
    places = (i.double() * GOLDEN_RATIO % 1 * SPREAD).long()
    return references.behind - i + places
