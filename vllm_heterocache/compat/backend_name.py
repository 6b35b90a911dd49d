"""The name with which a user asks for the backend, as a member of vLLM's enum."""

from __future__ import annotations

from typing import Any

from vllm_heterocache.compat.names import check_vllm_version

BACKEND_NAME = "HETEROCACHE"
BACKEND_PATH = "vllm_heterocache.attention.backend.HeteroCacheBackend"


def register_backend_name() -> Any:
    """Add HETEROCACHE to vLLM's attention backends, as a member that survives pickling.

    Enum members pickle by value, and a spawned process unpickles its arguments before it loads
    plugins; this member pickles as a call instead.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum as backends

    if BACKEND_NAME in backends.__members__:
        return backends.__members__[BACKEND_NAME]
    member = backends.register(BACKEND_NAME, BACKEND_PATH)
    member.__reduce_ex__ = lambda protocol: (_restore_backend_name, ())
    return member


def _restore_backend_name() -> Any:
    """Unpickle the member in a spawned process: the whole plugin, or a loud failure."""
    from vllm_heterocache.plugin import register

    check_vllm_version()
    register()
    return register_backend_name()


def is_selected(vllm_config: Any) -> bool:
    """Whether the user asked for this backend."""
    backend = vllm_config.attention_config.backend
    return backend is not None and backend.name == BACKEND_NAME
