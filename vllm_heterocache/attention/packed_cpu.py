"""Attention on the CPU of layers that HeteroCache does not serve (those that slide over a window,
and a drafter's): vLLM's, over blocks of the packed pool."""

from __future__ import annotations

from vllm_heterocache.compat import CPUAttentionBackend, KVCacheLayout, MultipleOf
from vllm_heterocache.config import PAGE_SIZE


class PackedCPUAttentionBackend(CPUAttentionBackend):
    """vLLM's attention on the CPU, whose kernels take blocks at any stride.

    vLLM admits its own layout and blocks of 32 tokens alone. On CUDA, FlashAttention admits the
    packed layout by itself.
    """

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """The layout of the pool that all layers share."""
        return (KVCacheLayout.BLHNC,)

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: object | None = None,
    ) -> list[int | MultipleOf]:
        return [MultipleOf(PAGE_SIZE)]
