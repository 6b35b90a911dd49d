"""What the decode kernel is told of each row, at addresses that captured CUDA graphs read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_heterocache.kernels.tables import DecodeRows
from vllm_heterocache.worker.tables.upload import StagedTensor

if TYPE_CHECKING:
    import torch


class RowBuffers:
    """Table slot and query place of each decode row, and whether its drift is checked."""

    def __init__(self, max_rows: int, depth: int, device: torch.device) -> None:
        self._max_rows = max_rows
        self._staged = StagedTensor(3 * max_rows, depth, device)

    def fill(
        self,
        table_slots: dict[int, int],
        query_places: dict[int, int],
        due_rows: list[int],
        dense_slot: int,
    ) -> None:
        """Set all rows: those that are not named are dense, and their queries are not kept.

        Args:
            table_slots: row -> table slot.
            query_places: row -> place of its query among the last queries.
            due_rows: rows whose drift is checked after the step.
            dense_slot: table slot of dense rows and of padding.
        """
        values = np.zeros((3, self._max_rows), np.int32)
        values[0], values[1] = dense_slot, -1
        for row, slot in table_slots.items():
            values[0, row] = slot
        for row, place in query_places.items():
            values[1, row] = place
        values[2, due_rows] = 1
        self._staged.write(values)

    def decode_rows(
        self, block_table: torch.Tensor, seq_lens: torch.Tensor, num_rows: int
    ) -> DecodeRows:
        """The first rows as the kernels read them.

        Args:
            block_table: [at least num_rows, max_blocks] int32.
            seq_lens: [at least num_rows] int32.
        """
        table_slots, query_places, is_due = self._staged.tensor.view(3, -1)[:, :num_rows]
        return DecodeRows(
            table_slots, block_table[:num_rows], seq_lens[:num_rows], query_places, is_due
        )
