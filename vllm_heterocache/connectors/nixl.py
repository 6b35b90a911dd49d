"""Prompts that one engine prefills and another one decodes, over vLLM's NixlConnector.

Installed by the plugin where vLLM's NixlConnector is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_heterocache.compat import NixlConnector
from vllm_heterocache.compat.nixl import is_sent, receive_first_blocks
from vllm_heterocache.connectors.packed import PackedConnector

if TYPE_CHECKING:
    from vllm_heterocache.compat import Request


class PackedNixlConnector(PackedConnector, NixlConnector):
    """Sends prompts that were never compacted, and receives prompts that are compacted here.

    The tokens whose queries selection looks at are no part of what is received: they are computed
    here, as behind a hit in the prefix cache. Both engines have the same layout of the pool.
    """

    def on_new_request(self, request: Request) -> None:
        super().on_new_request(request)
        if is_sent(request):
            assert self._manager is not None
            self._manager.keep_dense(request.request_id)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        count, is_async = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if not count:
            return count, is_async
        count = min(count, self._receivable_tokens(request) - num_computed_tokens)
        return max(0, count), is_async and count > 0

    def _receivable_tokens(self, request: Request) -> int:
        """First tokens of a prompt that may come from elsewhere: whole blocks, where it is to be
        compacted here."""
        assert self._manager is not None
        spec, num_tokens = self._manager.kv_cache_spec, request.num_tokens
        if not spec.is_compacted(num_tokens):
            return num_tokens
        return max(0, num_tokens - spec.recomputed_tokens) // spec.block_size * spec.block_size

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        if num_external_tokens > 0:
            receive_first_blocks(request, len(blocks.blocks[0]))
        super().update_state_after_alloc(request, blocks, num_external_tokens)
