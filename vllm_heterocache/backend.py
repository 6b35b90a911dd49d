"""The attention backend: write KV, attend, and leave behind what selection and drift need."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_heterocache.compat import (
    AttentionBackend,
    AttentionImpl,
    AttentionType,
    MultipleOf,
)
from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.kernels.paged_decode_ref import paged_decode_ref
from vllm_heterocache.kernels.prefill_attention_ref import (
    gather_dense_ref,
    prefill_attention_ref,
)
from vllm_heterocache.metadata import HeteroCacheMetadata, HeteroCacheMetadataBuilder
from vllm_heterocache.runtime import HeteroCacheRuntime


class HeteroCacheBackend(AttentionBackend):
    """vLLM's view of the backend. K and V of a token lie behind one another, heads before
    tokens, and all layers of a block are packed (kernels/README.md)."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "HETEROCACHE"

    @staticmethod
    def get_impl_cls() -> type[HeteroCacheImpl]:
        return HeteroCacheImpl

    @staticmethod
    def get_builder_cls() -> type[HeteroCacheMetadataBuilder]:
        return HeteroCacheMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return num_blocks, num_kv_heads, block_size, 2 * head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        return (1, 0, 2, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)

    @classmethod
    def get_required_kv_cache_layout(cls) -> str | None:
        return "HND"

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        return [PAGE_SIZE]

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @staticmethod
    def use_cascade_attention(*args, **kwargs) -> bool:
        return False


class HeteroCacheImpl(AttentionImpl[HeteroCacheMetadata]):
    """One attention layer. The worker sets `runtime` and `layer_index` after loading."""

    runtime: HeteroCacheRuntime
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
        **extra,
    ) -> None:
        unsupported = {
            "ALiBi": alibi_slopes,
            "a sliding window": sliding_window,
            "logits soft-capping": logits_soft_cap or None,
            "KV sharing between layers": kv_sharing_target_layer_name,
            "attention sinks": extra.get("sinks"),
        }
        for feature, value in unsupported.items():
            if value is not None:
                raise ValueError(
                    f"--attention-backend heterocache does not support {feature}, which this "
                    "model uses; serve it with another attention backend."
                )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_size, self.scale = head_size, float(scale)

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write the new tokens' K and V ([num_tokens, H, head_dim]) to their slots; padding
        has slot -1."""
        num_tokens = slot_mapping.shape[0]
        written = (slot_mapping >= 0).nonzero().flatten()
        slots = slot_mapping[written]
        blocks, offsets = slots // PAGE_SIZE, slots % PAGE_SIZE
        kv = torch.cat((key[:num_tokens], value[:num_tokens]), dim=-1)
        kv_cache[blocks, :, offsets] = kv[written]

    def forward(
        self,
        layer: torch.nn.Module,
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
            kv_cache: [num_blocks, H, page_size, 2 * head_dim], already holding the new tokens.
            output: [num_tokens, num_q_heads, head_dim], written in place.
        """
        if attn_metadata is None:  # vLLM's profiling run
            return output.fill_(0)
        for token, capture in attn_metadata.captures:
            capture.last_query[self.layer_index] = query[token]
        self._prefill(query, kv_cache, attn_metadata, output)
        if attn_metadata.decode_requests:
            self._decode(query, attn_metadata, output)
        return output

    def _prefill(self, query, kv_cache, metadata: HeteroCacheMetadata, output) -> None:
        for row in metadata.prefills:
            keys, values = gather_dense_ref(kv_cache, row.blocks, row.num_tokens)
            chunk = query[row.tokens]
            output[row.tokens] = prefill_attention_ref(chunk, keys, values, self.scale)
            if self.runtime.probe is not None:
                self.runtime.probe.observe(
                    self.runtime.group.layer_ids[self.layer_index],
                    chunk,
                    row.num_tokens - chunk.shape[0],
                    keys.transpose(0, 1),
                )

    def _decode(self, query, metadata: HeteroCacheMetadata, output) -> None:
        runtime, layer = self.runtime, self.layer_index
        scores = [
            {} if request is None else runtime.score_buffers(request, layer)
            for request in metadata.decode_requests
        ]
        output[metadata.decode_tokens] = paged_decode_ref(
            query[metadata.decode_tokens],
            runtime.pool,
            metadata.page_lists(runtime, layer),
            metadata.decode_block_table,
            metadata.decode_seq_lens,
            layer,
            runtime.group.num_layers,
            self.scale,
            scores,
        )
