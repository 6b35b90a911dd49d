"""The rows of one step, as the metadata builder describes them to the worker's side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch


class Batch(NamedTuple):
    """The rows of a step as the metadata builder sees them; decode rows come first."""

    query_lens: np.ndarray  # [num_rows], 0 for padding
    seq_lens: np.ndarray  # [num_rows], this step's tokens included
    is_prefilling: np.ndarray  # [num_rows] bool, the prompt was not complete before this step
    num_decodes: int  # leading rows that the decode kernel serves
    block_table: torch.Tensor  # [num_rows, max_blocks] int32
    # [rows without padding] of vLLM's request states (V2 model runner; None on V1)
    req_idx: np.ndarray | None = None


@dataclass(frozen=True)
class PrefillBatch:
    """The rows of a step that read dense KV with several queries (or a first one)."""

    first_token: int  # of the batch
    starts: list[int]  # [num_rows + 1] first token of each row, from 0
    num_tokens: list[int]  # [num_rows] of the request, this chunk included
    cu_seqlens: torch.Tensor  # [num_rows + 1] int32, `starts` on the device
    seq_lens: torch.Tensor  # [num_rows] int32, `num_tokens` on the device
    block_table: torch.Tensor  # [num_rows, max_blocks] int32

    @property
    def tokens(self) -> slice:
        return slice(self.first_token, self.first_token + self.starts[-1])

    @property
    def max_query_len(self) -> int:
        return int(np.diff(self.starts).max())

    @property
    def max_seq_len(self) -> int:
        return max(self.num_tokens)


class KeptQueries(NamedTuple):
    """Queries of a step that go to `last_queries`."""

    first_token: int  # of the batch
    count: int  # type: ignore[assignment]  # hides tuple.count
    index: int  # type: ignore[assignment]  # hides tuple.index; where the first one goes
