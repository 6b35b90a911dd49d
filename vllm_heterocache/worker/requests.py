"""Worker-side state of one request that is, or is being, compacted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from vllm_heterocache.messages import CompactionOrder


@dataclass(eq=False)
class HostCopy:
    """The satellites' pages of one request on their way to the host."""

    host_blocks: np.ndarray  # [P] host block of each prompt page
    num_copied: int = 0  # prompt pages whose copy was started


class References(NamedTuple):
    """Queries of consecutive tokens at a prompt's end, to which matched tokens are fitted."""

    queries: torch.Tensor  # [n, L, num_q_heads, head_dim]
    behind: int  # tokens from the first of them to the prompt's end


@dataclass(eq=False)
class FinishedPrefill:
    """What the step that completes a prefill leaves behind for the compaction."""

    order: CompactionOrder
    query_place: int | None = None  # of the last prompt token's query among the last queries
    dense_blocks: torch.Tensor | None = None  # [ceil(T / page_size)] int32
    masses: torch.Tensor | None = None  # [L, H, P] fp32, where all queries' masses are summed up
    references: References | None = None  # what matched tokens are fitted to, if anything is


@dataclass(eq=False)
class CompactRequest:
    """A request that decodes from page lists."""

    order: CompactionOrder
    table_slot: int
    host: HostCopy | None  # None where nothing is offloaded, or the host pool was full
    offload_mark: int | None = None  # set until the host holds all pages
    # [P] int32 blocks of a prompt that stays where it is; None where the request owns its pages
    dense_blocks: torch.Tensor | None = None
    num_decodes: int = 0  # steps since the compaction
    num_checks: int = 0  # of its drift

    @property
    def num_pages(self) -> int:
        """Host and GPU pages are counted in these: full pages of the prompt."""
        return 0 if self.host is None else self.host.host_blocks.size


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
        f"HeteroCache: request {request_id} is compacted without retrieval: its satellites need "
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
