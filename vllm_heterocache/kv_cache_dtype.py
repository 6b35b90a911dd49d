"""The dtype of a KV cache: what --kv-cache-dtype and the checkpoint say, and what the pool holds.

Works on the attributes of vLLM's `VllmConfig` and imports neither vLLM nor torch.
"""

from __future__ import annotations

from typing import Any

# torch's name of an element, by the fp8 dtypes that --kv-cache-dtype can name
FP8_ELEMENTS = {
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}


def kv_cache_dtype(vllm_config: Any) -> str:
    """The name of the KV cache's dtype; "auto" for the model's own.

    vLLM turns "auto" into the fp8 cache of some checkpoints before the plugin is asked, and of
    others when the worker makes the attention layers.
    """
    dtype: str = vllm_config.cache_config.cache_dtype
    if dtype == "auto" and declares_fp8(vllm_config):
        return "fp8"
    return dtype


def declares_fp8(vllm_config: Any) -> bool:
    """Whether the checkpoint asks for an fp8 KV cache."""
    return getattr(vllm_config.quant_config, "kv_cache_scheme", None) is not None


def element_bytes(vllm_config: Any) -> int:
    """Bytes of one number of the KV cache."""
    if kv_cache_dtype(vllm_config) in FP8_ELEMENTS:
        return 1
    itemsize: int = vllm_config.model_config.dtype.itemsize
    return itemsize


def dtype_of_model(config: Any) -> str:
    """Name of the dtype of a VllmConfig's model."""
    return str(config.model_config.dtype).removeprefix("torch.")
