"""Scheduler side: the KV-cache spec and its manager, which gives prompt blocks back."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Sequence
from typing import NamedTuple

from vllm_heterocache.compat import FullAttentionManager, KVCacheBlock
from vllm_heterocache.scheduler.ledger import ledger_of


class Compaction(NamedTuple):
    """Blocks that a request's prompt is compacted into."""

    ticket: int
    num_tokens: int  # T
    blocks: list[KVCacheBlock]


class HeteroManager(FullAttentionManager):
    """Full attention until the prompt is prefilled; then the prompt lives in N_c(T) blocks.

    With the first prefill chunk of such a request it tells the workers what is coming. With the
    last one it takes N_c fresh blocks, which stand in no block table and carry no hash, and orders
    the workers to compact into them. When every worker has done so, the full prompt blocks go back
    to the pool; hashed ones stay prefix cache until they are evicted. The partial last prompt block
    and the decode blocks stay as in stock vLLM.

    With `frees_prompt` False a compaction has no blocks and nothing goes back: it is an order to
    decode from page lists that name pages of the prompt's own blocks.
    """

    def __init__(self, kv_cache_spec, block_pool, **kwargs) -> None:
        super().__init__(kv_cache_spec, block_pool, **kwargs)
        self._ledger = ledger_of(block_pool)
        self._targets: dict[str, int] = {}  # T of each admitted request
        self._announced: set[str] = set()
        self._compactions: dict[str, Compaction] = {}
        self._prompt_freed: set[str] = set()
        self._refused: set[str] = set()

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes,
        max_length,
        kv_cache_group_ids,
        block_pool,
        kv_cache_spec,
        *args,
        **kwargs,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Leave the tokens to be computed whose queries selection looks at."""
        num_tokens = max_length + 1  # vLLM leaves the last one, whose logits it needs
        if kv_cache_spec.is_compacted(num_tokens):
            max_length = max(0, num_tokens - kv_cache_spec.recomputed_tokens)
        return super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **kwargs
        )

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        if apply_admission_cap:
            # The admission gate asks for the whole prefill, replayed output tokens included.
            self._targets[request_id] = num_tokens
        dense = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )
        if self._is_to_be_ordered(request_id, num_tokens):
            dense += self.kv_cache_spec.num_compact_blocks(self._targets[request_id])
        return dense

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        new_blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        self._announce(request_id)
        if self._is_to_be_ordered(request_id, num_tokens):
            target = self._targets[request_id]
            num_blocks = self.kv_cache_spec.num_compact_blocks(target)
            blocks = self.block_pool.get_new_blocks(num_blocks) if num_blocks else []
            ticket = self._ledger.open(request_id, target, [b.block_id for b in blocks])
            self._compactions[request_id] = Compaction(ticket, target, blocks)
        return new_blocks

    def cache_blocks(
        self, request, num_tokens, retention_interval=None, *, replay_boundaries
    ) -> None:
        """Publish prompt blocks only, where the request is compacted: what it generates was
        computed with sparse attention and is not what another request would compute."""
        if request.request_id in self._compactions:
            num_tokens = min(num_tokens, request.num_prompt_tokens)
        super().cache_blocks(
            request, num_tokens, retention_interval, replay_boundaries=replay_boundaries
        )

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        compaction = self._compactions.get(request_id)
        if compaction is None or request_id in self._prompt_freed:
            return
        if self._ledger.is_refused(compaction.ticket):
            self._drop_compaction(request_id)
            self._refused.add(request_id)
        elif (
            self.kv_cache_spec.frees_prompt
            and self._ledger.is_done(compaction.ticket)
            and processed_computed_tokens >= compaction.num_tokens
        ):
            self._remove_blocks_in_range(request_id, 0, compaction.num_tokens // self.block_size)
            self._prompt_freed.add(request_id)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks = super().pop_blocks_for_free(request_id)
        self._targets.pop(request_id, None)
        self._announced.discard(request_id)
        self._ledger.withdraw(request_id)
        self._prompt_freed.discard(request_id)
        self._refused.discard(request_id)
        compaction = self._compactions.pop(request_id, None)
        if compaction is None:
            return blocks
        self._ledger.close(compaction.ticket, len(compaction.blocks))
        return compaction.blocks + blocks

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is free, or referenced as often as it counts.

        Valid where this manager is the pool's only user, no copy-on-write is pending and vLLM
        does not hold back frees for a step in flight.
        """
        tables = Tally(
            block.block_id
            for blocks in self.req_to_blocks.values()
            for block in blocks
            if not block.is_null
        )
        compact = [b.block_id for c in self._compactions.values() for b in c.blocks]
        assert len(compact) == len(set(compact)) == self._ledger.compact_blocks
        assert tables.keys().isdisjoint(compact), "a compact block stands in a block table"
        held = tables + Tally(compact)
        for block in self.block_pool.blocks:
            assert block.is_null or block.ref_cnt == held[block.block_id]
        free = self.block_pool.get_num_free_blocks()
        assert free + len(held) == self.block_pool.num_gpu_blocks - 1
        assert self._prompt_freed <= self._compactions.keys()
        assert self._compactions.keys() <= self._announced <= self._targets.keys()

    def _announce(self, request_id: str) -> None:
        """With the first blocks of a prefill, tell the workers if it ends in a compaction."""
        target = self._targets.get(request_id)
        if target is None or request_id in self._announced:
            return
        self._announced.add(request_id)
        if self._is_compactable(request_id, target):
            self._ledger.announce(request_id, target)

    def _is_to_be_ordered(self, request_id: str, num_tokens: int) -> bool:
        """Whether `num_tokens` completes a prefill whose compaction does not exist yet."""
        target = self._targets.get(request_id)
        if target is None or num_tokens < target:
            return False
        if request_id in self._compactions or request_id in self._refused:
            return False
        return self._is_compactable(request_id, target)

    def _is_compactable(self, request_id: str, num_tokens: int) -> bool:
        return request_id not in self._ledger.kept_dense and self.kv_cache_spec.is_compacted(
            num_tokens
        )

    def _drop_compaction(self, request_id: str) -> None:
        compaction = self._compactions.pop(request_id)
        self._ledger.close(compaction.ticket, len(compaction.blocks))
        self.block_pool.free_blocks(compaction.blocks)
