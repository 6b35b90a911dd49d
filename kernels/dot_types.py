"""The dtypes in which kernels multiply."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels.kv_scales import FP8_DTYPES

# Triton's interpreter multiplies bfloat16 as if it were uint16
_IN_INTERPRETER = triton.knobs.runtime.interpret
DOT_TYPES = {
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.bfloat16: tl.float32 if _IN_INTERPRETER else tl.bfloat16,
}


def decode_dot_type(query_dtype: torch.dtype, page_dtype: torch.dtype) -> tl.dtype:
    """In which `paged_decode` multiplies queries and weights with pages.

    Elements of fp8 become fp16 by one instruction a pair, and bf16 by several. fp16 holds all of
    them, and all queries but those beyond 65504, which are clamped.
    """
    if page_dtype in FP8_DTYPES and query_dtype == torch.bfloat16 and not _IN_INTERPRETER:
        return tl.float16
    return DOT_TYPES[query_dtype]
