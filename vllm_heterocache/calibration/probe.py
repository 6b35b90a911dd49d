"""Measures the attention of a few wanted prompt positions while the prompt is prefilled.

A probe answers two questions about single rows of the attention matrix, which is itself never
stored: which tokens form the top set of every KV head ("sets"), and how much attention falls on a
span of tokens ("targets"). Rows are positions of one prompt, so a decode step is measured by
teacher forcing: its token is simply part of the prompt.

Spec, JSON-able; positions are tokens of the prompt, spans are half-open:
    {"sets": {"rows": [int], "columns": int, "top_k": int, "pool": int} | None,
     "targets": [[row, first, stop], ...]}
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from vllm_heterocache.kernels.soft_cap_ref import soft_capped_ref

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Measurement:
    """What one probed prompt gave, for the layers and KV heads in `layer_ids` x `kv_head_ids`."""

    layer_ids: list[int]
    kv_head_ids: list[int]
    columns: int  # tokens that one mask covers, 0 without sets
    masks: np.ndarray  # [steps, num_layers, num_kv_heads, ceil(columns / 8)] uint8, packbits
    masses: np.ndarray  # [targets, num_layers, num_kv_heads] float32, attention in [0, 1]

    def sets(self) -> np.ndarray:
        """Top sets unpacked: [steps, num_layers, num_kv_heads, columns] bool."""
        return np.unpackbits(self.masks, axis=-1, count=self.columns).astype(bool)


class AttentionProbe:
    """Accumulates the rows a spec asks for, over the layers and KV heads of one worker rank.

    `layer_ids` and `kv_head_ids` are global; `num_q_heads` counts the query heads of this rank,
    `scale` is the softmax scale. Query head q belongs to the rank's KV head q // group, in order.
    `sink_logits` [layers, num_q_heads] are of heads with attention sinks, whose attention on all
    tokens is less than 1. `soft_cap` limits logits (kernels/soft_cap_ref.py), unless it is 0.
    """

    def __init__(
        self,
        spec: dict,
        layer_ids: Sequence[int],
        kv_head_ids: Sequence[int],
        num_q_heads: int,
        scale: float,
        sink_logits: torch.Tensor | None = None,
        soft_cap: float = 0.0,
    ) -> None:
        if num_q_heads % len(kv_head_ids):
            raise ValueError(
                f"{num_q_heads} query heads do not divide among {len(kv_head_ids)} KV heads."
            )
        self.layer_ids = list(layer_ids)
        self.kv_head_ids = list(kv_head_ids)
        self._index_of_layer = {layer: i for i, layer in enumerate(self.layer_ids)}
        self._scale, self._soft_cap = scale, soft_cap
        self._sinks = None
        if sink_logits is not None:
            grouped = len(self.layer_ids), len(self.kv_head_ids), -1, 1
            self._sinks = sink_logits.float().view(grouped)
        sets = spec.get("sets") or {"rows": [], "columns": 0, "top_k": 0, "pool": 1}
        self._columns, self._top_k, self._pool = sets["columns"], sets["top_k"], sets["pool"]
        _check_sets(sets)
        self._set_of_row = {row: i for i, row in enumerate(sets["rows"])}
        self._targets_of_row: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for i, (row, first, stop) in enumerate(spec["targets"]):
            if not 0 <= first < stop <= row + 1:
                raise ValueError(f"Row {row} cannot see all of target span {first}..{stop}.")
            self._targets_of_row[row].append((i, first, stop))
        self._rows = sorted(set(self._set_of_row) | set(self._targets_of_row))
        shape = (len(self.layer_ids), len(self.kv_head_ids))
        mask_bytes = -(-self._columns // 8)
        self._masks = torch.zeros((len(sets["rows"]), *shape, mask_bytes), dtype=torch.uint8)
        self._masses = torch.zeros((len(spec["targets"]), *shape), dtype=torch.float32)
        self._seen = np.zeros((len(self.layer_ids), len(self._rows)), dtype=bool)

    @torch.inference_mode()
    def observe(
        self,
        layer: int,
        query: torch.Tensor,  # [num_tokens, num_q_heads, head_dim], after RoPE
        first_position: int,
        keys: torch.Tensor,  # [first_position + num_tokens, num_kv_heads, head_dim], after RoPE
    ) -> None:
        """Take the wanted rows out of one prefill chunk of the probed prompt.

        `layer` is the global layer id, `first_position` the prompt position of query[0]. A row that
        is computed again (a request preempted and resumed) replaces its first measurement.
        """
        num_tokens, num_q_heads, head_dim = query.shape
        num_kv_heads = len(self.kv_head_ids)
        assert keys.shape == (first_position + num_tokens, num_kv_heads, head_dim)
        wanted = [
            (i, row)
            for i, row in enumerate(self._rows)
            if first_position <= row < first_position + num_tokens
        ]
        if not wanted:
            return
        if self._masks.device != query.device:
            self._masks = self._masks.to(query.device)
            self._masses = self._masses.to(query.device)
        grouped = query.reshape(num_tokens, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
        keys_by_head = keys.float().transpose(0, 1).contiguous()
        layer_index = self._index_of_layer[layer]
        for i, row in wanted:
            # One row at a time over its own columns: the result does not depend on the chunking.
            scores = torch.bmm(
                grouped[row - first_position].float(), keys_by_head[:, : row + 1].transpose(1, 2)
            )
            self._record(layer_index, row, self._attention(layer_index, scores))
            self._seen[layer_index, i] = True

    def _attention(self, layer_index: int, scores: torch.Tensor) -> torch.Tensor:
        """Attention on each token, of `scores` [num_kv_heads, group, row + 1] float32."""
        logits = soft_capped_ref(scores * self._scale, self._soft_cap)
        if self._sinks is None:
            return logits.softmax(dim=-1)
        return torch.cat([logits, self._sinks[layer_index]], dim=-1).softmax(dim=-1)[..., :-1]

    def _record(self, layer_index: int, row: int, attention: torch.Tensor) -> None:
        """`attention` [num_kv_heads, group, row + 1] float32."""
        if row in self._set_of_row:
            # Mean over the group, as in the paper's calibration.
            pooled = _pool(attention[..., : self._columns].mean(dim=1), self._pool)
            self._masks[self._set_of_row[row], layer_index] = _top_mask(pooled, self._top_k)
        for i, first, stop in self._targets_of_row.get(row, ()):
            # Maximum over the group: one query head that retrieves makes its KV head worth keeping.
            self._masses[i, layer_index] = attention[..., first:stop].sum(dim=-1).amax(dim=1)

    def measurement(self) -> Measurement:
        """What was accumulated; RuntimeError if a wanted row never came by."""
        if not self._seen.all():
            layer_index, i = np.argwhere(~self._seen)[0]
            raise RuntimeError(
                f"The probe never saw prompt position {self._rows[i]} in layer "
                f"{self.layer_ids[layer_index]}: the prompt must be prefilled whole, with prefix "
                "caching off."
            )
        return Measurement(
            layer_ids=self.layer_ids,
            kv_head_ids=self.kv_head_ids,
            columns=self._columns,
            masks=self._masks.cpu().numpy(),
            masses=self._masses.cpu().numpy(),
        )

    def save(self, path: str | Path) -> None:
        """Write the measurement of this rank as an .npz; RuntimeError if it is not complete."""
        m = self.measurement()
        np.savez(
            path,
            layer_ids=np.asarray(m.layer_ids),
            kv_head_ids=np.asarray(m.kv_head_ids),
            columns=np.asarray(m.columns),
            masks=m.masks,
            masses=m.masses,
        )


def load_measurement(path: str | Path) -> Measurement:
    """Read what AttentionProbe.save wrote."""
    with np.load(path) as data:
        return Measurement(
            layer_ids=data["layer_ids"].tolist(),
            kv_head_ids=data["kv_head_ids"].tolist(),
            columns=int(data["columns"]),
            masks=data["masks"],
            masses=data["masses"],
        )


def merge_ranks(parts: Sequence[Measurement]) -> Measurement:
    """Join the measurements of all ranks by global layer and KV head id, both ascending.

    Raises ValueError if two ranks measured the same head, or if a head of the grid is missing.
    """
    layer_ids = sorted({layer for part in parts for layer in part.layer_ids})
    head_ids = sorted({head for part in parts for head in part.kv_head_ids})
    first = parts[0]
    shape = (len(layer_ids), len(head_ids))
    masks = np.zeros((len(first.masks), *shape, first.masks.shape[-1]), dtype=np.uint8)
    masses = np.zeros((len(first.masses), *shape), dtype=np.float32)
    times_measured = np.zeros(shape, dtype=int)
    for part in parts:
        grid = np.ix_(
            [layer_ids.index(layer) for layer in part.layer_ids],
            [head_ids.index(head) for head in part.kv_head_ids],
        )
        times_measured[grid] += 1
        masks[:, grid[0], grid[1]] = part.masks
        masses[:, grid[0], grid[1]] = part.masses
    if (times_measured > 1).any():
        raise ValueError(
            "tensor_parallel_size is larger than the model's number of KV heads, which calibration "
            "cannot use because ranks share KV heads; lower tensor_parallel_size."
        )
    if (times_measured == 0).any():
        raise ValueError("The worker ranks did not measure every layer and KV head.")
    return Measurement(layer_ids, head_ids, first.columns, masks, masses)


def _check_sets(sets: dict) -> None:
    """ValueError unless every set row sees all its columns and the top set is a proper subset."""
    rows, columns, top_k, pool = sets["rows"], sets["columns"], sets["top_k"], sets["pool"]
    if not rows:
        return
    if min(rows) < columns - 1:
        raise ValueError(f"Set row {min(rows)} cannot see {columns} columns.")
    if not 0 < top_k <= columns:
        raise ValueError(f"top_k must be in 1..{columns}, not {top_k}.")
    if pool % 2 != 1:
        raise ValueError(f"pool must be odd, not {pool}.")


def _pool(attention: torch.Tensor, width: int) -> torch.Tensor:
    """Average over `width` neighbouring tokens, zero padded; [num_heads, columns] in and out."""
    return F.avg_pool1d(attention.unsqueeze(1), width, stride=1, padding=width // 2).squeeze(1)


def _top_mask(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Packed mask [num_heads, ceil(columns / 8)] uint8 of the top_k columns; ties: lower index."""
    num_heads, columns = scores.shape
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :top_k]
    bits = torch.zeros((num_heads, -(-columns // 8) * 8), dtype=torch.uint8, device=scores.device)
    bits.scatter_(1, order, 1)
    place = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=scores.device)
    return (bits.view(num_heads, -1, 8) * place).sum(dim=-1).to(torch.uint8)
