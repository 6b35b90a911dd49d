"""What the decode kernel is told of each row, at addresses that captured CUDA graphs read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_heterocache.worker.tables.upload import StagedTensor

if TYPE_CHECKING:
    import torch


class RowBuffers:
    """Table slot and query place of each decode row."""

    def __init__(self, max_rows: int, depth: int, device: torch.device) -> None:
        self._max_rows = max_rows
        self._staged = StagedTensor(2 * max_rows, depth, device)

    def fill(
        self, table_slots: dict[int, int], query_places: dict[int, int], dense_slot: int
    ) -> None:
        """Set all rows: those that are not named are dense, and their queries are not kept.

        Args:
            table_slots: row -> table slot.
            query_places: row -> place of its query among the last queries.
            dense_slot: table slot of dense rows and of padding.
        """
        values = np.empty((2, self._max_rows), np.int32)
        values[0], values[1] = dense_slot, -1
        for row, slot in table_slots.items():
            values[0, row] = slot
        for row, place in query_places.items():
            values[1, row] = place
        self._staged.write(values)

    def views(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Table slots and query places [num_rows] int32 of the first rows."""
        flat = self._staged.tensor
        return flat[:num_rows], flat[self._max_rows : self._max_rows + num_rows]
