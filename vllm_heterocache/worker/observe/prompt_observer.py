"""Worker side: what policies want to know of a prompt's queries, gathered while it is prefilled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.kernels.kv_scales import logit_scales
from vllm_heterocache.kernels.tables import layer_page_ids
from vllm_heterocache.policies.policy import ALL_QUERIES
from vllm_heterocache.worker.batch import KeptQueries
from vllm_heterocache.worker.observe.page_mass import add_page_masses

if TYPE_CHECKING:
    from vllm_heterocache.policies.policy import Policy
    from vllm_heterocache.worker.observe.reference_queries import ReferenceQueries
    from vllm_heterocache.worker.ops.interface import Geometry, Memory
    from vllm_heterocache.worker.requests import References


class _Chunk(NamedTuple):
    """Queries of a step whose masses are summed (`ALL_QUERIES`)."""

    masses: torch.Tensor  # [L, H, P] fp32
    blocks: torch.Tensor  # [at least the pages so far] int32
    first_position: int
    source: int  # first token of the batch; of a decode row, index among the last queries
    count: int  # type: ignore[assignment]  # hides tuple.count


@dataclass(eq=False)
class _Prompt:
    num_tokens: int  # T
    window: int | None = None  # reserved when the first query to keep comes along
    masses: torch.Tensor | None = None  # [L, H, P] fp32


def window_places(policy: Policy, max_queries: int) -> int:
    """W, last queries of a prompt that are kept. Where all queries are summed up, those of one
    decode row (at most `max_queries`) are kept until the step is over."""
    if policy.observed_queries == ALL_QUERIES:
        return max_queries
    return max(1, policy.observed_queries)


class PromptObserver:
    """Keeps the last W queries of each prompt that will be compacted, or sums all of them up.

    `last_queries` consists of `num_query_windows` windows of W places. A prompt of T tokens takes a
    window with the step that computes token T - W, and leaves the window once the prompt is
    compacted or gone. The query of token p stands at place W - T + p. A prompt that finds no
    window free is not observed.

    Queries in prefill rows are copied layer by layer, behind the layer's attention. Queries in
    decode rows (the shortest chunks) are stored by the decode kernel, also in a CUDA graph. Where
    masses are summed up, a query in a decode row needs a window too. A query that finds no window
    free is left out of the sum.
    """

    def __init__(
        self,
        geometry: Geometry,
        memory: Memory,
        sums_masses: bool,
        references: ReferenceQueries | None = None,
    ) -> None:
        """
        Args:
            references: keeps queries for matched tokens, if there are such.
        """
        self._geometry, self._memory, self._sums_masses = geometry, memory, sums_masses
        self._references = references
        self._num_kept = 1 if sums_masses else geometry.window
        self._free_windows = list(range(geometry.num_query_windows))[::-1]
        self._prompts: dict[str, _Prompt] = {}
        self._chunks: list[_Chunk] = []  # of this step's prefill rows
        self._decoded: list[_Chunk] = []  # of this step's decode rows

    def start(self, request_id: str, num_tokens: int) -> None:
        """A prompt of T tokens will be compacted; nothing happens where that is known."""
        if request_id not in self._prompts:
            masses = self._zero_masses(num_tokens) if self._sums_masses else None
            self._prompts[request_id] = _Prompt(num_tokens, masses=masses)

    def forget(self, request_id: str) -> None:
        """The prompt is compacted, stays dense or has left."""
        prompt = self._prompts.pop(request_id, None)
        if prompt is not None and prompt.window is not None:
            self._free_windows.append(prompt.window)
        if self._references is not None:
            self._references.forget(request_id)

    def begin_batch(self) -> None:
        """A step's rows follow, as often as they are described."""
        self._chunks, self._decoded = [], []
        if self._references is not None:
            self._references.begin_batch()

    def begin_row(
        self,
        request_id: str,
        num_new: int,
        num_tokens: int,
        last_token: int,
        is_decode: bool,
        blocks: torch.Tensor,
    ) -> KeptQueries | None:
        """Note a row of the step; return which of its queries are kept, None for none.

        Args:
            num_new: queries of the row.
            num_tokens: tokens of the request, the new ones included.
            last_token: the row's last token in the batch.
            is_decode: whether the decode kernel serves the row, and stores its query.
            blocks: [max_blocks] int32, the row of the block table.
        """
        prompt = self._prompts.get(request_id)
        if prompt is None:
            return None
        if self._references is not None and not is_decode:
            self._references.begin_row(
                request_id, prompt.num_tokens, num_new, num_tokens, last_token
            )
        first, end = num_tokens - num_new, min(num_tokens, prompt.num_tokens)
        if self._sums_masses and is_decode:
            first_kept = first  # until the step is over, and its mass is summed up
        else:
            first_kept = max(0, prompt.num_tokens - self._num_kept)
        kept = None
        if end > first_kept and self._has_window(prompt, first <= first_kept):
            begin = max(first, first_kept)
            token = last_token + 1 - (num_tokens - begin)
            kept = KeptQueries(token, end - begin, self._place(prompt, begin))
        if prompt.masses is not None:
            seen = blocks[: -(-num_tokens // PAGE_SIZE)]
            if not is_decode:
                token = last_token + 1 - num_new
                self._chunks.append(_Chunk(prompt.masses, seen, first, token, num_new))
            elif kept is not None:
                chunk = _Chunk(prompt.masses, seen.clone(), first, kept.index, kept.count)
                self._decoded.append(chunk)
        return kept

    def _has_window(self, prompt: _Prompt, may_reserve: bool) -> bool:
        """Whether the prompt has a window; it gets one only before its first query to keep."""
        if prompt.window is None and may_reserve and self._free_windows:
            prompt.window = self._free_windows.pop()
        return prompt.window is not None

    def _place(self, prompt: _Prompt, position: int) -> int:
        """Index of a prompt token's query among the last queries."""
        assert prompt.window is not None
        begin = prompt.window * self._geometry.window
        if self._num_kept == 1:
            return begin  # and behind it other queries of a decode row, if all are summed up
        return begin + self._geometry.window - prompt.num_tokens + position

    def masses(self, request_id: str) -> torch.Tensor | None:
        """[L, H, P] fp32, of all queries so far; None unless they are summed up."""
        prompt = self._prompts.get(request_id)
        return None if prompt is None else prompt.masses

    def references(self, request_id: str) -> References | None:
        """What matched tokens are fitted to; None where there is nothing."""
        return None if self._references is None else self._references.of(request_id)

    def num_references_without_room(self, request_id: str) -> int:
        """Queries that matched tokens are not fitted to because other prompts had the room."""
        return 0 if self._references is None else self._references.num_without_room(request_id)

    def observe(self, layer: int, query: torch.Tensor, kept: list[KeptQueries]) -> None:
        """Behind one layer's attention of the prefill rows.

        Args:
            query: [num_tokens, num_q_heads, head_dim] of the batch.
        """
        last_queries = self._memory.last_queries
        for first, count, index in kept:
            last_queries[index : index + count, layer] = query[first : first + count]
        if self._references is not None:
            self._references.observe(layer, query)
        for chunk in self._chunks:
            tokens = slice(chunk.source, chunk.source + chunk.count)
            self._add(chunk, layer, query[tokens])

    def finish_step(self) -> None:
        """Behind the forward pass: sum up what the decode kernel stored."""
        for chunk in self._decoded:
            queries = self._memory.last_queries[chunk.source : chunk.source + chunk.count]
            for layer in range(self._geometry.num_layers):
                self._add(chunk, layer, queries[:, layer])
        self._chunks, self._decoded = [], []

    def _add(self, chunk: _Chunk, layer: int, query: torch.Tensor) -> None:
        g = self._geometry
        ids = layer_page_ids(chunk.blocks, layer, g.num_layers, g.num_kv_heads)
        pages, scale = self._memory.pool, logit_scales(g.scale, self._memory.kv_scales, layer)
        sinks = self._memory.layer_sinks(layer)
        masses, first = chunk.masses[layer], chunk.first_position
        add_page_masses(masses, query, first, pages, ids, scale, sinks, g.soft_cap)

    def _zero_masses(self, num_tokens: int) -> torch.Tensor:
        g = self._geometry
        shape = (g.num_layers, g.num_kv_heads, num_tokens // PAGE_SIZE)
        return torch.zeros(shape, dtype=torch.float32, device=self._memory.pool.device)
