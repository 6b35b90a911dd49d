"""Dtypes that the KV cache cannot have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_heterocache.kv_cache_dtype import (
    FP8_ELEMENTS,
    declares_fp8,
    dtype_of_model,
    kv_cache_dtype,
)
from vllm_heterocache.refusal import Refusal
from vllm_heterocache.startup.refusals.common import sentence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm_heterocache.refusal import Sentence

CACHE_DTYPES = ("float16", "bfloat16")  # those that --kv-cache-dtype can name


def dtype_of_pages(config: Any) -> Iterator[Sentence]:
    dtype, model_dtype = kv_cache_dtype(config), dtype_of_model(config)
    if dtype in ("auto", model_dtype, *FP8_ELEMENTS):
        return
    named = model_dtype in CACHE_DTYPES
    yield sentence(
        f"kv_cache_dtype={dtype!r}",
        f"pages hold keys and values in fp8 or in the model's own precision, dtype={model_dtype!r}",
        f"use --kv-cache-dtype {model_dtype}" if named else "remove --kv-cache-dtype",
    )


def layers_of_other_dtypes(config: Any) -> Iterator[Sentence]:
    layers = config.cache_config.kv_cache_dtype_skip_layers
    if layers and kv_cache_dtype(config) in FP8_ELEMENTS:
        yield sentence(
            f"kv_cache_dtype_skip_layers={layers}",
            "a block holds a page of every layer, all in one dtype",
            "remove --kv-cache-dtype-skip-layers",
        )


def check_fp8_prefill(
    vllm_config: Any, platform: str, prefills: Callable[[str, int], bool]
) -> None:
    """Raise Refusal for an fp8 KV cache that FlashAttention cannot prefill on this GPU.

    Args:
        platform: "cpu" or "cuda"; the references that the CPU runs take every fp8 dtype.
        prefills: whether FlashAttention takes a KV cache of this dtype, with heads of this size.
    """
    model = vllm_config.model_config
    if platform == "cpu" or model is None:
        return
    dtype, head_size = kv_cache_dtype(vllm_config), model.get_head_size()
    if dtype not in FP8_ELEMENTS:
        return
    if prefills(dtype, head_size):
        _check_fp8_output(vllm_config, dtype)
        return
    other = "fp8" if prefills("fp8", head_size) else dtype_of_model(vllm_config)
    origin = ", which the checkpoint declares" if declares_fp8(vllm_config) else ""
    raise Refusal(
        *sentence(
            f"kv_cache_dtype={dtype!r}{origin}",
            "FlashAttention, which prefills, does not take it on this GPU",
            f"use --kv-cache-dtype {other}",
        )
    )


def _check_fp8_output(vllm_config: Any, cache_dtype: str) -> None:
    model_dtype = dtype_of_model(vllm_config)
    if model_dtype != "bfloat16":
        raise Refusal(
            *sentence(
                f"kv_cache_dtype={cache_dtype!r} with dtype={model_dtype!r}",
                "FlashAttention, which prefills, answers in bfloat16 where the KV cache is fp8",
                f"use --dtype bfloat16 or --kv-cache-dtype {model_dtype}",
            )
        )
