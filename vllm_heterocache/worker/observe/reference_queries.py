"""Worker side: queries of a prompt that its matched tokens are fitted to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_heterocache.worker.requests import References

if TYPE_CHECKING:
    from vllm_heterocache.worker.ops.interface import Geometry

# Last tokens of a prompt whose queries are kept, and of those that cannot be moved.
MAX_POSITIONS, UNMOVED_POSITIONS = 128, 64
MOST_BYTES = 256 << 20  # of the queries of all prompts, but for one prompt that needs more


def reference_positions(geometry: Geometry) -> int:
    """Tokens of all prompts whose queries are kept at a time."""
    return max(MAX_POSITIONS, MOST_BYTES // reference_bytes(geometry, 1))


def reference_bytes(geometry: Geometry, num_positions: int) -> int:
    """Memory for the queries of so many tokens."""
    return num_positions * math.prod(geometry.query_shape) * geometry.dtype.itemsize


class _Kept(NamedTuple):
    """Tokens of a step whose queries are kept."""

    queries: torch.Tensor  # [n, L, num_q_heads, head_dim], where they go
    first_token: int  # of the batch


@dataclass(eq=False)
class _Prompt:
    queries: torch.Tensor  # [n, L, num_q_heads, head_dim], of the prompt's last n tokens
    filled: int = 0  # of them, from the first one on


class ReferenceQueries:
    """Keeps the last queries of each prompt that will be compacted.

    Queries of tokens that come from the prefix cache are not seen, nor those of rows that the
    decode kernel serves (the shortest chunks). All prompts together have room for
    `reference_positions`, so that many prompts at a time get fewer each.
    """

    def __init__(self, geometry: Geometry, device: torch.device, can_move: bool) -> None:
        """
        Args:
            can_move: whether queries can be moved behind the prompt.
        """
        self._shape, self._dtype, self._device = geometry.query_shape, geometry.dtype, device
        self._wanted = MAX_POSITIONS if can_move else UNMOVED_POSITIONS
        self._room = reference_positions(geometry)
        self._prompts: dict[str, _Prompt] = {}
        self._kept: list[_Kept] = []

    def begin_batch(self) -> None:
        """A step's rows follow, as often as they are described."""
        self._kept = []

    def begin_row(
        self, request_id: str, num_prompt: int, num_new: int, num_tokens: int, last_token: int
    ) -> None:
        """Note a prefill row of the step.

        Args:
            num_prompt: T, tokens of the prompt.
            num_new: queries of the row.
            num_tokens: tokens of the request, the new ones included.
            last_token: the row's last token in the batch.
        """
        first, end = num_tokens - num_new, min(num_tokens, num_prompt)
        if end <= num_prompt - self._wanted:
            return
        prompt = self._prompts.get(request_id)
        if prompt is None:
            prompt = self._prompts[request_id] = self._make(num_prompt - first)
        count = prompt.queries.shape[0]
        begin = max(first, num_prompt - count)
        if begin < end:
            places = slice(begin - num_prompt + count, end - num_prompt + count)
            token = last_token + 1 - num_tokens + begin
            self._kept.append(_Kept(prompt.queries[places], token))
            prompt.filled = places.stop

    def _make(self, num_left: int) -> _Prompt:
        """For a prompt of which so many tokens are yet to be computed."""
        count = min(self._wanted, num_left, self._room)
        self._room -= count
        queries = torch.empty(count, *self._shape, dtype=self._dtype, device=self._device)
        return _Prompt(queries)

    def observe(self, layer: int, query: torch.Tensor) -> None:
        """Behind one layer's attention of the prefill rows.

        Args:
            query: [num_tokens, num_q_heads, head_dim] of the batch.
        """
        for queries, first in self._kept:
            queries[:, layer] = query[first : first + queries.shape[0]]

    def of(self, request_id: str) -> References | None:
        """None where none was kept."""
        prompt = self._prompts.get(request_id)
        if prompt is None or not prompt.filled:
            return None
        return References(prompt.queries[: prompt.filled], behind=prompt.queries.shape[0])

    def forget(self, request_id: str) -> None:
        """The prompt is compacted, stays dense or has left."""
        prompt = self._prompts.pop(request_id, None)
        if prompt is not None:
            self._room += prompt.queries.shape[0]
