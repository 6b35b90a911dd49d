"""Moves of a retrieval, listed on the device (specification: README.md and retrieval_moves_ref.py).

Three launches: count what each (row, satellite) misses, divide the row's moves among its
satellites, choose the pages of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_heterocache.kernels.drift_check import page_launch
from vllm_heterocache.kernels.kept_launch import KeptLaunch
from vllm_heterocache.kernels.retrieval_moves_kernels import (
    choose_kernel,
    count_kernel,
    share_kernel,
)
from vllm_heterocache.kernels.tables import HeadMaps, Moves, PageTables
from vllm_heterocache.kernels.values import Protected

SHARE_BLOCK = 256  # satellites that one turn of the dividing loop takes


def retrieval_moves_workspace(max_rows: int, num_satellites: int) -> int:
    """int32 elements that the moves of so many rows and satellites need."""
    return max_rows * (5 * num_satellites + 1)


@dataclass(frozen=True)
class RetrievalMovesLaunches:
    """The launches of `retrieval_moves`, to be called with a number of rows."""

    total: torch.Tensor  # of the moves
    max_rows: int  # that the workspace has room for
    num_satellites: int
    count: KeptLaunch
    share: KeptLaunch
    choose: KeptLaunch

    def __call__(self, num_rows: int) -> None:
        assert num_rows <= self.max_rows
        if num_rows == 0 or self.num_satellites == 0:
            self.total.zero_()
            return
        self.count(num_rows, self.num_satellites)
        self.share(num_rows)
        self.choose(num_rows, self.num_satellites)


def retrieval_moves(
    tables: PageTables,
    maps: HeadMaps,
    table_slots: torch.Tensor,
    waves_left: torch.Tensor,
    spares: torch.Tensor,
    moves: Moves,
    counters: torch.Tensor,
    protected: Protected,
    rotations: torch.Tensor,
    max_pages: int,
    workspace: torch.Tensor,
) -> None:
    """Choose, for the satellites of drifted pivots, pages to fetch and pages to give up.

    Args: as of `retrieval_moves_ref`; tensors are contiguous and on the GPU. The moves of a row
        lie behind one another, but the rows come in any order.
        workspace: [>= retrieval_moves_workspace(num_rows, num_satellites)] int32, overwritten.
    """
    launches = retrieval_moves_launches(
        tables, maps, table_slots, waves_left, spares, moves, counters, protected, rotations,
        max_pages, workspace,
    )  # fmt: skip
    launches(table_slots.shape[0])


def retrieval_moves_launches(
    tables: PageTables,
    maps: HeadMaps,
    table_slots: torch.Tensor,
    waves_left: torch.Tensor,
    spares: torch.Tensor,
    moves: Moves,
    counters: torch.Tensor,
    protected: Protected,
    rotations: torch.Tensor,
    max_pages: int,
    workspace: torch.Tensor,
) -> RetrievalMovesLaunches:
    """The launches of `retrieval_moves`. The rows may be more than `table_slots` has, where there
    are more of them behind it, and behind `spares` and `rotations`."""
    num_rows = table_slots.shape[0]
    num_pivots, num_satellites = maps.pivot_heads.shape[0], maps.satellite_heads.shape[0]
    assert table_slots.dtype == spares.dtype == waves_left.dtype == rotations.dtype == torch.int32
    assert spares.shape == (num_rows, 2) and spares.is_contiguous()
    assert rotations.shape == (num_rows,)
    assert waves_left.shape == (tables.count.shape[0], num_pivots) and waves_left.is_contiguous()
    assert workspace.dtype == torch.int32 and workspace.is_contiguous()
    max_rows = workspace.numel() // retrieval_moves_workspace(1, num_satellites)
    launch = page_launch(max_pages)
    pages = (
        table_slots,
        maps.leaders,
        maps.satellite_heads,
        tables.start,
        tables.count,
        tables.prompt_pages,
        tables.first_stripe,
        tables.scores,
        tables.is_resident,
    )
    widths = (tables.pivot_width, tables.satellite_width)
    heads = tables.count.shape[1] * tables.count.shape[2]
    count = KeptLaunch(
        count_kernel,
        *pages,
        waves_left,
        workspace,
        moves.total,
        *widths,
        *protected,
        num_pivots,
        NUM_HEADS=heads,
        BLOCK=launch.block,
        LOOPED=launch.looped,
        num_warps=launch.num_warps,
    )
    share = KeptLaunch(
        share_kernel,
        spares,
        rotations,
        moves.total,
        counters,
        workspace,
        num_satellites,
        BLOCK=SHARE_BLOCK,
        num_warps=4,
    )
    choose = KeptLaunch(
        choose_kernel,
        *pages,
        spares,
        tables.entries,
        tables.positions,
        tables.host_blocks,
        *moves[:-1],
        workspace,
        *widths,
        tables.host_width,
        *protected,
        NUM_HEADS=heads,
        BLOCK=launch.block,
        LOOPED=launch.looped,
        num_warps=launch.num_warps,
    )
    return RetrievalMovesLaunches(moves.total, max_rows, num_satellites, count, share, choose)
