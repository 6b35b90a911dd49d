"""Launch settings of the Triton kernels: a table, so that nothing is tuned while serving."""

from __future__ import annotations

from typing import NamedTuple

MAX_QUERIES = 8  # of a row: a token and its drafts
MAX_VECTORS = 64  # query heads of a KV head times queries; more spill or compile for minutes
FUSED_ELEMENTS = 4096  # of partial outputs that a program holds while it merges a segment


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

# Of fp8 pages, for tiles of up to FP8_VECTORS query vectors; heads of other sizes take the launch
# of 16-bit pages. The best of 16 launches on one NVIDIA H200 on 2026-11-29 at 4 x 224K with 2 full
# heads and 6 at 10 %: 170 us, and 210 with 3 programs an SM. With products in bf16 the launch of
# 16-bit pages took 383 us, and 289 on 16-bit pages.
FP8_PAGED_DECODE = {
    128: PagedDecodeLaunch(tile_tokens=64, num_warps=2, num_stages=5, programs_per_sm=4),
}
FP8_VECTORS = 16

# Tiles of so many query vectors and heads of 256, which two warps would spill. Registers and shared
# memory are those of the compiler, for sm_80 and sm_90, with scores, matched tokens, sinks and soft
# cap: at most 40 bytes spilled a thread, and 161 KiB a program. Not timed.
WIDE_PAGED_DECODE = {
    (32, 256): PAGED_DECODE[256]._replace(num_warps=4, num_stages=3),
    (64, 256): PAGED_DECODE[256]._replace(num_warps=8, num_stages=3),
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
    head_dim: int, num_segments: int, group: int, max_queries: int = 1, is_fp8: bool = False
) -> PagedDecodeLaunch:
    """The launch for a batch of `num_segments` segments, padded rows included.

    The number of rows is known when a CUDA graph is captured, so each graph holds one way. Rows of
    several queries always merge in a second launch, and so do groups too wide to be held whole.

    Args:
        group: query heads of a KV head.
        is_fp8: whether the pages are.
    """
    vectors = _power_of_2(group * max_queries)
    launch = WIDE_PAGED_DECODE.get((vectors, head_dim), PAGED_DECODE[head_dim])
    if is_fp8 and vectors <= FP8_VECTORS:
        launch = FP8_PAGED_DECODE.get(head_dim, launch)
    may_fuse = max_queries == 1 and vectors * head_dim <= FUSED_ELEMENTS
    return launch._replace(fused_merge=may_fuse and num_segments >= FUSED_MERGE_SEGMENTS)


def _power_of_2(number: int) -> int:
    """The least that is not below a number above 0."""
    return 1 << (number - 1).bit_length()
