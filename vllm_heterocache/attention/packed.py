"""The layout of the KV pool, which all backends that are served with it have."""

from __future__ import annotations

from vllm_heterocache.compat import AttentionBackend, KVCacheLayout, MultipleOf
from vllm_heterocache.config import PAGE_SIZE


class PackedBackend(AttentionBackend):
    """First base of a backend whose KV lies in the packed blocks of the pool."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Blocks outermost, then layers, heads, tokens of a block, and K beside V."""
        return (KVCacheLayout.BLHNC,)

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: object | None = None,
    ) -> list[int | MultipleOf]:
        """Whole pages."""
        return [MultipleOf(PAGE_SIZE)]
