"""The book of transfers of vLLM's offloading connector."""

from __future__ import annotations

from typing import Any


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
