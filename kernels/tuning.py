"""Launch settings of the Triton kernels: a table, so that nothing is tuned while serving."""

from __future__ import annotations

from typing import NamedTuple

MAX_GROUP = 16  # query heads of a KV head
MAX_QUERIES = 8  # of a row: a token and its drafts
MAX_VECTORS = 64  # query heads of a KV head times queries; more spill or compile for minutes


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

# A launch of at least this many segments (rows times KV heads) fuses the merge. Both ways were
# timed on one NVIDIA H200 (docs/results/kernels_h200.jsonl, 8 KV heads, 396 programs), the first
# four cells on 2026-11-28 (commit 02b4ee4), the others on 2026-11-22 (commit 4e69cef). Fused
# against two launches, in microseconds:
#     64 x 8K, 2 full   512 segments   179.6 and 185.5
#     64 x 1K, full     512 segments    75.1 and  87.3
#     32 x 1K, full     256 segments    43.2 and  50.2
#     8 x 32K, 2 full    64 segments    95.8 and  92.2
#     16 x 32K, full    128 segments   499.7 and 500.7, and with page scores 559.1 and 525.1
#     1 x 224K, 2 full    8 segments   120.8 and  84.4
# The fewer the segments, the more partials has each, and one program merges them all. No count
# between 128 and 256 was timed.
FUSED_MERGE_SEGMENTS = 256


def paged_decode_launch(
    head_dim: int, num_segments: int, max_queries: int = 1
) -> PagedDecodeLaunch:
    """The launch for a batch of `num_segments` segments, padded rows included.

    The number of rows is known when a CUDA graph is captured, so each graph holds one way. Rows of
    several queries always merge in a second launch.
    """
    fused_merge = num_segments >= FUSED_MERGE_SEGMENTS and max_queries == 1
    return PAGED_DECODE[head_dim]._replace(fused_merge=fused_merge)
