"""Sizes and small values that the kernels share with their callers. Nothing here needs torch, so
that options and the command line load without torch."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

PAGE_SIZE = 16  # N, tokens of a page
MAX_CHECKED_PAGES = 131072  # P of the longest prompt that a drift check ranks on CUDA
# Pages of a prompt that a program ranks in registers. Ranking 2,048 pages in a block of 4,096 takes
# 160 us for 92 (4 rows of 32K, 224 satellites that all want pages, one NVIDIA H200, 2026-11-29), so
# the lengths that long prompts mostly have got blocks of their own. Each size is compiled once. One
# larger than the last does not fit the registers, and takes minutes to compile.
PAGE_BLOCKS = (256, 1024, 2048, 4096, 8192, 16384, 65536)
THRESHOLD_UNIT = 10**6  # thresholds of drift count in millionths


class Protected(NamedTuple):
    """The pages of a prompt that come before all others, whatever their scores."""

    sinks: int  # first pages
    recent: int  # last pages


class DriftRule(NamedTuple):
    """When a pivot has drifted, and what follows."""

    threshold: float  # chance-corrected overlap of the top pages under which it has drifted
    waves: int  # retrievals in which its satellites take part then, > 0

    @property
    def threshold_units(self) -> int:
        """The threshold in millionths, so that comparisons are exact."""
        return round(self.threshold * THRESHOLD_UNIT)


class DriftCounter(IntEnum):
    """Index of each count in the device's counters [3] int64."""

    CHECKS = 0  # drift checks
    TRIGGERS = 1  # drift checks that found drift
    PAGES_FETCHED = 2  # by retrievals
