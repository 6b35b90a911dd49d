"""What the decode kernel is told of each row, at addresses that captured CUDA graphs read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_heterocache.kernels.tables import DecodeRows
from vllm_heterocache.worker.tables.upload import StagedTensor

if TYPE_CHECKING:
    import torch

    from vllm_heterocache.worker.batch import KeptQueries


class RowBuffers:
    """Table slot of each decode row, the place of each of its queries, and whether its drift is
    checked."""

    def __init__(self, max_rows: int, max_queries: int, depth: int, device: torch.device) -> None:
        self.max_rows, self._max_queries = max_rows, max_queries
        self._staged = StagedTensor((2 + max_queries) * max_rows, depth, device)
        staged = self._staged.tensor.view(2 + max_queries, max_rows)
        self._slots, self._is_due, self._places = staged[0], staged[1], staged[2:].flatten()
        self._num_rows, self._views = 0, self._views_of(0)  # of the last step

    def fill(
        self,
        table_slots: dict[int, int],
        kept: list[KeptQueries],
        due_rows: list[int],
        dense_slot: int,
    ) -> None:
        """Set all rows: those that are not named are dense, and their queries are not kept.

        Args:
            table_slots: row -> table slot.
            kept: queries of these rows that go to the last queries.
            due_rows: rows whose drift is checked after the step.
            dense_slot: table slot of dense rows and of padding.
        """
        values = np.zeros((2 + self._max_queries, self.max_rows), np.int32)
        slots, is_due, places = values[0], values[1], values[2:].reshape(-1)
        slots[:], places[:] = dense_slot, -1
        for row, slot in table_slots.items():
            slots[row] = slot
        for first_token, count, index in kept:
            places[first_token : first_token + count] = np.arange(index, index + count)
        is_due[due_rows] = 1
        self._staged.write(values)

    def decode_rows(
        self,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start: torch.Tensor,
        num_rows: int,
    ) -> DecodeRows:
        """The first rows as the kernels read them.

        Args:
            block_table: [at least num_rows, max_blocks] int32.
            seq_lens: [at least num_rows] int32.
            query_start: [at least num_rows + 1] int32, first query of each row.
        """
        has_several = self._max_queries > 1
        if num_rows != self._num_rows:
            self._num_rows, self._views = num_rows, self._views_of(num_rows)
        slots, places, is_due = self._views
        return DecodeRows(
            slots,
            block_table[:num_rows],
            seq_lens[:num_rows],
            places,
            is_due,
            query_start[: num_rows + 1] if has_several else None,
            self._max_queries,
        )

    def _views_of(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Slots, query places and due marks of so many rows; the places of all queries where a row
        may have several."""
        places = self._places if self._max_queries > 1 else self._places[:num_rows]
        return self._slots[:num_rows], places, self._is_due[:num_rows]
