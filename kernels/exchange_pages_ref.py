"""Reference of how finders fetch: the best pages of the host take the places of the worst held.

It happens in the step whose queries asked, before the layer's decode attention reads the list. A
page that leaves needs no copy, because the host holds all pages of a finder.
"""

from __future__ import annotations

import torch

from vllm_heterocache.kernels.tables import DecodeRows, FinderTables, PageTables
from vllm_heterocache.kernels.top_pages_ref import protect_ref, score_keys_ref
from vllm_heterocache.kernels.values import DriftCounter, Protected

# Most pages that a finder fetches in a step (docs/quality.md, "A few heads that find their pages
# themselves"). Page p of a prompt is in part p % MAX_EXCHANGED. Each part exchanges one page within
# itself, so that parts know nothing of one another.
MAX_EXCHANGED = 4


def exchange_pages_ref(
    pages: torch.Tensor,
    host_pages: torch.Tensor,
    tables: PageTables,
    finders: FinderTables,
    rows: DecodeRows,
    layer: int,
    protected: Protected,
    counters: torch.Tensor,
) -> None:
    """Fetch what the finders of one layer attend to, in the rows that are due.

    In each part of the prompt the best page that is not listed takes the place of the worst one
    that is, if its key is the higher one. Of equal pages the first counts as the better one to
    come, and as the worse one to go. The score of a page is its share of the attention on all pages
    of the prompt by their log-sum-exps, the largest of the group.

    Args:
        pages: [num_pages, page_size, 2 * D]; pages of the finders' lists are written in place.
        host_pages: [host blocks * num_finders, page_size, 2 * D] in the pool's dtype.
        tables: `page_lse` at the finders' places as pivots is read (`find_pages_ref`), `scores`
            there, `positions` and `is_resident` are written.
        protected: pages that never leave.
        counters: [3] int64; PAGES_FETCHED grows.
    """
    num_kv_heads = tables.count.shape[2]
    num_finders = finders.heads.shape[0]
    slots, is_due = rows.row_to_table_slot.tolist(), rows.is_due.tolist()
    num_tokens = rows.seq_lens.tolist()
    for finder, flat in enumerate(finders.heads.tolist()):
        if flat // num_kv_heads != layer:
            continue
        for row, slot in enumerate(slots):
            if not num_tokens[row] or not is_due[row] or not int(tables.prompt_pages[slot]):
                continue
            keys = _score(tables, finders, slot, finder, protected)
            for page, gone in _exchanged(tables, finders, slot, finder, keys):
                start, count = _list_of(tables, finders, slot, finder)
                positions = tables.positions[start : start + count]
                entry = start + int((positions == gone).nonzero())
                block = tables.host_blocks[
                    int(tables.first_stripe[slot]) * tables.host_width + page
                ]
                fetched = host_pages[int(block) * num_finders + finder]
                pages[tables.entries[entry].long()] = fetched.to(pages.device)
                resident = _resident(tables, finders, slot, finder)
                resident[gone] = 0
                resident[page] = 1
                tables.positions[entry] = page
                counters[DriftCounter.PAGES_FETCHED] += 1


def _score(
    tables: PageTables, finders: FinderTables, slot: int, finder: int, protected: Protected
) -> torch.Tensor:
    """Write the scores of a finder's pages; [P] their keys."""
    num_pages = int(tables.prompt_pages[slot])
    first = int(tables.first_stripe[slot]) * tables.pivot_width
    first += int(finders.pivots[finder]) * num_pages
    lse = tables.page_lse[first : first + num_pages]
    total = (lse - lse.amax(0)).exp2().sum(0).log2() + lse.amax(0)  # [G]
    scores = (lse - total).exp2().amax(1)
    tables.scores[first : first + num_pages] = scores
    return protect_ref(score_keys_ref(scores), protected)


def _exchanged(
    tables: PageTables, finders: FinderTables, slot: int, finder: int, keys: torch.Tensor
) -> list[tuple[int, int]]:
    """Pages to come and pages to go in their places."""
    held = _resident(tables, finders, slot, finder).tolist()
    ranked = list(enumerate(keys.tolist()))
    exchanged = []
    for part in range(MAX_EXCHANGED):
        of_part = ranked[part::MAX_EXCHANGED]
        missing = [(-key, page) for page, key in of_part if not held[page]]
        listed = [(key, page) for page, key in of_part if held[page]]
        if missing and listed:
            (best, page), (worst, gone) = min(missing), min(listed)
            exchanged += [(page, gone)] if -best > worst else []
    return exchanged


def _list_of(tables: PageTables, finders: FinderTables, slot: int, finder: int) -> tuple[int, int]:
    """First entry of a finder's list, and entries in it."""
    layer, head = divmod(int(finders.heads[finder]), tables.count.shape[2])
    return int(tables.start[slot, layer, head]), int(tables.count[slot, layer, head])


def _resident(tables: PageTables, finders: FinderTables, slot: int, finder: int) -> torch.Tensor:
    """[P] a view: 1 for the pages in the finder's list."""
    num_pages = int(tables.prompt_pages[slot])
    first = int(tables.first_stripe[slot]) * tables.satellite_width + finder * num_pages
    return tables.is_resident[first : first + num_pages]
