"""vLLM's offloading connector: its configuration beside ours, and its book of transfers."""

from __future__ import annotations

from typing import Any

OFFLOADING = "OffloadingConnector"


def offloading_options(vllm_config: Any) -> dict[str, Any] | None:
    """The extra configuration of vLLM's OffloadingConnector; None where it is not asked for.

    `--kv-offloading-size` asks for it, or `--kv-transfer-config`. The former becomes the latter
    only after the plugin was asked.
    """
    transfer, cache = vllm_config.kv_transfer_config, vllm_config.cache_config
    size = cache.kv_offloading_size
    named = transfer is not None and transfer.kv_connector == OFFLOADING
    named = named and transfer.kv_connector_module_path is None
    if size is None and not named:
        return None
    options = dict(transfer.kv_connector_extra_config) if named else {}
    if size is not None:
        options["cpu_bytes_to_use"] = size * (1 << 30)
    return options


def has_transfers(scheduler: Any, request_id: str) -> bool:
    """Whether copies of this request's blocks are under way.

    Args:
        scheduler: vLLM's OffloadingConnectorScheduler.
    """
    status = scheduler._req_status.get(request_id)
    return status is not None and bool(status.transfer_jobs)


def forget_blocks(scheduler: Any, request_id: str, num_blocks: int) -> None:
    """Let the first blocks of this request never be copied again: vLLM skips block 0, as it does
    where a sliding window has passed."""
    status = scheduler._req_status.get(request_id)
    if status is None:
        return
    for group in status.group_states:
        known = min(num_blocks, len(group.block_ids))
        group.block_ids[:known] = [0] * known


def note_allocated(scheduler: Any, block_ids: list[int]) -> None:
    """Count these among the blocks that this step allocates, which vLLM finds in block tables."""
    scheduler._current_batch_allocated_block_ids.update(block_ids)
