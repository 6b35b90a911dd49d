"""vLLM's offloading of prefix-cache blocks to the host, beside the connector of this plugin.

Installed by the plugin where vLLM's OffloadingConnector is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_heterocache.compat import OffloadingConnector
from vllm_heterocache.compat.offloading import forget_blocks, has_transfers, note_allocated
from vllm_heterocache.connectors.packed import PackedConnector

if TYPE_CHECKING:
    from vllm_heterocache.compat import Request


class PackedOffloadingConnector(PackedConnector, OffloadingConnector):
    """Copies prompt blocks to the host while they are dense, and back in place of a prefill.

    vLLM counts on a running request to keep its blocks until their copies have arrived. A prompt
    that is compacted gives them back while its request runs, so its manager asks here first.
    """

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        assert self._manager is not None
        self._manager.offload = self

    def is_reading(self, request_id: str) -> bool:
        """Whether copies from the blocks of this request are on their way, or may still be."""
        return has_transfers(self.scheduler, request_id)

    def forget(self, request_id: str, num_blocks: int) -> None:
        """The first blocks of this request go back to the pool and hold its prompt no more."""
        forget_blocks(self.scheduler, request_id, num_blocks)

    def overwrite(self, block_ids: list[int]) -> None:
        """These free blocks are written in this step, and stand in no block table: copies from
        them that a former owner left under way end before the step."""
        note_allocated(self.scheduler, block_ids)

    def _max_loadable_tokens(self, request: Request, num_computed_tokens: int) -> int:
        """Leave the tokens to be computed whose queries selection looks at."""
        assert self._manager is not None
        spec, num_tokens = self._manager.kv_cache_spec, request.num_tokens
        left = spec.recomputed_tokens if spec.is_compacted(num_tokens) else 1
        return max(0, num_tokens - left - num_computed_tokens)
