"""Entry points: vLLM calls `register` in every process; nothing changes for other backends."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from vllm_heterocache.calibration.profile_cache import calibration_flags, resolve_profile
from vllm_heterocache.compat.backend_name import register_backend_name
from vllm_heterocache.compat.engine import workers_per_host
from vllm_heterocache.compat.hooks import (
    check_platform,
    check_runner,
    hook_platform,
    install,
    is_installed,
    platform_name,
)
from vllm_heterocache.compat.names import check_vllm_version
from vllm_heterocache.compat.vllm_cpu_metadata import alias_vllm_cpu_metadata
from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.policies import make_policy
from vllm_heterocache.startup.refusals import check_kernels, check_policy, check_vllm_config
from vllm_heterocache.startup.serving_plan import (
    all_assignments,
    check_host_pools,
    compact_min_tokens,
    needs_profile,
)

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
    hook_platform(configure, register_spec)


def configure(vllm_config: Any) -> None:
    """Check the options, resolve the head profile, and install worker and connector.

    Runs where HeteroCache is the selected backend, at the end of VllmConfig's construction, in
    the front end and again in the engine process (where everything is resolved already).

    Raises:
        OptionError: an option is wrong, infeasible or not supported together with another.
    """
    if is_installed(vllm_config):
        return
    try:
        config = resolve_options(vllm_config)
    except ValueError as error:
        raise OptionError(str(error)) from None
    install(vllm_config, config.to_additional_config())


def resolve_options(vllm_config: Any) -> HeteroCacheConfig:
    """The user's options, with everything in them that start-up decides.

    Raises:
        ValueError: an option is wrong, infeasible or not supported together with another.
    """
    config = HeteroCacheConfig.from_additional_config(vllm_config.additional_config)
    check_platform()
    check_runner(vllm_config)
    check_vllm_config(vllm_config)
    check_kernels(vllm_config, platform_name() or "")
    check_policy(vllm_config, make_policy(config), platform_name() or "")
    if needs_profile(config):
        profile = resolve_profile(
            config.profile, vllm_config.model_config, calibration_flags(vllm_config)
        )
        config = replace(config, profile_data=profile.to_json())
    assignments = all_assignments(vllm_config, config)
    config = replace(
        config,
        compact_min_tokens=compact_min_tokens(config, assignments),
        workers_per_host=workers_per_host(vllm_config.parallel_config),
    )
    check_host_pools(vllm_config, config, assignments)
    return config


def register_spec() -> None:
    """Tell vLLM which manager serves HeteroSpec.

    A group of its own: other layers of a model must not be merged into that group.
    """
    from vllm_heterocache.compat import KVCacheSpecRegistry
    from vllm_heterocache.kv_cache_spec import HeteroSpec
    from vllm_heterocache.scheduler.kv_cache_manager import HeteroManager

    KVCacheSpecRegistry.register(HeteroSpec, HeteroManager, uniform_type_base_spec=HeteroSpec)
