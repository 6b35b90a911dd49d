"""Worker side: queries by whose attention pages of a prompt are scored.

A prompt's last query says what its own token looks for. What is asked later is often worded
otherwise, and the queries of tokens before say more of that (docs/quality.md, "Who chooses the
pages").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_heterocache.worker.observe.moved_queries import distances_behind

if TYPE_CHECKING:
    import torch

    from vllm_heterocache.worker.observe.moved_queries import MoveQueries
    from vllm_heterocache.worker.requests import References

MOST_ROWS = 64  # query rows of a KV head that are scored at a time, but for wider groups


def scoring_queries(
    last_query: torch.Tensor,
    references: References | None,
    move_queries: MoveQueries | None,
    count: int,
) -> torch.Tensor:
    """[count, L, num_q_heads, head_dim]: the last query, and others that are spread evenly over
    the reference queries, moved behind the prompt. The last query takes the place of those that
    there are not, so that kernels see one shape.

    Args:
        last_query: [L, num_q_heads, head_dim].
        references: None: nothing is known but the last query.
        move_queries: None: other queries cannot be moved, and the last one is alone.
    """
    queries = last_query.expand(count, *last_query.shape).contiguous()
    if count == 1 or references is None or move_queries is None:
        return queries
    chosen = _spread(references.queries.shape[0], count)
    distances = distances_behind(references)[chosen]
    for layer in range(last_query.shape[0]):
        moved = move_queries(layer, references.queries[chosen, layer], distances)
        queries[: moved.shape[0], layer] = moved
    return queries


def _spread(num_references: int, count: int) -> slice:
    """At most `count` - 1 of them, counted from the last one, which is that of the last token and
    is left out."""
    count = min(count, num_references)
    step, last = num_references // count, num_references - 1
    return slice(last - step * (count - 1), last, step)


def queries_at_a_time(count: int, group: int) -> int:
    """Of `count` queries, as many as are scored at a time; a power of two, as `count` is.

    Args:
        group: query heads of a KV head.
    """
    most = max(1, MOST_ROWS // group)
    return min(count, 1 << (most.bit_length() - 1))
