"""Worker side: queries of a prompt that its matched tokens are fitted to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_heterocache.heads.matched_tokens import REFERENCE_POSITIONS
from vllm_heterocache.worker.requests import References

if TYPE_CHECKING:
    from vllm_heterocache.worker.ops.interface import Geometry

UNMOVED_POSITIONS = 64  # last tokens of a prompt whose queries are kept, if they cannot be moved
MOST_BYTES = 256 << 20  # of the queries of all prompts, but for one prompt that needs more


def reference_positions(geometry: Geometry) -> int:
    """Tokens of all prompts whose queries are kept at a time."""
    return max(REFERENCE_POSITIONS, MOST_BYTES // reference_bytes(geometry, 1))


def reference_bytes(geometry: Geometry, num_positions: int) -> int:
    """Memory for the queries of so many tokens."""
    return num_positions * math.prod(geometry.query_shape) * geometry.dtype.itemsize


class _Kept(NamedTuple):
    """Tokens of a step whose queries are kept."""

    queries: torch.Tensor  # [n, L, num_q_heads, head_dim], where they go
    first_token: int  # of the batch


@dataclass(eq=False)
class _Prompt:
    wanted: int  # queries, as many as there would be with room for all
    queries: torch.Tensor  # [n, L, num_q_heads, head_dim], of the prompt's last n tokens
    filled: range = range(0)  # of them

    def fill(self, places: slice) -> None:
        """A row fills some places. Where the decode kernel served the rows between, the longer part
        counts."""
        if places.start <= self.filled.stop:
            self.filled = range(self.filled.start, places.stop)
        elif self.queries.shape[0] - places.start > len(self.filled):
            self.filled = range(places.start, places.stop)


class ReferenceQueries:
    """Keeps the last queries of each prompt that will be compacted.

    Queries of tokens that come from the prefix cache are not seen, nor those of rows that the
    decode kernel serves (the shortest chunks). All prompts together have room for
    `reference_positions`. A prompt takes room with the step that computes the first of the tokens,
    and leaves the room once the prompt is compacted or gone. A prompt that finds too little room
    keeps the queries of fewer tokens at its end, or none.
    """

    def __init__(self, geometry: Geometry, device: torch.device, can_move: bool) -> None:
        """
        Args:
            can_move: whether queries can be moved behind the prompt.
        """
        self._shape, self._dtype, self._device = geometry.query_shape, geometry.dtype, device
        self._wanted = REFERENCE_POSITIONS if can_move else UNMOVED_POSITIONS
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
        if request_id not in self._prompts or not self._prompts[request_id].filled:
            self._take_room(request_id, num_prompt - first)
        prompt = self._prompts[request_id]
        count = prompt.queries.shape[0]
        begin = max(first, num_prompt - count)
        if begin < end:
            places = slice(begin - num_prompt + count, end - num_prompt + count)
            token = last_token + 1 - num_tokens + begin
            self._kept.append(_Kept(prompt.queries[places], token))
            prompt.fill(places)

    def _take_room(self, request_id: str, num_left: int) -> None:
        """For a prompt of which so many tokens are yet to be computed.

        Until the first query is kept, the prompt may take what others have left meanwhile.
        """
        earlier = self._prompts.get(request_id)
        wanted = min(self._wanted, num_left) if earlier is None else earlier.wanted
        del earlier  # and its memory, before there is more
        self.forget(request_id)
        count = min(wanted, num_left, self._room)
        self._room -= count
        queries = torch.empty(count, *self._shape, dtype=self._dtype, device=self._device)
        self._prompts[request_id] = _Prompt(wanted, queries)

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
        first, end = prompt.filled.start, prompt.filled.stop
        return References(prompt.queries[first:end], behind=prompt.queries.shape[0] - first)

    def num_without_room(self, request_id: str) -> int:
        """Queries of a prompt that are not kept because other prompts had the room."""
        prompt = self._prompts.get(request_id)
        return 0 if prompt is None else prompt.wanted - prompt.queries.shape[0]

    def forget(self, request_id: str) -> None:
        """The prompt is compacted, stays dense or has left."""
        prompt = self._prompts.pop(request_id, None)
        if prompt is not None:
            self._room += prompt.queries.shape[0]
