"""Where the plugin enters vLLM's start-up: the platform's class methods, and VllmConfig."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_heterocache.compat.backend_name import BACKEND_NAME, BACKEND_PATH, is_selected
from vllm_heterocache.compat.connectors import NIXL, OFFLOADING, asked_connectors
from vllm_heterocache.compat.drafters import (
    drafts_with_layers,
    is_of_draft_model,
    name_drafter_backend,
)
from vllm_heterocache.compat.engine_args import note_engine_args
from vllm_heterocache.compat.layer_kinds import mixes_sliding_layers
from vllm_heterocache.compat.platforms import STOCK_BACKENDS, platform_name

if TYPE_CHECKING:
    from collections.abc import Callable

WORKER_PATHS = {
    "cpu": "vllm_heterocache.worker.cpu_worker.HeteroCacheCPUWorker",
    "cuda": "vllm_heterocache.worker.gpu_worker.HeteroCacheGPUWorker",
}
PACKED_CPU_PATH = "vllm_heterocache.attention.packed_cpu.PackedCPUAttentionBackend"
CONNECTOR_NAME, CONNECTOR_MODULE = "HeteroConnector", "vllm_heterocache.connectors.hetero"
# where connectors of vLLM's are asked for beside ours
MULTI_CONNECTOR, MULTI_MODULE = "HeteroMultiConnector", "vllm_heterocache.connectors.multi"
# what is installed for a connector of vLLM's
PACKED_CONNECTORS = {
    OFFLOADING: ("PackedOffloadingConnector", "vllm_heterocache.connectors.offloading"),
    NIXL: ("PackedNixlConnector", "vllm_heterocache.connectors.nixl"),
}


def hook_platform(
    configure: Callable[[Any], None],
    warn_unselected: Callable[[Any], None],
    register_spec: Callable[[], None],
) -> None:
    """Wrap three class methods of the current platform, and the making of engine configs
    (engine_args.py); does nothing the second time.

    - `check_and_update_config`: ends VllmConfig's construction; `configure` runs after it where
      this backend is selected, and `warn_unselected` elsewhere. It runs once in the front end and
      once in the engine process.
    - `get_attn_backend_cls` (CPU): the CPU platform serves every model with CPU_ATTN otherwise,
      and layers that HeteroCache does not serve with a layout that is not the pool's.
    - `register_custom_kv_cache_specs`: vLLM's own hook for out-of-tree KV-cache specs.
    """
    from vllm.config.vllm import get_current_vllm_config_or_none
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    if "heterocache_hooked" in vars(platform):
        return
    platform.heterocache_hooked = True
    note_engine_args()
    check_config = platform.check_and_update_config
    backend_cls = platform.get_attn_backend_cls
    register_specs = platform.register_custom_kv_cache_specs

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        if is_of_draft_model(vllm_config):
            name_drafter_backend(vllm_config)
        if is_selected(vllm_config):
            prepare_block_size(vllm_config)
        check_config(vllm_config)
        if is_selected(vllm_config):
            configure(vllm_config)
        else:
            warn_unselected(vllm_config)

    def get_attn_backend_cls(cls: Any, selected_backend: Any, *args: Any, **kwargs: Any) -> str:
        if selected_backend is not None and selected_backend.name == BACKEND_NAME:
            return BACKEND_PATH
        config = get_current_vllm_config_or_none()
        if config is not None and has_connector(config):  # layers that slide, or of a drafter
            return PACKED_CPU_PATH
        return backend_cls(selected_backend, *args, **kwargs)

    def register_custom_kv_cache_specs(cls: Any, vllm_config: Any) -> None:
        register_specs(vllm_config)
        register_spec()

    platform.check_and_update_config = classmethod(check_and_update_config)
    platform.register_custom_kv_cache_specs = classmethod(register_custom_kv_cache_specs)
    if current_platform.is_cpu():
        platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def prepare_block_size(vllm_config: Any) -> None:
    """Blocks are pages of 16 tokens, unless the user named a size (which is checked later)."""
    cache = vllm_config.cache_config
    if not cache.user_specified_block_size:
        cache.block_size = 16
        cache.user_specified_block_size = True


def install(vllm_config: Any, additional_config: dict[str, Any]) -> None:
    """Point an already checked VllmConfig at the plugin's worker and connector. Idempotent."""
    from vllm.config import KVTransferConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    vllm_config.additional_config = {
        **(vllm_config.additional_config or {}),
        **additional_config,
    }
    platform = platform_name()
    assert platform is not None, "check_platform was here before"
    vllm_config.parallel_config.worker_cls = WORKER_PATHS[platform]
    vllm_config.scheduler_config.scheduler_reserve_full_isl = True
    own: dict[str, Any] = {
        "kv_connector": CONNECTOR_NAME,
        "kv_connector_module_path": CONNECTOR_MODULE,
        # With kv_role consumer, vLLM holds a finished request's blocks until in-flight steps end,
        # because connector loads could overwrite them, and blocks prefix-cache resets meanwhile.
        # Our copies are ordered by streams, so we register as producer.
        "kv_role": "kv_producer",
    }
    others = asked_connectors(vllm_config)
    if others:
        _install_beside(vllm_config, own, others)
    else:
        vllm_config.kv_transfer_config = KVTransferConfig(**own)
    # Layers that are vLLM's own would be served by HeteroCache otherwise, or with another layout.
    stock = AttentionBackendEnum[STOCK_BACKENDS[platform]]
    if platform == "cuda" and drafts_with_layers(vllm_config):
        vllm_config.speculative_config.attention_backend = stock
    if vllm_config.model_config is not None and mixes_sliding_layers(vllm_config.model_config):
        vllm_config.attention_config.backend_per_kind["sliding_window"] = stock


def _install_beside(vllm_config: Any, own: dict[str, Any], others: list[dict[str, Any]]) -> None:
    """Our connector and others, in one of vLLM's kind for several."""
    from vllm.config import KVTransferConfig

    transfer = vllm_config.kv_transfer_config
    packed = []
    for one in others:
        name, module = PACKED_CONNECTORS[one["kv_connector"]]
        packed.append({**one, "kv_connector": name, "kv_connector_module_path": module})
    of_all = (
        {}
        if transfer is None
        else {name: getattr(transfer, name) for name in ("engine_id", "kv_load_failure_policy")}
    )
    vllm_config.kv_transfer_config = KVTransferConfig(
        **of_all,
        kv_connector=MULTI_CONNECTOR,
        kv_connector_module_path=MULTI_MODULE,
        kv_role="kv_both",
        kv_connector_extra_config={"connectors": [own, *packed]},
    )
    # vLLM would name its own connector again
    vllm_config.cache_config.kv_offloading_size = None


def is_installed(vllm_config: Any) -> bool:
    """Whether `install` has already been here (VllmConfig is checked in two processes)."""
    return vllm_config.parallel_config.worker_cls in WORKER_PATHS.values()


def has_connector(vllm_config: Any) -> bool:
    """Whether the config is that of an engine that HeteroCache serves, or of its drafter."""
    transfer = vllm_config.kv_transfer_config
    return transfer is not None and transfer.kv_connector in (CONNECTOR_NAME, MULTI_CONNECTOR)
