"""The attention backend: write KV, attend, and leave behind what selection and drift need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vllm_heterocache import compat
from vllm_heterocache.attention.metadata import HeteroCacheMetadata, HeteroCacheMetadataBuilder
from vllm_heterocache.attention.packed import PackedBackend
from vllm_heterocache.compat import (
    AttentionImpl,
    AttentionType,
)

if TYPE_CHECKING:
    from vllm_heterocache.compat import AttentionLayer, CacheDType
    from vllm_heterocache.worker.runtime import HeteroCacheRuntime


class HeteroCacheBackend(PackedBackend):
    """vLLM's view of the backend. K and V of a token lie behind one another, heads before
    tokens, and all layers of a block are packed (kernels/README.md). A block of several pages is
    divided here and not by vLLM, which cannot divide blocks of this layout."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = [
        "auto",
        "float16",
        "bfloat16",
        "fp8",
        "fp8_e4m3",
        "fp8_e5m2",
    ]

    @staticmethod
    def get_name() -> str:
        return "HETEROCACHE"

    @staticmethod
    def get_impl_cls() -> type[HeteroCacheImpl]:
        return HeteroCacheImpl

    @staticmethod
    def get_builder_cls() -> type[HeteroCacheMetadataBuilder]:
        return HeteroCacheMetadataBuilder

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        """FlashAttention, which prefills on CUDA, takes no float32."""
        return dtype in cls.supported_dtypes and (
            dtype != torch.float32 or compat.current_platform.is_cpu()
        )

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        """Kernels read one scale for each KV head."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """Kernels take sinks. Where FlashAttention takes none, the layer says so."""
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER


class HeteroCacheImpl(AttentionImpl[HeteroCacheMetadata]):
    """One attention layer. The worker sets the attributes below."""

    runtime: HeteroCacheRuntime | None = None  # while there is a KV pool
    # Of this layer, [num_kernel_blocks, H, PAGE_SIZE, 2 * head_dim] in the dtype of its elements,
    # as long. vLLM's own view has whole blocks, in which layer lies behind layer.
    kernel_blocks: torch.Tensor
    layer_index: int  # of this rank, in block order

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **extra: Any,
    ) -> None:
        unknown = ", ".join(name for name, value in extra.items() if value is not None)
        unsupported = {
            "ALiBi": alibi_slopes,
            "a sliding window": sliding_window,
            "KV sharing between layers": kv_sharing_target_layer_name,
            f"attention of type {AttentionType(attn_type).value}": (
                attn_type != AttentionType.DECODER or None
            ),
            f"attention with {unknown}": unknown or None,
        }
        for feature, value in unsupported.items():
            if value is not None:
                raise ValueError(
                    f"--attention-backend heterocache does not support {feature}, which this "
                    "model uses; serve it with another attention backend."
                )
        if sinks is not None and not _prefills_with_sinks():
            raise ValueError(
                "--attention-backend heterocache does not support attention sinks, which this "
                "model uses, on this GPU: its FlashAttention, which prefills, takes none; serve "
                "the model with another attention backend."
            )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        # a logit without a value for each query head [num_heads]; weights, loaded later
        self.sinks, self.soft_cap = sinks, logits_soft_cap or 0.0
        self.head_size, self.scale = head_size, float(scale)
        self.kv_cache_dtype = kv_cache_dtype

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write the new tokens' K and V ([num_tokens, H, head_dim]) to their token slots; padding
        has slot -1. `kv_cache` is vLLM's view, and not used."""
        if self.runtime is not None:
            self.runtime.write_kv(layer, key, value, self.kernel_blocks, slot_mapping)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: HeteroCacheMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one layer.

        Args:
            query: [num_tokens, num_q_heads, head_dim].
            kv_cache: vLLM's view, which is not used.
            output: [num_tokens, num_q_heads, head_dim], written in place.
        """
        if attn_metadata is None or self.runtime is None:  # vLLM's profiling run
            return output.fill_(0)
        decodes, prefills = attn_metadata.decodes, attn_metadata.prefills
        if decodes is not None:
            self.runtime.decode(self.layer_index, query, decodes, output)
        if prefills is not None:
            kept = attn_metadata.kept
            blocks = self.kernel_blocks
            self.runtime.prefill(self.layer_index, query, blocks, prefills, output, kept)
        return output


def _prefills_with_sinks() -> bool:
    return compat.current_platform.is_cpu() or compat.flash_attn_supports_sinks()
