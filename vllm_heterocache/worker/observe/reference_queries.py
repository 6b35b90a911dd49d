"""Worker side: queries of a prompt that its matched tokens are fitted to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_heterocache.worker.requests import References

if TYPE_CHECKING:
    from vllm_heterocache.worker.ops.interface import Geometry

MAX_POSITIONS = 128  # most tokens of a prompt whose queries are kept
LEAST_STRIDE = 8  # at most one token of so many
LAST_TOKENS = 64  # of queries that cannot be moved, those of so many last tokens are kept
MOST_BYTES = 256 << 20  # of the queries of all prompts, but for one prompt that needs more


def reference_positions(geometry: Geometry) -> int:
    """Tokens of all prompts whose queries are kept at a time."""
    return max(MAX_POSITIONS, MOST_BYTES // reference_bytes(geometry, 1))


def reference_bytes(geometry: Geometry, num_positions: int) -> int:
    """Memory for the queries of so many tokens."""
    return num_positions * math.prod(geometry.query_shape) * geometry.dtype.itemsize


class _Sample(NamedTuple):
    """Tokens of a step whose queries are kept."""

    queries: torch.Tensor  # [n, L, Hq, D], where they go, the last token first
    first_token: int  # of the batch
    end_token: int
    stride: int


@dataclass(eq=False)
class _Prompt:
    num_tokens: int  # T
    stride: int
    queries: torch.Tensor  # [n, L, Hq, D], from the prompt's last token on backwards
    first: int  # of the places that are filled, which are those from there on


class ReferenceQueries:
    """Keeps some queries of each prompt that will be compacted.

    Queries that can be moved behind the prompt are kept at even distances, else the last ones.
    Tokens T - 1 - i * stride are kept, back to the first one that is computed here: queries of a
    prefix that comes from the cache are not seen. All prompts together have room for
    `reference_positions`, so that many prompts at a time get fewer each.

    Rows that the decode kernel serves (the shortest chunks) are left out.
    """

    def __init__(self, geometry: Geometry, device: torch.device, can_move: bool) -> None:
        self._can_move = can_move
        self._shape, self._dtype, self._device = geometry.query_shape, geometry.dtype, device
        self._room = reference_positions(geometry)
        self._prompts: dict[str, _Prompt] = {}
        self._samples: list[_Sample] = []

    def begin_batch(self) -> None:
        """A step's rows follow, as often as they are described."""
        self._samples = []

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
        prompt = self._prompts.get(request_id)
        if prompt is None:
            prompt = self._prompts[request_id] = self._make(num_prompt, num_prompt - first)
        if prompt.stride == 0:
            return
        # i of tokens T - 1 - i * stride in [first, end)
        begin = -(-(num_prompt - end) // prompt.stride)
        stop = min((num_prompt - 1 - first) // prompt.stride + 1, prompt.queries.shape[0])
        if begin >= stop:
            return
        token = last_token + 1 - num_tokens  # of the batch, of the prompt's token 0
        oldest, latest = (num_prompt - 1 - i * prompt.stride for i in (stop - 1, begin))
        queries = prompt.queries[begin:stop]
        prompt.first = begin
        self._samples.append(_Sample(queries, token + oldest, token + latest + 1, prompt.stride))

    def _make(self, num_prompt: int, num_computed: int) -> _Prompt:
        wanted = min(MAX_POSITIONS, -(-num_computed // LEAST_STRIDE), self._room)
        if not self._can_move:
            wanted = min(LAST_TOKENS, num_computed, self._room)
        if wanted == 0:
            return _Prompt(num_prompt, 0, torch.empty(0, *self._shape), 0)
        stride = -(-num_computed // wanted) if self._can_move else 1
        count = min((num_computed - 1) // stride + 1, wanted)
        self._room -= count
        queries = torch.empty(count, *self._shape, dtype=self._dtype, device=self._device)
        return _Prompt(num_prompt, stride, queries, count)

    def observe(self, layer: int, query: torch.Tensor) -> None:
        """Behind one layer's attention of the prefill rows.

        Args:
            query: [num_tokens, num_q_heads, head_dim] of the batch.
        """
        for sample in self._samples:
            tokens = query[sample.first_token : sample.end_token : sample.stride]
            sample.queries[:, layer] = tokens.flip(0)

    def of(self, request_id: str) -> References | None:
        """None where none was kept."""
        prompt = self._prompts.get(request_id)
        if prompt is None or prompt.first == prompt.queries.shape[0]:
            return None
        return References(prompt.queries[prompt.first :], prompt.stride, prompt.first)

    def forget(self, request_id: str) -> None:
        """The prompt is compacted, stays dense or has left."""
        prompt = self._prompts.pop(request_id, None)
        if prompt is not None:
            self._room += prompt.queries.shape[0]
