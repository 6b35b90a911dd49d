"""Page tables for benchmarks and for the tests of the kernels, filled field by field.

A field that PageTables gets later needs its shape and dtype here, and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_heterocache.kernels.tables import PageTables


def tables_for(
    heads: tuple[int, int, int],
    device: torch.device,
    *,
    num_rows: int = 0,
    group: int = 1,
    widths: tuple[int, int, int] = (0, 0, 0),
    poison: int = 0,
    **given: Any,
) -> PageTables:
    """PageTables whose fields are `given`, on any device, or have their full size and hold poison.
    Biases of matched tokens are there only if given.

    Poison is NaN in floating point, 77 in flags, and `poison` in other integers.

    Args:
        heads: slots with those that are free, layers, KV heads.
        num_rows: of every arena that is not given.
        group: query heads a KV head.
        widths: of the arenas of pivots, satellites and host blocks.
    """
    num_slots, num_layers, num_kv_heads = heads
    pivot, satellite, host = widths
    entries = (num_rows * num_layers * num_kv_heads,)
    int8, int32, int64, fp32 = torch.int8, torch.int32, torch.int64, torch.float32
    fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "entries": (entries, int32),
        "positions": (entries, int32),
        "start": (heads, int64),
        "count": (heads, int32),
        "stand_in_pages": (heads if given.get("has_stand_ins") else (0,), int32),
        "prompt_pages": ((num_slots,), int32),
        "first_stripe": ((num_slots,), int64),
        "page_lse": ((num_rows * pivot, group), fp32),
        "scores": ((num_rows * pivot,), fp32),
        "is_reference": ((num_rows * pivot,), int8),
        "is_resident": ((num_rows * satellite,), int8),
        "host_blocks": ((num_rows * host,), int32),
    }
    values = {int8: 77, int32: poison, int64: poison, fp32: torch.nan}
    made = {
        name: torch.full(shape, values[dtype], dtype=dtype, device=device)
        for name, (shape, dtype) in fields.items()
        if name not in given
    }
    moved = {n: f.to(device) if torch.is_tensor(f) else f for n, f in given.items()}
    return PageTables(
        **made, **moved, pivot_width=pivot, satellite_width=satellite, host_width=host
    )


def clone_tables(tables: PageTables) -> PageTables:
    """The same in tensors of its own."""
    return PageTables(*(f.clone() if torch.is_tensor(f) else f for f in tables))
