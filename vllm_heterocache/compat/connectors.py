"""vLLM's KV connectors that the user asks for beside ours."""

from __future__ import annotations

from typing import Any

OFFLOADING, NIXL, MULTI = "OffloadingConnector", "NixlConnector", "MultiConnector"
# Fields of vLLM's KVTransferConfig that are the connector's own. The engine's id is that of all.
OWN_FIELDS = (
    "kv_connector",
    "kv_connector_module_path",
    "kv_role",
    "kv_buffer_device",
    "kv_port",
    "kv_connector_extra_config",
    "enable_permute_local_kv",
    "kv_load_failure_policy",
)


def asked_connectors(vllm_config: Any) -> list[dict[str, Any]]:
    """Fields of KVTransferConfig of each connector that is asked for, in the user's order.

    `--kv-transfer-config` asks for one, or for several in a MultiConnector. `--kv-offloading-size`
    asks for vLLM's OffloadingConnector; vLLM writes it into the former only after the plugin was
    asked.
    """
    transfer, size = vllm_config.kv_transfer_config, vllm_config.cache_config.kv_offloading_size
    asked: list[dict[str, Any]] = []
    if transfer is not None and transfer.kv_connector is not None:
        own = {name: getattr(transfer, name) for name in OWN_FIELDS if hasattr(transfer, name)}
        several = own.get("kv_connector_extra_config", {}).get("connectors")
        is_multi = is_vllms(own, MULTI) and several is not None
        asked += [dict(one) for one in several] if is_multi else [own]
    if size is not None:
        offloading = next((one for one in asked if is_vllms(one, OFFLOADING)), None)
        if offloading is None:
            offloading = {"kv_connector": OFFLOADING, "kv_role": "kv_both"}
            asked.append(offloading)
        extra = offloading.get("kv_connector_extra_config", {})
        given = {"cpu_bytes_to_use": size * (1 << 30)}
        offloading["kv_connector_extra_config"] = {**extra, **given}
    return asked


def is_vllms(asked: dict[str, Any], name: str) -> bool:
    """Whether this is vLLM's connector of that name, and no namesake."""
    is_named = asked.get("kv_connector") == name
    return is_named and asked.get("kv_connector_module_path") is None


def options_of(vllm_config: Any, name: str) -> dict[str, Any] | None:
    """The extra configuration of vLLM's connector of that name; None where it is not asked for."""
    for one in asked_connectors(vllm_config):
        if is_vllms(one, name):
            return one.get("kv_connector_extra_config", {})
    return None
