from __future__ import annotations

import math

import pytest
import torch

from common.tables import tables_for
from vllm_heterocache.kernels.hybrid_step_select_ref import (
    approximate_attention,
    hybrid_step_select_ref,
)
from vllm_heterocache.kernels.tables import DecodeRows, StepTables
from vllm_heterocache.kernels.values import Protected


def slow_attention(queries: list, summaries: list, num_channels: int) -> list[float]:
    """The formula in loops: queries [G][D], summaries [n][2][D]."""
    head_dim = len(queries[0])
    sizes = [sum(abs(q[d]) for q in queries) for d in range(head_dim)]
    channels = sorted(range(head_dim), key=lambda d: -sizes[d])[:num_channels]
    total = [0.0] * len(summaries)
    for q in queries:
        share = sum(abs(q[d]) for d in channels) / sum(map(abs, q))
        logits = []
        for least, largest in summaries:
            dot = 0.0
            for d in channels:
                dot += q[d] * (largest[d] if sum(one[d] for one in queries) > 0 else least[d])
            logits.append(dot / math.sqrt(share))
        powers = [math.exp(one) for one in logits]
        for page, power in enumerate(powers):
            total[page] += power / sum(powers) / len(queries)
    return total


@pytest.mark.parametrize(("share", "num_channels"), [(1.0, 8), (0.5, 4), (0.26, 3), (0.01, 1)])
@pytest.mark.parametrize("group", [1, 3])
def test_approximate_attention_is_the_formula(share, num_channels, group, generator):
    queries = torch.randn(group, 8, generator=generator)
    bounds = torch.randn(11, 2, 8, generator=generator).sort(dim=1).values
    expected = slow_attention(queries.tolist(), bounds.tolist(), num_channels)
    scores = approximate_attention(queries, bounds, 1.0, share)
    torch.testing.assert_close(scores.tolist(), expected, rtol=1e-5, atol=1e-7)


def test_the_summed_query_picks_where_a_bound_would_take_the_other_page():
    """Quest's bound of the first page is the product of its least key and the second query."""
    queries = torch.tensor([[2.0], [-1.0]])
    summaries = torch.tensor([[[-9.0], [0.0]], [[-1.0], [1.0]]])
    bounds = (queries[:, None] * summaries.transpose(0, 1).flatten()).view(2, 2, 2).amax((0, 1))
    assert bounds.argmax() == 0
    assert approximate_attention(queries, summaries, 1.0).argmax() == 1


def test_few_channels_are_those_of_the_largest_queries():
    queries = torch.tensor([[5.0, 1.0], [-5.0, 1.0]])
    summaries = torch.tensor([[[0.0, 9.0], [0.0, 9.0]], [[2.0, 0.0], [2.0, 0.0]]])
    assert approximate_attention(queries, summaries, 1.0).argmax() == 0
    few = approximate_attention(queries, summaries, 1.0, 0.5)
    assert few[1] == pytest.approx(0.5, abs=1e-4), "one query attends to each page"


def test_a_channel_whose_queries_add_up_to_zero_takes_the_least_key():
    """Scaled, these queries of bf16 add up to 6e-9, rounded."""
    queries = torch.tensor([[0.72265625], [-1.4921875], [0.98828125], [-0.21875]])
    scale = 128**-0.5
    assert queries.sum() == 0 and (queries * scale).sum() > 0
    summaries = torch.tensor([[[-2.0], [3.0]], [[-1.0], [7.0]], [[0.0], [1.0]]])
    expected = (queries * scale * summaries[:, 0].T).softmax(dim=1).mean(dim=0)
    torch.testing.assert_close(approximate_attention(queries, summaries, scale), expected)


def test_of_channels_of_equal_queries_the_first_are_looked_at():
    queries = torch.ones(2, 100)
    keys = (torch.arange(100) < 30).float()
    summaries = torch.stack((keys, 1 - keys))[:, None].expand(2, 2, 100)
    few = approximate_attention(queries, summaries, 1.0, 0.3)
    assert few[0] == pytest.approx(1.0), "the first 30 are those of the first page"


HELD = [[9, 3, 0, 7, 5], [1, 2, 9]]  # prompt pages of two heads, in the order of their entries
COUNTS, NUM_PAGES = [3, 3], 10


def make_case(seed: int, num_tokens: int = 161):
    """One row with two heads, the second without idle pages, and a padded one."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.tensor([*HELD[0], *HELD[1]], dtype=torch.int32)
    entries = torch.randperm(40, generator=generator)[: len(positions)].int()
    tables = tables_for(
        (1, 1, 2),
        torch.device("cpu"),
        num_rows=8,
        start=torch.tensor([[[0, 5]]]),
        count=torch.tensor([[COUNTS]], dtype=torch.int32),
        prompt_pages=torch.tensor([NUM_PAGES], dtype=torch.int32),
        first_stripe=torch.zeros(1, dtype=torch.int64),
        positions=positions,
        entries=entries,
        idle_pages=torch.tensor([[[2, 0]]], dtype=torch.int32),
    )
    summaries = torch.full((40, 2, 4), torch.nan)
    bounds = torch.randn(5, 2, 4, generator=generator).sort(dim=1).values
    summaries[entries[:5].long()] = bounds  # those of the second head are not looked at
    rows = DecodeRows(
        torch.zeros(2, dtype=torch.int32),
        torch.full((2, 11), 10**6, dtype=torch.int32),
        torch.tensor([num_tokens, 0], dtype=torch.int32),
        *(torch.full((2,), -1, dtype=torch.int32) for _ in range(2)),
    )
    query = torch.randn(2, 4, 4, generator=generator)
    query[1] = torch.nan
    return query, tables, StepTables(summaries, torch.empty(0, dtype=torch.int32), 0), rows


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("protected", [(0, 0), (1, 1), (0, 2)], ids=str)
def test_entries_are_permuted_so_that_the_best_pages_are_listed(protected, seed):
    query, tables, step, rows = make_case(seed)
    before = dict(zip(tables.positions.tolist()[:5], tables.entries.tolist()[:5], strict=True))
    rest = tables.entries[5:].clone(), tables.positions[5:].clone()
    hybrid_step_select_ref(query, tables, step, rows, 0, 0.5, Protected(*protected))
    after = tables.positions.tolist()[:5]
    assert [before[page] for page in after] == tables.entries.tolist()[:5]
    ordered = sorted(HELD[0])
    bounds = step.summaries[[before[page] for page in ordered]]
    scores = slow_attention((query[0, :2] * 0.5).tolist(), bounds.tolist(), 4)
    sinks, recent = protected
    first = [page for page in ordered if page < sinks or page >= NUM_PAGES - recent]
    best = sorted(set(ordered) - set(first), key=lambda page: -scores[ordered.index(page)])
    chosen = sorted([*first, *best][:3])
    assert after == chosen + sorted(set(ordered) - set(chosen))
    assert torch.equal(tables.entries[5:], rest[0]) and torch.equal(tables.positions[5:], rest[1])


def test_rows_without_tokens_are_left_alone():
    query, tables, step, rows = make_case(0, num_tokens=0)
    entries = tables.entries.clone()
    hybrid_step_select_ref(query, tables, step, rows, 0, 0.5, Protected(0, 0))
    assert torch.equal(tables.entries, entries)
