"""A connector of vLLM's that copies blocks of the pool, beside ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_heterocache.compat import KVConnectorBase_V1
from vllm_heterocache.compat.engine import kv_cache_managers
from vllm_heterocache.scheduler.kv_cache_manager import HeteroManager

if TYPE_CHECKING:
    from vllm_heterocache.compat import VllmConfig


class PackedConnector(KVConnectorBase_V1):
    """First base of what is installed for a connector of vLLM's; the second is that connector."""

    _manager: HeteroManager | None = None  # in the scheduler

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """The layout of the pool, whose blocks are copied whole."""
        return "BLHNC"

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._manager, _ = kv_cache_managers(kv_cache_manager, HeteroManager)
