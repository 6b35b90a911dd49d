"""The kernels of policy `fier`, measured as those of `quest` (step_kernels.py).

The first launch of `one_bit_step_select` reads summaries and the bits of all keys; the second is
that of `step_select`. Bits are noted in plain torch, which is not timed.
"""

from __future__ import annotations

from typing import Any

import torch

from common import cells, step_kernels
from common.cells import PAGE, D, H
from common.step_kernels import PROTECTED, StepCell
from vllm_heterocache.kernels.one_bit_step_select import one_bit_step_select, write_one_bit_keys
from vllm_heterocache.kernels.one_bit_step_select_ref import (
    one_bit_step_select_ref,
    page_bits_ref,
)
from vllm_heterocache.kernels.tables import PageTables

BIT_BYTES = PAGE // 8 * D  # of a page
PAGE_BYTES = BIT_BYTES + 2 * D * 2  # with its summary


class OneBitCell(StepCell):
    """A decode batch whose pages have one-bit keys."""

    @property
    def read_bytes(self) -> dict[str, int]:
        num_pages = self.num_rows * self.prompt_pages * H
        return super().read_bytes | {"bit_bytes": num_pages * BIT_BYTES}

    def select(self, layer: int) -> None:
        one_bit_step_select(self.query, self.tables, self.step, self.rows, layer, PROTECTED)

    def select_ref(self, tables: PageTables, layer: int) -> None:
        one_bit_step_select_ref(self.query, tables, self.step, self.rows, layer, PROTECTED)

    def write_keys(self, layer: int) -> None:
        write_one_bit_keys(self.query, self.tables, self.step, self.rows, layer)

    def summarize(self, _: int = 0) -> None:
        super().summarize()
        page_bits_ref(self.pages, self.prompt_blocks, self.num_layers * H, self.step)


def cell_of(name: str, num_layers: int | None) -> OneBitCell:
    num_rows, num_tokens, _ = cells.parse(name)
    num_layers = num_layers or cells.cold_layers(num_rows * num_tokens // PAGE * H * PAGE_BYTES)
    cell = OneBitCell(**vars(step_kernels.cell_of(name, num_layers)))
    size = cell.pages.shape[0], BIT_BYTES
    cell.step = cell.step._replace(bits=cell.pages.new_zeros(size, dtype=torch.uint8))
    return cell


def one_bit_row(name: str, num_layers: int | None) -> dict[str, Any]:
    return step_kernels.selection_row("one_bit_step_select", name, cell_of(name, num_layers))
