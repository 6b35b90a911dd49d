"""Worker side: how tokens with biases of their own get into a request's stand-in pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.kernels.paged_decode_ref import LOG2_E

if TYPE_CHECKING:
    from vllm_heterocache.worker.ops.interface import Memory


class StandIns(Protocol):
    """Tokens of B heads, n at most of each."""

    @property
    def keys(self) -> torch.Tensor:
        """[B, n, D] fp32."""

    @property
    def values(self) -> torch.Tensor:
        """[B, n, D] fp32."""

    @property
    def bias(self) -> torch.Tensor:
        """[B, n] fp32, added to the logits of each token."""


def write_stand_ins(
    memory: Memory,
    table_slot: int,
    heads: torch.Tensor,
    behind: torch.Tensor,
    counts: torch.Tensor,
    total: int,
    stand_ins: StandIns,
) -> None:
    """Write tokens of some heads to their stand-in pages, and their biases to the tables.

    Nothing waits for the device.

    Args:
        table_slot: of the request.
        heads: [B] int64, layer * H + KV head.
        behind: [B] int64, tokens of these pages that are left alone.
        counts: [B] int64, tokens to write, `total` in all.
    """
    tensors, pool = memory.tables, memory.pool
    assert tensors.token_bias is not None and tensors.bias_start is not None
    of_head = torch.repeat_interleave(counts, output_size=total)  # [total], index into `heads`
    within = torch.arange(total, device=pool.device) - (counts.cumsum(0) - counts)[of_head]
    place = within + behind[of_head]
    page, token = place // PAGE_SIZE, place % PAGE_SIZE
    first, listed, first_bias = (
        one[table_slot].flatten()[heads][of_head]
        for one in (tensors.start, tensors.count, tensors.bias_start)
    )
    target = tensors.entries[first + listed + page].long()
    kv = torch.cat((stand_ins.keys, stand_ins.values), dim=-1)[of_head, within]
    largest = torch.finfo(pool.dtype).max
    elements = kv.clamp(-largest, largest).to(pool.dtype)
    rows = storable(pool).view(-1, pool.shape[2])
    rows[target * PAGE_SIZE + token] = storable(elements)
    tensors.token_bias[first_bias + page, token] = stand_ins.bias[of_head, within] * LOG2_E


def storable(elements: torch.Tensor) -> torch.Tensor:
    """The same, as bytes where torch has no indexing for the dtype (fp8 on CUDA)."""
    return elements.view(torch.uint8) if elements.itemsize == 1 else elements
