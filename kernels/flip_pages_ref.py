"""Reference of the table update that makes retrieved pages visible."""

from __future__ import annotations

import torch

from vllm_heterocache.kernels.tables import Moves, PageTables


def flip_pages_ref(tables: PageTables, moves: Moves, table_slots: torch.Tensor) -> None:
    """Put filled spare pages into the satellites' lists; the pages they replace become spare.

    Args:
        moves: moves whose pages are all in place; their entries count from the first entry that
            each slot has now.
        table_slots: [num_rows] int32, table slot of each row of the batch that was checked, -1
            where the request has left since: its moves are dropped.
    """
    total = int(moves.total)
    all_slots = table_slots[moves.row[:total].long()].long()
    used = (all_slots >= 0).nonzero().flatten()
    slot, satellite = all_slots[used], moves.satellite[used].long()
    first_entry = tables.start[slot, 0, 0]
    listed, spare = first_entry + moves.listed[used], first_entry + moves.spare[used]
    replaced = tables.entries[listed]
    tables.entries[listed] = tables.entries[spare]
    tables.entries[spare] = replaced
    resident = tables.first_stripe[slot] * tables.satellite_width
    resident += satellite * tables.prompt_pages[slot]
    tables.is_resident[resident + tables.positions[listed]] = 0
    tables.is_resident[resident + moves.page[used]] = 1
    tables.positions[listed] = moves.page[used]
