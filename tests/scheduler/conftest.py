"""What vLLM's scheduler knows of the plugin's KV-cache specs, as in an engine."""

from __future__ import annotations

import pytest

from vllm_heterocache.compat import KVCacheSpecRegistry
from vllm_heterocache.plugin import register_spec


@pytest.fixture(autouse=True, scope="session")
def _registered_specs() -> None:
    KVCacheSpecRegistry._ensure_registered()
    register_spec()
