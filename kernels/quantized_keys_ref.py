"""Reference of quantised keys: what a finder keeps of all keys of a prompt.

A finder is a compressed head that chooses its pages by its own attention. Its keys are rounded,
channel by channel within a page, to one of four numbers from the page's least key to its largest
(per-channel asymmetric quantisation of keys, KIVI, arXiv 2402.02750, section 4; groups are pages
here). A channel's grid is its zero point and the step from one number to the next.
"""

from __future__ import annotations

import torch

from vllm_heterocache.kernels.tables import FinderTables, PageTables
from vllm_heterocache.kernels.values import PAGE_SIZE

KEY_BITS = 2
MAX_CODE = (1 << KEY_BITS) - 1
# The zero point is the key that code -ZERO_CODE would stand for, because ZERO_CODE plus a code is
# what the kernel makes of the code's bits without arithmetic. In fp16 it is finite for keys up to
# 17,800.
ZERO_CODE = 4
HALVES = 2  # of a page, whose codes have words of their own


def quantized_keys_ref(
    pages: torch.Tensor,
    tables: PageTables,
    finders: FinderTables,
    table_slot: int,
    dense_blocks: torch.Tensor,
) -> None:
    """Note the quantised keys of a prompt, for every finder.

    Args:
        pages: [num_pages, PAGE_SIZE, 2 * D], K then V.
        tables: `prompt_pages` and `first_stripe` of the slot are read.
        finders: `codes` and `grids` at the slot's places are written.
        table_slot: of the prompt.
        dense_blocks: [at least P] integer ids of the prompt's full blocks, in order.
    """
    num_layers, num_kv_heads = tables.count.shape[1:]
    num_pages = int(tables.prompt_pages[table_slot])
    blocks, head_dim = dense_blocks[:num_pages].long(), pages.shape[2] // 2
    for finder, flat in enumerate(finders.heads.tolist()):
        ids = blocks * (num_layers * num_kv_heads) + flat
        keys = pages[ids, :, :head_dim].float()  # [P, PAGE_SIZE, D]
        least, largest = keys.amin(1), keys.amax(1)
        codes = _nearest_codes(keys, least[:, None], largest[:, None])
        first = first_place(tables, finders, table_slot, finder)
        step = (largest - least) * (1 / MAX_CODE)
        grid = torch.stack((least - ZERO_CODE * step, step), 1)
        finders.codes[first : first + num_pages] = _packed(codes)
        finders.grids[first : first + num_pages] = grid.to(finders.grids.dtype)


def _nearest_codes(keys: torch.Tensor, least: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """int64: how many of the middles between neighbouring levels a key reaches. Nothing is divided,
    as quotients would be rounded by the device."""
    span, distance = largest - least, 2 * MAX_CODE * (keys - least)
    reached = [distance >= middle * span for middle in range(1, 2 * MAX_CODE, 2)]
    return (torch.stack(reached) & (span > 0)).sum(0)


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """[P, HALVES, D] int16 of [P, PAGE_SIZE, D]."""
    halves = codes.unflatten(1, (HALVES, -1))
    words = (halves << _shifts(codes)).sum(2)  # below 2 ** 16
    return torch.where(words < 1 << 15, words, words - (1 << 16)).to(torch.int16)


def _shifts(on: torch.Tensor) -> torch.Tensor:
    """[tokens of a half, 1]: where in a word each code stands."""
    return KEY_BITS * torch.arange(PAGE_SIZE // HALVES, device=on.device)[:, None]


def keys_of_codes_ref(finders: FinderTables, places: slice) -> torch.Tensor:
    """[P, PAGE_SIZE, D] fp32: the keys that codes stand for."""
    zero, step = finders.grids[places].float().unbind(1)
    words = finders.codes[places, :, None].int()  # [P, HALVES, 1, D]
    codes = ((words >> _shifts(words)) & MAX_CODE).flatten(1, 2)
    return zero[:, None] + (ZERO_CODE + codes) * step[:, None]


def first_place(tables: PageTables, finders: FinderTables, slot: int, finder: int) -> int:
    """Of a finder's pages in the prompt of a table slot."""
    num_pages = int(tables.prompt_pages[slot])
    return int(tables.first_stripe[slot]) * finders.width + finder * num_pages
