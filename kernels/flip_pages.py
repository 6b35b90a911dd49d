"""Table update that makes retrieved pages visible (specification: flip_pages_ref.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels.kept_launch import KeptLaunch
from vllm_heterocache.kernels.tables import Moves, PageTables

NUM_WARPS = 4
BLOCK_MOVES = 32 * NUM_WARPS  # one thread a move: it reads an entry before it writes it


def flip_pages(tables: PageTables, moves: Moves, table_slots: torch.Tensor) -> None:
    """Put filled spare pages into the satellites' lists; the pages they replace become spare.

    Args: as of `flip_pages_ref`, on the GPU. The number of moves is read on the device.
    """
    flip_pages_launch(tables, moves, table_slots)()


def flip_pages_launch(
    tables: PageTables, moves: Moves, table_slots: torch.Tensor
) -> Callable[[], None]:
    """The launch of `flip_pages` with these tensors."""
    assert (
        table_slots.dtype == torch.int32 and table_slots.ndim == 1 and table_slots.is_contiguous()
    )
    launch = KeptLaunch(
        _flip_pages_kernel,
        moves.row,
        moves.satellite,
        moves.listed,
        moves.spare,
        moves.page,
        moves.total,
        table_slots,
        tables.entries,
        tables.positions,
        tables.start,
        tables.prompt_pages,
        tables.first_stripe,
        tables.is_resident,
        tables.satellite_width,
        NUM_HEADS=tables.count.shape[1] * tables.count.shape[2],
        BLOCK=BLOCK_MOVES,
        num_warps=NUM_WARPS,
    )
    return partial(launch, triton.cdiv(moves.page.shape[0], BLOCK_MOVES))


@triton.jit(do_not_specialize=["table_slots"])
def _flip_pages_kernel(
    move_row,
    move_satellite,
    move_listed,
    move_spare,
    move_page,
    total,
    table_slots,
    entries,
    positions,
    start,
    prompt_pages,
    first_stripe,
    is_resident,
    satellite_width,
    NUM_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i_block: BLOCK moves; no two moves touch the same entry or the same page."""
    o_move = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_move = o_move < tl.load(total)
    b_row = tl.load(move_row + o_move, mask=m_move, other=0)
    b_slot = tl.load(table_slots + b_row, mask=m_move, other=-1).to(tl.int64)
    m_move = m_move & (b_slot >= 0)
    b_first = tl.load(start + b_slot * NUM_HEADS, mask=m_move, other=0)
    b_listed = b_first + tl.load(move_listed + o_move, mask=m_move, other=0)
    b_spare = b_first + tl.load(move_spare + o_move, mask=m_move, other=0)
    b_page = tl.load(move_page + o_move, mask=m_move, other=0)
    b_old_page = tl.load(positions + b_listed, mask=m_move, other=0)
    b_leaves = tl.load(entries + b_listed, mask=m_move, other=0)
    b_enters = tl.load(entries + b_spare, mask=m_move, other=0)

    b_satellite = tl.load(move_satellite + o_move, mask=m_move, other=0)
    b_resident = tl.load(first_stripe + b_slot, mask=m_move, other=0) * satellite_width
    b_resident += b_satellite * tl.load(prompt_pages + b_slot, mask=m_move, other=0)
    tl.store(entries + b_listed, b_enters, mask=m_move)
    tl.store(entries + b_spare, b_leaves, mask=m_move)
    tl.store(positions + b_listed, b_page, mask=m_move)
    tl.store(is_resident + b_resident + b_old_page, tl.zeros([BLOCK], tl.int8), mask=m_move)
    tl.store(is_resident + b_resident + b_page, tl.full([BLOCK], 1, tl.int8), mask=m_move)
