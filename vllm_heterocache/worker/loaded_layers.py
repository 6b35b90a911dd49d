"""What a worker reads off the layers of the loaded model, and the KV-cache specs that they get."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from vllm_heterocache.compat import FullAttentionSpec
from vllm_heterocache.kv_cache_spec import HeteroSpec
from vllm_heterocache.worker.ops.interface import Geometry

if TYPE_CHECKING:
    from vllm_heterocache.startup.serving_plan import ServingPlan

# Most prompts whose last queries are kept at a time, and the memory for them.
MAX_QUERY_WINDOWS = 64
MAX_QUERY_BYTES = 128 << 20


def geometry_of(
    layers: list, max_rows: int, max_queries: int, window: int, dtype: torch.dtype
) -> Geometry:
    """Of this rank; `dtype` is the model's."""
    first = layers[0]
    query_bytes = len(layers) * first.num_heads * first.head_size * dtype.itemsize
    return Geometry(
        num_layers=len(layers),
        num_q_heads=first.num_heads,
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_size,
        scale=first.impl.scale,
        dtype=dtype,
        max_rows=max_rows,
        max_queries=max_queries,
        num_query_windows=num_query_windows(max_rows, window * query_bytes),
        window=window,
        soft_cap=first.impl.soft_cap,
    )


def num_query_windows(max_rows: int, window_bytes: int) -> int:
    """Prompts whose last queries are kept at a time, at `window_bytes` each."""
    return max(1, min(max_rows, MAX_QUERY_WINDOWS, MAX_QUERY_BYTES // window_bytes))


def sink_logits(layers: list) -> torch.Tensor | None:
    """[L, num_q_heads] in the weights' dtype, of loaded layers with attention sinks; None for
    others."""
    if layers[0].impl.sinks is None:
        return None
    return torch.stack([layer.impl.sinks.detach() for layer in layers])


def hetero_spec(stock: Any, plan: ServingPlan, has_drafter: bool) -> HeteroSpec:
    """The spec of a layer that HeteroCache serves."""
    assert type(stock) is FullAttentionSpec
    return HeteroSpec(
        **{f.name: getattr(stock, f.name) for f in fields(stock)},
        gpu_budget=plan.config.gpu_budget,
        compact_min_tokens=plan.compact_min_tokens,
        recomputed_tokens=plan.recomputed_tokens,
        frees_prompt=plan.policy.frees_prompt,
        has_drafter=has_drafter,
    )
