"""The KV-cache specs of the layers that HeteroCache serves and of a drafter's own layers; scheduler
and workers both read them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from vllm_heterocache.compat import FullAttentionSpec
from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.heads.budget import compact_blocks, shortest_compacted, whole_blocks
from vllm_heterocache.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vllm_heterocache.compat import VllmConfig


@dataclass(frozen=True, kw_only=True)
class HeteroSpec(FullAttentionSpec):
    """KV-cache spec of layers served by HeteroCache; equal on every layer and rank."""

    gpu_budget: float
    compact_min_tokens: int
    """See `ServingPlan.compact_min_tokens`."""
    recomputed_tokens: int = 1
    """Last tokens of a prompt that no prefix-cache hit covers, where the prompt is compacted."""
    frees_prompt: bool = True  # False: compacted prompts stay in their dense blocks
    has_drafter: bool = False  # layers of a drafter have a KV-cache group beside this one

    @property
    def kernel_blocks(self) -> int:
        """Kernel blocks of a block: one in most models, more beside recurrent layers."""
        return self.block_size // PAGE_SIZE

    def kernel_block_ids(self, block_ids: Iterable[int]) -> list[int]:
        """Of all kernel blocks of these blocks, in their order."""
        num = self.kernel_blocks
        return [block_id * num + i for block_id in block_ids for i in range(num)]

    @functools.cached_property
    def shortest_compacted(self) -> int:
        """Tokens of the shortest prompt that is to be decoded from page lists."""
        if not self.frees_prompt:
            return self.compact_min_tokens
        return shortest_compacted(self.compact_min_tokens, self.gpu_budget, self.block_size)

    def is_compacted(self, num_tokens: int) -> bool:
        """Whether a prompt of T tokens is to be decoded from page lists."""
        return num_tokens >= self.shortest_compacted

    def num_compact_blocks(self, num_tokens: int) -> int:
        """Blocks a prompt of T tokens is copied into: room for N_c(T) kernel blocks, or none where
        the prompt stays where it is."""
        if not self.frees_prompt or not self.is_compacted(num_tokens):
            return 0
        return whole_blocks(compact_blocks(num_tokens, self.gpu_budget), self.block_size)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """The dense peak of one request of max_model_len, its compact blocks included."""
        dense = super().max_memory_usage_bytes(vllm_config)
        extra = self.num_compact_blocks(vllm_config.model_config.max_model_len)
        return dense + extra * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[HeteroSpec]) -> HeteroSpec:
        assert all(spec == specs[0] for spec in specs), "layers of one group must agree"
        return specs[0]


# A drafter's block holds the tokens of at most this many blocks of the model: prefix-cache hits end
# at the end of such a block. Beside recurrent layers blocks of the model are large.
MAX_DRAFTER_BLOCKS, MAX_LARGE_BLOCKS = 32, 8
PAGE_ALIGNMENT = 64  # bytes


@dataclass(frozen=True, kw_only=True)
class DrafterSpec(FullAttentionSpec):
    """KV-cache spec of a drafter's own layers, which vLLM serves; equal on every layer and rank.

    The type alone keeps these layers in a KV-cache group of their own, so that they have a block
    table of their own, from which nothing is freed before the request ends.
    """

    @classmethod
    def merge(cls, specs: list[DrafterSpec]) -> DrafterSpec:
        assert all(spec == specs[0] for spec in specs), "layers of one group must agree"
        return specs[0]


def drafter_block_size(block_bytes: int, drafter_bytes: int, block_size: int) -> int:
    """Tokens of a drafter's block: those of whole blocks of the target, as many as fit one of them.

    Args:
        block_bytes: a block of the target's pool on a rank.
        drafter_bytes: as many tokens in all layers of the drafter on that rank.
        block_size: tokens of a block of the target.

    Raises:
        Refusal: a block of the target has no room for its own tokens in the drafter's layers.
    """
    most = MAX_DRAFTER_BLOCKS if block_size == PAGE_SIZE else MAX_LARGE_BLOCKS
    num_blocks = min(block_bytes // drafter_bytes, most)
    if num_blocks == 0:
        raise Refusal(
            "--attention-backend heterocache does not support this drafter in speculative_config: "
            f"{block_size} tokens take {drafter_bytes:,} bytes of KV in its layers and "
            f"{block_bytes:,} in those of the model",
            "use a drafter with fewer or smaller layers",
        )
    return num_blocks * block_size


def drafter_specs(
    stock: Mapping[str, FullAttentionSpec], target: Mapping[str, HeteroSpec]
) -> dict[str, DrafterSpec]:
    """Specs of a drafter's layers, whose blocks fill a block of the target's pool as far as whole
    pages do.

    vLLM gives both groups blocks of one size from one pool. A drafter has fewer or smaller layers,
    so its block holds more tokens.

    Args:
        stock: vLLM's specs of the drafter's layers by name, of blocks of as many tokens as the
            target's.
        target: the specs of the target's layers on this rank.

    Raises:
        ValueError: a block of the target has no room for a page of each of the drafter's layers.
    """
    block_bytes = sum(spec.page_size_bytes for spec in target.values())
    drafter_bytes = sum(spec.page_size_bytes for spec in stock.values())
    (target_size,) = {spec.block_size for spec in (*target.values(), *stock.values())}
    block_size = drafter_block_size(block_bytes, drafter_bytes, target_size)
    specs = {
        name: DrafterSpec(
            **{f.name: getattr(spec, f.name) for f in fields(spec)} | {"block_size": block_size}
        )
        for name, spec in stock.items()
    }
    target_pages = {spec.page_size_bytes for spec in target.values()}
    if len(specs) == len(target) or target_pages.isdisjoint(
        spec.page_size_bytes for spec in specs.values()
    ):
        return specs
    # Where all pages are of one size, vLLM cuts the larger group into groups as large as the other.
    padded = block_bytes // len(specs) // PAGE_ALIGNMENT * PAGE_ALIGNMENT
    assert target_pages.isdisjoint([padded])
    return {name: replace(spec, page_size_padded=padded) for name, spec in specs.items()}
