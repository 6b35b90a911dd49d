"""The top pages that a pivot watches for drift: how many of a prompt's pages they are."""

from __future__ import annotations

# The top 5 % of a prompt's pages, independent of the budget, so that one threshold means the
# same at every ratio (quality study: with a chance-corrected threshold of 0.7, checked at every
# step, equal in accuracy to fetching always at 57 % of the fetches).
TOP_DIVISOR = 20
MIN_TOP_PAGES = 4


def num_top_pages(num_pages: int) -> int:
    """Pages in the set that a pivot watches, for a prompt of `num_pages` full pages."""
    return min(num_pages, max(MIN_TOP_PAGES, -(-num_pages // TOP_DIVISOR)))
