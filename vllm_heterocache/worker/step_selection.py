"""Worker side: policies that choose anew at each step which prompt pages a head reads."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch

from vllm_heterocache.kernels.tables import DecodeRows, StepTables
from vllm_heterocache.kernels.values import PAGE_SIZE, Protected
from vllm_heterocache.policies.policy import Policy, StepChoice

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_heterocache.heads.assignment import HeadAssignment
    from vllm_heterocache.worker.ops.interface import Geometry, Ops


class StepSelection:
    """Chooses the pages of every compressed head before each layer's decode attention."""

    def __init__(
        self, policy: Policy, protected: Protected, assignment: HeadAssignment, ops: Ops
    ) -> None:
        choice = policy.step_selection
        assert choice is not None
        self._ops, self._needs_summaries = ops, choice.needs_summaries
        among_kept = partial(ops.select_among_kept, channel_share=policy.step_channel_share)
        select: dict[StepChoice, Callable[..., None]] = {
            StepChoice.SUMMARIES: ops.select_by_summaries,
            StepChoice.HYBRID: among_kept,
            StepChoice.ONE_BIT: ops.select_by_bits,
            StepChoice.EXACT: ops.select_by_attention,
        }
        self._select = select[choice]
        self._protected = protected
        self._is_compressed = [not full.all() for full in assignment.full]  # of each layer

    def prepare(self, blocks: torch.Tensor) -> None:
        """A prompt is complete: note what choosing among its pages needs.

        Blocks that prompts share are summarized again, to the same values.

        Args:
            blocks: [n] int32, full blocks that hold the pages to choose from.
        """
        if self._needs_summaries:
            self._ops.summarize(blocks)

    def choose(self, query: torch.Tensor, rows: DecodeRows, layer: int) -> None:
        """Fill the lists of one layer, by the first query of each row whose attention comes next.

        Args:
            query: [num_queries, num_q_heads, head_dim].
        """
        if not self._is_compressed[layer]:
            return
        self._select(first_queries(query, rows), rows, layer, self._protected)


def first_queries(query: torch.Tensor, rows: DecodeRows) -> torch.Tensor:
    """[R, num_q_heads, head_dim]: the first query of each row, of [num_queries, ...]."""
    if rows.query_start is None:
        return query
    # padded rows begin behind the last query
    return query.index_select(0, rows.query_start[:-1].clamp(max=query.shape[0] - 1))


def step_tables(
    policy: Policy, pool: torch.Tensor, num_blocks: int, geometry: Geometry, gpu_budget: float
) -> StepTables | None:
    """What a policy's choice at each step needs; None where it needs nothing.

    Args:
        pool: [num_pages, page_size, 2 * head_dim].
    """
    choice = policy.step_selection
    if choice is None or not choice.needs_summaries:
        return None
    width, bits = _key_width(choice, geometry, gpu_budget), None
    if choice == StepChoice.ONE_BIT:
        size = pool.shape[0], PAGE_SIZE // 8 * geometry.head_dim
        bits = torch.zeros(size, dtype=torch.uint8, device=pool.device)
    return StepTables(
        summaries=pool.new_zeros(pool.shape[0], 2, geometry.head_dim),
        keys=torch.zeros(num_blocks * width, dtype=torch.int32, device=pool.device),
        key_width=width,
        bits=bits,
    )


def step_bytes_per_block(
    policy: Policy, block_bytes: int, geometry: Geometry, gpu_budget: float
) -> int:
    """Memory that `step_tables` takes for each block of the KV pool.

    Args:
        block_bytes: K and V of a block. A page's summary is as large as one of its tokens.
    """
    choice = policy.step_selection
    if choice is None or not choice.needs_summaries:
        return 0
    bits = 0
    if choice == StepChoice.ONE_BIT:
        bits = geometry.num_layers * geometry.num_kv_heads * PAGE_SIZE // 8 * geometry.head_dim
    return block_bytes // PAGE_SIZE + 4 * _key_width(choice, geometry, gpu_budget) + bits


def _key_width(choice: StepChoice, geometry: Geometry, gpu_budget: float) -> int:
    """Places for the keys of one layer, and for page ids where the choice is among kept pages, that
    a stripe offers (kernels/tables.py)."""
    per_page = 2 if choice == StepChoice.HYBRID else 1
    return math.ceil(per_page * geometry.num_kv_heads / gpu_budget)
