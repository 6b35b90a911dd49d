"""Our connector beside connectors of vLLM's, in one of vLLM's for several."""

from __future__ import annotations

from typing import Any

from vllm_heterocache.compat import MultiConnector, MultiKVConnectorStats
from vllm_heterocache.connectors.hetero import HeteroConnector
from vllm_heterocache.connectors.nixl import PackedNixlConnector
from vllm_heterocache.connectors.offloading import PackedOffloadingConnector

CONNECTORS = {
    one.__name__: one for one in (HeteroConnector, PackedOffloadingConnector, PackedNixlConnector)
}


class HeteroMultiConnector(MultiConnector):
    """Our connector first, and then those that the user asks for."""

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> MultiKVConnectorStats:
        """vLLM looks classes up by name, and knows its own alone."""
        built = {
            name: CONNECTORS[name].build_kv_connector_stats(stats)
            if isinstance(stats, dict)
            else stats
            for name, stats in (data or {}).items()
        }
        return MultiKVConnectorStats(data=built)
