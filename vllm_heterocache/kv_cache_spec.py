"""The KV-cache spec of the layers that HeteroCache serves; scheduler and workers both read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_heterocache.compat import FullAttentionSpec
from vllm_heterocache.heads.budget import compact_blocks

if TYPE_CHECKING:
    from vllm_heterocache.compat import VllmConfig


@dataclass(frozen=True, kw_only=True)
class HeteroSpec(FullAttentionSpec):
    """KV-cache spec of layers served by HeteroCache; equal on every layer and rank."""

    gpu_budget: float
    compact_min_tokens: int
    recomputed_tokens: int = 1
    """Last tokens of a prompt that no prefix-cache hit covers, where the prompt is compacted."""
    frees_prompt: bool = True  # False: compacted prompts stay in their dense blocks

    def is_compacted(self, num_tokens: int) -> bool:
        """Whether a prompt of T tokens is to be decoded from page lists."""
        return num_tokens >= self.compact_min_tokens

    def num_compact_blocks(self, num_tokens: int) -> int:
        """N_c(T): blocks a prompt of T tokens is copied into; 0 where it stays where it is."""
        if not self.frees_prompt or not self.is_compacted(num_tokens):
            return 0
        return compact_blocks(num_tokens, self.gpu_budget, self.block_size)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """The dense peak of one request of max_model_len, its compact blocks included."""
        dense = super().max_memory_usage_bytes(vllm_config)
        extra = self.num_compact_blocks(vllm_config.model_config.max_model_len)
        return dense + extra * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[HeteroSpec]) -> HeteroSpec:
        assert all(spec == specs[0] for spec in specs), "layers of one group must agree"
        return specs[0]
