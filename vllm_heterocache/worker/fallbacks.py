"""What metrics and log say of requests that are not served as they were meant to be."""

from __future__ import annotations

# Why decode rows of a request are served dense: labels of the metric, and what the log says.
COMPACTED = "compacted"  # they are not
SHORT_PROMPT = "short_prompt"
CAPTURE_LIMIT = "capture_limit"
TABLE_FULL = "table_full"

_WHY = {
    TABLE_FULL: "the page lists of requests that share their prompts' blocks take all room; lower "
    "--max-num-seqs or gpu_budget",
    CAPTURE_LIMIT: "more than {num_query_windows} prompts came to their last {window} queries at a "
    "time; lower --max-num-seqs",
}


def stays_dense(request_id: str, reason: str, **numbers: int) -> str:
    """The warning for the first prompt that was to be compacted, and is not for that reason."""
    return (
        f"HeteroCache: request {request_id} stays dense: {_WHY[reason].format(**numbers)}. Decode "
        f"rows of further ones are counted with reason {reason}."
    )


def stays_without_retrieval(request_id: str, needed_blocks: int, free_blocks: int) -> str:
    """The warning for the first prompt that is compacted without host pages."""
    return (
        f"HeteroCache: request {request_id} is compacted without retrieval: it needs "
        f"{needed_blocks} host blocks and {free_blocks} are free; raise cpu_pool_gib or lower "
        "--max-num-seqs. Further ones are counted in heterocache_requests_without_retrieval."
    )


def stays_short_of_reference_queries(request_id: str, num_missing: int) -> str:
    """The warning for the first prompt whose matched tokens are fitted to fewer queries."""
    return (
        f"HeteroCache: request {request_id} does without {num_missing} of the reference queries "
        "that matched_share fits matched tokens to: other prompts in prefill have their room; "
        "lower --max-num-batched-tokens or --max-num-seqs. Further ones are counted in "
        "heterocache_requests_short_of_reference_queries."
    )
