"""Scheduler side: the KV-cache manager, which gives prompt blocks back."""

from __future__ import annotations

from collections import Counter as Tally
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from vllm_heterocache.compat import FullAttentionManager, KVCacheBlock
from vllm_heterocache.scheduler.ledger import CompactionLedger
from vllm_heterocache.scheduler.prompt import Prompt, PromptState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vllm_heterocache.compat import Request
    from vllm_heterocache.kv_cache_spec import HeteroSpec


class Offload(Protocol):
    """What copies blocks to the host beside us, so that a later prompt finds them there."""

    def is_reading(self, request_id: str) -> bool: ...

    def forget(self, request_id: str, num_blocks: int) -> None: ...

    def overwrite(self, block_ids: list[int]) -> None: ...


class HeteroManager(FullAttentionManager):
    """Full attention until the prompt is prefilled; then the prompt lives in N_c(T) kernel blocks.

    With the first prefill chunk of such a request it tells the workers what is coming. With the
    last one it takes fresh blocks for N_c, which stand in no block table and carry no hash, and
    orders the workers to compact into them. When every worker has done so, the full prompt blocks
    go back to the pool; hashed ones stay prefix cache until they are evicted. The partial last
    prompt block and the decode blocks stay as in stock vLLM.

    This manager counts in blocks. The workers count in kernel blocks, and so do the messages.

    With `frees_prompt` False a compaction has no blocks and nothing goes back: it is an order to
    decode from page lists that name pages of the prompt's own blocks.
    """

    kv_cache_spec: HeteroSpec

    def __init__(self, kv_cache_spec: HeteroSpec, block_pool: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, block_pool, **kwargs)
        self.ledger = CompactionLedger()
        self.offload: Offload | None = None
        self._prompts: dict[str, Prompt] = {}

    @property
    def prompts(self) -> Mapping[str, Prompt]:
        """Prompts by request id: those that hold blocks, wait for admission or are kept dense."""
        return MappingProxyType(self._prompts)

    @property
    def compact_blocks(self) -> list[KVCacheBlock]:
        """Blocks that are held for compactions and stand in no block table."""
        return [block for prompt in self._prompts.values() for block in prompt.compact_blocks]

    def keep_dense(self, request_id: str) -> None:
        """Never compact the prompt of this new request: its input is streamed, or another engine
        will read its blocks."""
        self._prompts[request_id] = Prompt(request_id, state=PromptState.KEPT_DENSE)

    def end_request(self, request_id: str) -> None:
        """The request ends; freeing its blocks would not end a prompt that is kept dense."""
        prompt = self._prompts.get(request_id)
        if prompt is not None and prompt.state is PromptState.KEPT_DENSE:
            del self._prompts[request_id]

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Leave the tokens to be computed whose queries selection looks at."""
        at_least = at_most = max_length + 1  # vLLM leaves the last one, whose logits it needs
        if kv_cache_spec.has_drafter:
            # The hit of the drafter's layers may have shortened max_length before, and the hashes
            # of full blocks tell T within a block.
            hash_size = block_pool.hash_block_size
            at_least = max(at_least, len(block_hashes) * hash_size)
            at_most = max(at_most, (len(block_hashes) + 1) * hash_size - 1)
        if kv_cache_spec.is_compacted(at_most):
            max_length = min(max_length, max(0, at_least - kv_cache_spec.recomputed_tokens))
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
            admitted = self._prompts.setdefault(request_id, Prompt(request_id))
            # A prompt that is loaded from the host passes the gate again behind the load, and vLLM
            # asks what running prefills still need before it begins another load.
            if admitted.state in (PromptState.ADMITTED, PromptState.KEPT_DENSE):
                admitted.admit(num_tokens)
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
        prompt = self._prompts.get(request_id)
        if prompt is not None and prompt.is_prefilled_by(num_tokens_main_model):
            dense += self.kv_cache_spec.num_compact_blocks(prompt.num_tokens)
        return dense

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        new_blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        prompt = self._prompts.get(request_id)
        if prompt is not None:
            if prompt.state is PromptState.ADMITTED:
                self._begin_prefill(prompt)
            # `num_tokens` counts what a drafting model may add
            if prompt.is_prefilled_by(num_tokens_main_model):
                self._order_compaction(prompt)
        return new_blocks

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        super().cache_blocks(
            request,
            self.cacheable_tokens(request, num_tokens),
            retention_interval,
            replay_boundaries=replay_boundaries,
        )

    def cacheable_tokens(self, request: Request, num_tokens: int) -> int:
        """How many of its computed tokens may be prefix cache, in every KV-cache group.

        The prompt's only, where the request is compacted: what it generates was computed with
        sparse attention and is not what another request would compute.
        """
        prompt = self._prompts.get(request.request_id)
        if prompt is None or prompt.ticket is None:
            return num_tokens
        return min(num_tokens, request.num_prompt_tokens)

    def longest_hit(self, num_tokens: int) -> int:
        """Tokens that a prompt of T tokens finds in the prefix cache at most, where it is
        compacted."""
        return max(0, num_tokens - self.kv_cache_spec.recomputed_tokens)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        prompt = self._prompts.get(request_id)
        if prompt is None or prompt.state is not PromptState.ORDERED:
            return
        assert prompt.ticket is not None
        if self.ledger.is_refused(prompt.ticket):
            ticket, blocks = prompt.refuse()
            self.ledger.close(ticket)
            self.block_pool.free_blocks(blocks)
        elif self.ledger.is_done(prompt.ticket) and processed_computed_tokens >= prompt.num_tokens:
            self._give_back(prompt)

    def _give_back(self, prompt: Prompt) -> None:
        """The full prompt blocks, once nobody reads them."""
        if not self.kv_cache_spec.frees_prompt:
            prompt.compact()
            return
        request_id, num_full = prompt.request_id, prompt.num_tokens // self.block_size
        if self.offload is not None:
            if self.offload.is_reading(request_id):
                return  # until a later step
            self.offload.forget(request_id, num_full)
        prompt.compact()
        self._remove_blocks_in_range(request_id, 0, num_full)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks = super().pop_blocks_for_free(request_id)
        prompt = self._prompts.get(request_id)
        if prompt is None or prompt.state is PromptState.KEPT_DENSE:
            return blocks
        del self._prompts[request_id]
        self.ledger.withdraw(request_id)
        if prompt.ticket is not None:
            self.ledger.close(prompt.ticket)
        return prompt.compact_blocks + blocks

    def note_dead(self, block_ids: Iterable[int]) -> None:
        """These blocks were freed, and nothing can read them again (debugging)."""
        self.ledger.note_dead(self.kv_cache_spec.kernel_block_ids(block_ids))

    def check_integrity(self, *others: Any) -> None:
        """Raise AssertionError unless every block is free, or referenced as often as it counts.

        Valid where this manager and `others`, vLLM's own of other groups, are the pool's only
        users, no copy-on-write is pending and vLLM does not hold back frees for a step in flight.
        """
        tables = Tally(
            block.block_id
            for manager in (self, *others)
            for blocks in manager.req_to_blocks.values()
            for block in blocks
            if not block.is_null
        )
        compact = [block.block_id for block in self.compact_blocks]
        assert len(compact) == len(set(compact)), "two compactions share a block"
        assert tables.keys().isdisjoint(compact), "a compact block stands in a block table"
        held = tables + Tally(compact)
        for block in self.block_pool.blocks:
            assert block.is_null or block.ref_cnt == held[block.block_id]
        free = self.block_pool.get_num_free_blocks()
        assert free + len(held) == self.block_pool.num_gpu_blocks - 1
        tickets = [p.ticket for p in self._prompts.values() if p.ticket is not None]
        assert sorted(tickets) == self.ledger.tickets
        for prompt in self._prompts.values():
            self._check_prompt(prompt)

    def _check_prompt(self, prompt: Prompt) -> None:
        """Raise AssertionError unless the prompt holds what its state says."""
        ordered = prompt.state in (PromptState.ORDERED, PromptState.COMPACTED)
        num_compact = self.kv_cache_spec.num_compact_blocks(prompt.num_tokens) if ordered else 0
        assert (prompt.ticket is not None) == ordered
        assert len(prompt.compact_blocks) == num_compact
        table = self.req_to_blocks.get(prompt.request_id, [])
        assert prompt.state is not PromptState.ADMITTED or not table
        if prompt.state is PromptState.COMPACTED and self.kv_cache_spec.frees_prompt:
            num_full = prompt.num_tokens // self.block_size
            assert all(block.is_null for block in table[:num_full]), "a freed block is in a table"

    def _begin_prefill(self, prompt: Prompt) -> None:
        """With the first blocks of a prefill, tell the workers if it ends in a compaction."""
        if self.kv_cache_spec.is_compacted(prompt.num_tokens):
            prompt.announce()
            self.ledger.announce(prompt.request_id, prompt.num_tokens)
        else:
            prompt.stay_dense()

    def _order_compaction(self, prompt: Prompt) -> None:
        """Take N_c(T) fresh blocks, and order the workers to compact into them."""
        num_blocks = self.kv_cache_spec.num_compact_blocks(prompt.num_tokens)
        blocks = self.block_pool.get_new_blocks(num_blocks) if num_blocks else []
        block_ids = [block.block_id for block in blocks]
        if self.offload is not None:
            self.offload.overwrite(block_ids)
        ticket = self.ledger.open(
            prompt.request_id, prompt.num_tokens, self.kv_cache_spec.kernel_block_ids(block_ids)
        )
        prompt.order(ticket, blocks)
