"""Why decode rows of a request are served dense: labels of the metric, and what the log says."""

from __future__ import annotations

COMPACTED = "compacted"  # they are not
SHORT_PROMPT = "short_prompt"
HOST_POOL_FULL = "host_pool_full"
CAPTURE_LIMIT = "capture_limit"
TABLE_FULL = "table_full"

_WHY = {
    HOST_POOL_FULL: "its satellites need {needed_blocks} host blocks and {free_blocks} are free; "
    "raise cpu_pool_gib or lower --max-num-seqs",
    TABLE_FULL: "the page lists of requests that share their prompts' blocks take all room; lower "
    "--max-num-seqs or gpu_budget",
    CAPTURE_LIMIT: "more than {num_query_windows} prompts came to their last {window} queries at a "
    "time; lower --max-num-seqs",
}


def stays_dense(request_id: str, reason: str, **numbers: int) -> str:
    """The warning for a prompt that was to be compacted."""
    return f"HeteroCache: request {request_id} stays dense: {_WHY[reason].format(**numbers)}."
