"""fp8 pools: the scales of their elements, and how keys and values become elements.

A key is its elements times the key scale of its layer and KV head, and a value likewise. Scales
are constant over the tokens of a head. So order and means of elements are those of the numbers
they stand for, and summaries and mean pages need no scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


class KVScales(NamedTuple):
    """The scales of an fp8 pool; a pool of another dtype has none."""

    key: torch.Tensor  # [L, H] fp32, above 0
    value: torch.Tensor  # [L, H] fp32, above 0
    # [L, H] or, one for all heads of a layer, [L, 1] fp32: of the queries that FlashAttention
    # takes as fp8. No other operation rounds queries.
    query: torch.Tensor


def check_scales(pages: torch.Tensor, kv_scales: KVScales | None, shape: torch.Size) -> None:
    """Raise AssertionError unless fp8 pages come with contiguous scales [L, H] of this shape, and
    others without."""
    assert (pages.dtype in FP8_DTYPES) == (kv_scales is not None)
    for scales in () if kv_scales is None else kv_scales[:2]:
        assert scales.shape == shape and scales.dtype == torch.float32 and scales.is_contiguous()


def logit_scales(scale: float, kv_scales: KVScales | None, layer: int) -> float | torch.Tensor:
    """What the products of queries with a layer's elements are multiplied with.

    Args:
        scale: of the softmax.

    Returns:
        [H, 1, 1] fp32, or the softmax scale where the elements are the keys themselves.
    """
    return scale if kv_scales is None else kv_scales.key[layer, :, None, None] * scale


def to_elements(numbers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers as elements of an fp8 dtype, rounded to the nearest; the largest element stands for
    all numbers beyond it, as in vLLM's cache write.

    Args:
        numbers: [..., H, D].
        scales: [H] fp32.
    """
    largest = torch.finfo(dtype).max
    return (numbers.float() / scales[:, None]).clamp(-largest, largest).to(dtype)
