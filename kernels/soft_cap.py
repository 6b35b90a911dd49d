"""Soft-capped logits within Triton kernels (specification: soft_cap_ref.py)."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def soft_capped(b_logit, cap_log2):
    """Logits to base 2, of a cap to base 2. It is exact to fp32's rounding of the cap."""
    b_power = tl.exp2(b_logit * (2 * LOG2_E / cap_log2))  # infinite or 0 where the cap is reached
    return cap_log2 - 2 * cap_log2 / (b_power + 1)
