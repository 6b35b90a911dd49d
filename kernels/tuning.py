"""Launch settings of the Triton kernels: a table, so that nothing is tuned while serving."""

from __future__ import annotations

from typing import NamedTuple

MAX_GROUP = 16  # query heads of a KV head


class PagedDecodeLaunch(NamedTuple):
    """How `paged_decode` is launched."""

    tile_tokens: int  # tokens of one K (and one V) tile, a multiple of the page size
    num_warps: int
    num_stages: int  # of the load pipeline: page ids, then K and V
    programs_per_sm: int
    fused_merge: bool = False  # the last program of a segment merges, instead of a second launch


# Found on one NVIDIA H200 on 2026-11-22 by scripts/bench/kernel_times.py, 32 query heads, 8 KV
# heads of 128, bf16: the launch that meets the targets at 4 x 224K, 16 x 32K, 1 x 224K and 1 x
# 128K, each with 2 full heads and 6 at 10 %. (64, 2, 5, 3) is up to 2 % faster where all heads are
# full and scores cost less, but it missed 1 x 128K. Heads of 64 and 256 were tested, not timed.
PAGED_DECODE = {
    64: PagedDecodeLaunch(tile_tokens=64, num_warps=2, num_stages=5, programs_per_sm=3),
    128: PagedDecodeLaunch(tile_tokens=32, num_warps=2, num_stages=5, programs_per_sm=3),
    256: PagedDecodeLaunch(tile_tokens=32, num_warps=2, num_stages=5, programs_per_sm=3),
}
