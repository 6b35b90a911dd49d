"""What vLLM's NixlConnector reads of a request, and tells its workers of a step."""

from __future__ import annotations

from typing import Any


def is_sent(request: Any) -> bool:
    """Whether another engine will read the KV of this request's blocks when the request ends."""
    params = request.kv_transfer_params
    return bool(params) and bool(params.get("do_remote_decode"))


def receive_first_blocks(request: Any, num_blocks: int) -> None:
    """Let the request receive these blocks of its prompt and none behind: NIXL matches the last
    blocks that the other engine names to the last ones here."""
    params = request.kv_transfer_params
    params["remote_block_ids"] = [group[:num_blocks] for group in params["remote_block_ids"]]


def begins_receiving(metadata: Any) -> bool:
    """Whether blocks of another engine begin to arrive with this step.

    Args:
        metadata: of the step's connector; vLLM's MultiConnector holds that of several.
    """
    return any(getattr(one, "reqs_to_recv", None) for one in getattr(metadata, "metadata", ()))
