"""Launches that come while the kernel before them still runs (programmatic dependent launch).

A kernel so launched asks for what others left for it, waits, and only then reads what the kernel
before it wrote. The time that a launch takes passes meanwhile.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl

MIN_CAPABILITY = 90  # times 10


@cache
def has_dependent_launch() -> bool:
    """Whether the current GPU can; Triton's interpreter cannot."""
    if triton.knobs.runtime.interpret:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= MIN_CAPABILITY


@triton.jit
def let_next_begin(IS_DEPENDENT: tl.constexpr):
    """The kernel behind this one may begin once all programs are here."""
    if IS_DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_last(IS_DEPENDENT: tl.constexpr):
    """All that the kernel before this one wrote is there afterwards."""
    if IS_DEPENDENT:
        tl.extra.cuda.gdc_wait()
