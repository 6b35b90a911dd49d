"""The name with which a user asks for the backend, as a member of vLLM's enum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

BACKEND_NAME = "HETEROCACHE"
BACKEND_PATH = "vllm_heterocache.attention.backend.HeteroCacheBackend"


def register_backend_name(restore: Callable[[], Any]) -> Any:
    """Add HETEROCACHE to vLLM's attention backends, as a member that survives pickling.

    Enum members pickle by value, and a spawned process unpickles its arguments before it loads
    plugins; this member pickles as a call of `restore` instead, which loads the plugin there and
    returns the member.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum as backends

    if BACKEND_NAME in backends.__members__:
        return backends.__members__[BACKEND_NAME]
    member = backends.register(BACKEND_NAME, BACKEND_PATH)
    setattr(member, "__reduce_ex__", lambda protocol: (restore, ()))  # noqa: B010  (a method)
    return member


def is_selected(config: Any) -> bool:
    """Whether the user asked for this backend, for all layers or for those of a kind.

    Args:
        config: vLLM's config, or its engine arguments.
    """
    attention = config.attention_config
    backends = (attention.backend, *attention.backend_per_kind.values())
    return any(backend is not None and backend.name == BACKEND_NAME for backend in backends)
