"""Reference of a retrieval's moves: which pages of the host pool replace which resident ones."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_heterocache.kernels.tables import HeadMaps, Moves, PageTables
from vllm_heterocache.kernels.top_pages_ref import protect_ref, score_keys_ref, top_mask_ref
from vllm_heterocache.kernels.values import DriftCounter, Protected


class Exchange(NamedTuple):
    """What one satellite would do to hold the best pages; both have equally many elements."""

    missing: torch.Tensor  # [n] int64 wanted pages that are not resident, best first
    replaced: torch.Tensor  # [n] int64 list entries of pages that are not wanted, worst first


def exchange_ref(keys: torch.Tensor, is_resident: torch.Tensor, held: torch.Tensor) -> Exchange:
    """Compare the pages that a satellite holds with the best ones.

    Args:
        keys: [P] ranking keys.
        is_resident: [P] int8, 1 for the pages in `held`.
        held: [count] int, the pages in the satellite's list, in the order of the list.
    """
    wanted = top_mask_ref(keys, held.numel())
    missing = (wanted & (is_resident == 0)).nonzero().flatten()
    missing = missing[keys[missing].sort(descending=True, stable=True).indices]
    replaced = (~wanted[held.long()]).nonzero().flatten()
    replaced = replaced[keys[held[replaced].long()].sort(stable=True).indices]
    return Exchange(missing, replaced)


def shares_ref(counts: list[int], allowed: int, rotation: int) -> list[tuple[int, int]]:
    """Divide what a row may move among its satellites.

    All get the same at most; where even that is too much, the last ones go short, and `rotation`
    decides who is last: satellite i of n is number (i + rotation) mod n.

    Args:
        counts: pages that each satellite misses.
        allowed: moves of the row.

    Returns:
        (first, number) of each one's moves among those of the row.
    """
    level = max(1, allowed // max(1, sum(count > 0 for count in counts)))
    shares = [(0, 0)] * len(counts)
    used = 0
    for turn in range(len(counts)):
        i = (turn - rotation) % len(counts)
        number = min(counts[i], level, allowed - used)
        shares[i] = (used, number)
        used += number
    return shares


def retrieval_moves_ref(
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
    workspace: torch.Tensor | None = None,
) -> None:
    """Choose, for the satellites of drifted pivots, pages to fetch and pages to give up.

    A satellite wants the best pages by its pivot's scores, as many as its list has; of those it
    lacks the best come in, and the worst of those it does not want leave. No table changes.

    Args:
        table_slots: [num_rows] int32, table slot of each batch row, -1 for rows to leave alone.
        waves_left: [S + 1, num_pivots] int32, 0 where nothing is wanted.
        spares: [num_rows, 2] int32: first spare entry, relative to the slot's first entry, and
            how many from there on this retrieval may use, over all rows at most max_moves.
        moves: written.
        counters: [3] int64; PAGES_FETCHED grows by the pages to move.
        protected: pages wanted before all others.
        rotations: [num_rows] int32 >= 0, changes from one retrieval of a request to the next.
        max_pages: most full prompt pages of a slot of the batch.
        workspace: the kernel's; not used here.
    """
    moves.total.zero_()
    for row, slot in enumerate(table_slots.tolist()):
        if slot < 0:
            continue
        exchanges = {
            satellite: _exchange_of(tables, maps, slot, satellite, protected)
            for satellite, leader in enumerate(maps.leaders.tolist())
            if int(waves_left[slot, leader]) > 0
        }
        satellites = range(maps.leaders.shape[0])
        counts = [len(exchanges[s].missing) if s in exchanges else 0 for s in satellites]
        first_spare, num_spares = spares[row].tolist()
        shares = shares_ref(counts, num_spares, int(rotations[row]))
        base = int(moves.total)
        for satellite, (first, number) in enumerate(shares):
            if number:
                used = slice(base + first, base + first + number)
                moves.row[used] = row
                _write_moves(
                    tables,
                    maps,
                    Moves._make([*(field[used] for field in moves[:-1]), moves.total]),
                    slot,
                    satellite,
                    exchanges[satellite],
                    first_spare + first,
                )
        moves.total.add_(sum(number for _, number in shares))
    counters[DriftCounter.PAGES_FETCHED] += moves.total[0]


def _exchange_of(
    tables: PageTables,
    maps: HeadMaps,
    slot: int,
    satellite: int,
    protected: Protected,
) -> Exchange:
    num_pages, first_stripe = int(tables.prompt_pages[slot]), int(tables.first_stripe[slot])
    scored = first_stripe * tables.pivot_width + int(maps.leaders[satellite]) * num_pages
    resident = first_stripe * tables.satellite_width + satellite * num_pages
    start, count = _list_of(tables, maps, slot, satellite)
    return exchange_ref(
        protect_ref(score_keys_ref(tables.scores[scored : scored + num_pages]), protected),
        tables.is_resident[resident : resident + num_pages],
        tables.positions[start : start + count],
    )


def _write_moves(
    tables: PageTables,
    maps: HeadMaps,
    moves: Moves,
    slot: int,
    satellite: int,
    exchange: Exchange,
    spare: int,
) -> None:
    """Fill the moves of one satellite, but for their row: the best missing pages, in page order,
    take the places of the worst entries, in list order, by way of the spare entries from `spare`
    on."""
    number = moves.page.shape[0]
    pages = exchange.missing[:number].sort().values
    entries = exchange.replaced[:number].sort().values
    first_entry = int(tables.start[slot, 0, 0])
    list_begin = _list_of(tables, maps, slot, satellite)[0] - first_entry
    host_place = int(tables.first_stripe[slot]) * tables.host_width
    num_satellites = maps.satellite_heads.shape[0]
    moves.satellite.fill_(satellite)
    moves.listed.copy_(entries + list_begin)
    moves.spare.copy_(torch.arange(spare, spare + number))
    moves.page.copy_(pages)
    moves.host_page.copy_(tables.host_blocks[host_place + pages] * num_satellites + satellite)
    moves.gpu_page.copy_(tables.entries[first_entry + spare : first_entry + spare + number])


def _list_of(tables: PageTables, maps: HeadMaps, slot: int, satellite: int) -> tuple[int, int]:
    """First entry of a satellite's list, and entries in it."""
    layer, head = divmod(int(maps.satellite_heads[satellite]), tables.count.shape[2])
    return int(tables.start[slot, layer, head]), int(tables.count[slot, layer, head])
