"""`match_tokens`: attention over kept and matched tokens against full attention, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from vllm_heterocache.kernels.bounded_least_squares import bounded_least_squares
from vllm_heterocache.kernels.evicted_attention import evicted_attention
from vllm_heterocache.kernels.matched_tokens import (
    ABSENT_BIAS,
    CANDIDATES,
    LARGEST_WEIGHT,
    LEAST_WEIGHT,
    ROUNDS,
    MatchKernels,
    fit_weights,
    match_tokens,
)

B, T, N, D = 3, 331, 77, 24
M = 21
KEPT = 40  # tokens of each head that stay


@pytest.fixture
def case(generator):
    """Keys that go on from one another as those of a text do, and queries that look at some."""
    drift = torch.randn(B, T, D, generator=generator).cumsum(1) / 6
    keys = drift + torch.randn(B, T, D, generator=generator)
    values = torch.randn(B, T, D, generator=generator)
    looked_at = torch.randint(T, (B, N), generator=generator)
    noise = torch.randn(B, N, D, generator=generator)
    queries = 0.3 * keys[torch.arange(B)[:, None], looked_at] + 0.5 * noise
    order = torch.rand(B, T, generator=generator).argsort(1)
    is_evicted = torch.ones(B, T, dtype=torch.bool).scatter_(1, order[:, :KEPT], False)
    return keys, values, is_evicted, queries / D**0.5 * 2


def attention(head, queries, keys, values, bias) -> torch.Tensor:
    """[N, D] float64, query by query."""
    rows = []
    for query in queries[head].double():
        weights = (keys @ query + bias).softmax(0)
        rows.append(weights @ values)
    return torch.stack(rows)


def full_attention(case, head) -> torch.Tensor:
    keys, values, _, queries = case
    return attention(head, queries, keys[head].double(), values[head].double(), torch.zeros(T))


def kept_and(case, head, keys, values, bias) -> torch.Tensor:
    """Attention over the tokens that are not evicted, and over these."""
    stays = ~case[2][head]
    kept_keys, kept_values = case[0][head][stays], case[1][head][stays]
    return attention(
        head,
        case[3],
        torch.cat([kept_keys, keys]).double(),
        torch.cat([kept_values, values]).double(),
        torch.cat([torch.zeros(len(kept_keys)), bias]).double(),
    )


def means_of_runs(case, head) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys, values, is_evicted, _ = case
    runs = is_evicted[head].nonzero().flatten().tensor_split(M)
    return (
        torch.stack([keys[head][run].mean(0) for run in runs]),
        torch.stack([values[head][run].mean(0) for run in runs]),
        torch.tensor([float(len(run)) for run in runs]).log(),
    )


def test_attention_is_close_to_full_attention_and_closer_than_with_means(case):
    matched = match_tokens(*case, M)
    for head in range(B):
        full = full_attention(case, head)
        error = (kept_and(case, head, *(one[head] for one in matched)) - full).norm()
        of_means = (kept_and(case, head, *means_of_runs(case, head)) - full).norm()
        nothing = torch.empty(0, D), torch.empty(0, D), torch.empty(0)
        of_pages = (kept_and(case, head, *nothing) - full).norm()
        assert error < 0.5 * of_means, (error, of_means)
        assert error < 0.5 * of_pages, (error, of_pages)


@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_with_sinks_and_caps_it_is_close_too(case, generator, soft_cap):
    """The sink stays in the denominator, whatever stands for the evicted tokens."""
    keys, values, is_evicted, queries = case
    sinks = 2 + 2 * torch.randn(B, N, generator=generator)
    matched = match_tokens(*case, M, sink_logits=sinks, soft_cap=soft_cap)

    def attend(head, keys, values, bias) -> torch.Tensor:
        logits = queries[head] @ keys.T
        logits = (soft_cap * (logits / soft_cap).tanh() if soft_cap else logits) + bias
        return torch.cat([logits, sinks[head, :, None]], 1).softmax(1)[:, :-1] @ values

    for head in range(B):
        stays, nothing = ~is_evicted[head], torch.zeros(KEPT)
        full = attend(head, keys[head], values[head], torch.zeros(T))
        kept = keys[head][stays], values[head][stays], nothing
        mine = [torch.cat(pair) for pair in zip(kept, (one[head] for one in matched), strict=True)]
        error = (attend(head, *mine) - full).norm()
        assert error < 0.5 * (attend(head, *kept) - full).norm()


def test_each_evicted_token_as_its_own_match_gives_full_attention(case):
    num_evicted = T - KEPT
    matched = match_tokens(*case, num_evicted, iterations=300)
    for head in range(B):
        mine = kept_and(case, head, *(one[head] for one in matched))
        torch.testing.assert_close(mine, full_attention(case, head), rtol=0, atol=2e-2)


def shares_of(case, head) -> torch.Tensor:
    """[N, T] float64, query by query."""
    keys, _, _, queries = case
    return torch.stack([(keys[head] @ query).double().softmax(0) for query in queries[head]])


def test_keys_are_those_that_add_most_to_the_keys_of_the_rounds_before(case):
    keys, _, is_evicted, _ = case
    matched = match_tokens(*case, M)
    for head in range(B):
        left = shares_of(case, head)
        squares = left.square().sum(0).masked_fill(~is_evicted[head], -1)
        rest = squares.argsort(descending=True)[: CANDIDATES * M].tolist()
        for start, end in pairwise(M * i // ROUNDS for i in range(ROUNDS + 1)):
            rest.sort(key=lambda token, left=left: -float(left[:, token].norm()))
            taken, rest = rest[: end - start], rest[end - start :]
            expected = keys[head][taken]
            torch.testing.assert_close(matched.keys[head, start:end], expected, rtol=0, atol=0)
            for column in torch.linalg.qr(left[:, taken]).Q.T:
                left = left - torch.outer(column, column @ left)


def test_equal_keys_are_taken_in_one_round_at_most(case):
    keys, values, is_evicted, queries = case
    keys, is_evicted = keys.clone(), is_evicted.clone()
    best = match_tokens(*case, M).keys[:, 0]
    copies = slice(100, 106)
    keys[:, copies] = best[:, None]
    is_evicted[:, copies] = True
    matched = match_tokens(keys, values, is_evicted, queries, M)
    is_copy = (matched.keys == best[:, None]).all(2).sum(1)
    assert (is_copy >= 1).all()
    assert (is_copy <= -(-M // ROUNDS)).all()


@pytest.mark.parametrize("num_queries", [1, 5])
def test_more_keys_than_queries_are_taken_by_importance_where_nothing_else_tells(case, num_queries):
    keys, values, is_evicted, queries = case
    few = keys, values, is_evicted, queries[:, :num_queries]
    matched = match_tokens(*few, M)
    assert all(one.isfinite().all() for one in matched)
    for head in range(B):
        assert len(matched.keys[head].unique(dim=0)) == M
        squares = shares_of(few, head).square().sum(0).masked_fill(~is_evicted[head], -1)
        candidates = keys[head][squares.argsort(descending=True)[: CANDIDATES * M]]
        assert all((candidates == key).all(1).any() for key in matched.keys[head])


def test_values_of_tokens_that_stay_are_never_read(case):
    keys, values, is_evicted, queries = case
    expected = match_tokens(*case, M)
    poisoned = values.masked_fill(~is_evicted[..., None], torch.nan)
    actual = match_tokens(keys, poisoned, is_evicted, queries, M)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("num_matched", [M, 90, T - KEPT])
def test_no_token_is_taken_twice_or_is_among_those_that_stay(case, num_matched):
    keys, _, is_evicted, _ = case
    matched = match_tokens(*case, num_matched)
    assert all(one.isfinite().all() for one in matched)
    for head in range(B):
        present = matched.keys[head][matched.bias[head] != ABSENT_BIAS]
        tokens = torch.cat([(keys[head] == key).all(1).nonzero().flatten() for key in present])
        assert len(tokens.unique()) == len(present)
        assert is_evicted[head, tokens].all()
        full = full_attention(case, head)
        error = (kept_and(case, head, *(one[head] for one in matched)) - full).norm()
        nothing = torch.empty(0, D), torch.empty(0, D), torch.empty(0)
        of_pages = (kept_and(case, head, *nothing) - full).norm()
        assert error < 0.5 * of_pages, (error, of_pages)


def test_tokens_that_nobody_looks_at_are_not_matched(case):
    keys, values, is_evicted, queries = case
    keys, queries = keys.clone(), queries.clone()
    keys[..., 0], queries[..., 0] = 0, 1
    keys[:, :110, 0] = -30
    matched = match_tokens(keys, values, is_evicted, queries, M)
    assert (matched.keys[..., 0] == 0).all()


@pytest.mark.parametrize("counts", [[M, 8, 1], [5, N + 9, 20]])
def test_heads_may_have_fewer_matched_tokens_than_others(case, counts):
    """What a head keeps does not depend on the others, beside which it is fitted."""
    together = match_tokens(*case, max(counts), torch.tensor(counts))
    for head, count in enumerate(counts):
        alone = match_tokens(*(one[head : head + 1] for one in case), count)
        for mine, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(mine[head, :count], expected[0], rtol=2e-3, atol=2e-3)
        assert (together.bias[head, count:] == ABSENT_BIAS).all()
        full = full_attention(case, head)
        of_own = (kept_and(case, head, *(one[head, :count] for one in together)) - full).norm()
        nothing = torch.empty(0, D), torch.empty(0, D), torch.empty(0)
        assert of_own < (kept_and(case, head, *nothing) - full).norm()


def test_heads_of_a_batch_do_not_matter_to_one_another(case):
    together = match_tokens(*case, M)
    for head in range(B):
        alone = match_tokens(*(one[head : head + 1] for one in case), M)
        for one, all_heads in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_heads[head], rtol=1e-3, atol=1e-3)


def test_places_without_an_evicted_token_have_no_weight(case):
    keys, values, is_evicted, queries = case
    few = is_evicted.clone()
    few[0], few[1] = False, False
    few[1, 5:7] = True
    few[1, -1] = True
    matched = match_tokens(keys, values, few, queries, M)
    assert all(one.isfinite().all() for one in matched)
    for head, num_evicted in ((0, 0), (1, 3)):
        assert (matched.bias[head, num_evicted:] == ABSENT_BIAS).all()
        assert (matched.bias[head, :num_evicted] > ABSENT_BIAS).all()
        assert not matched.keys[head, num_evicted:].any()
        assert not matched.values[head, num_evicted:].any()
    expected = match_tokens(*(one[2:] for one in (keys, values, few, queries)), M)
    torch.testing.assert_close(matched.values[2:], expected.values, rtol=1e-3, atol=1e-3)
    case = keys, values, few, queries
    mine = kept_and(case, 1, *(one[1] for one in matched))
    torch.testing.assert_close(mine, full_attention(case, 1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("logit", [-60, -200, -1e4])
def test_evicted_tokens_that_nobody_looks_at_leave_next_to_nothing(case, logit):
    keys, values, is_evicted, _ = case
    queries = torch.zeros(B, N, D)
    queries[..., 0] = 1
    keys = keys.clone()
    keys[..., 0] = torch.where(is_evicted, float(logit), 0.0)
    case = keys, values, is_evicted, queries
    matched = match_tokens(*case, M)
    assert all(one.isfinite().all() for one in matched)
    for head in range(B):
        mine = kept_and(case, head, *(one[head] for one in matched))
        torch.testing.assert_close(mine, full_attention(case, head), rtol=0, atol=1e-5)


def test_weights_stay_within_their_bounds(case):
    keys, values, is_evicted, _ = case
    # one query: one matched token can stand for all, with a weight beyond the largest
    far = keys.clone()
    far[:, 0] = 0
    far[:, 0, 0] = -40
    one_query = torch.zeros(B, 1, D)
    one_query[..., 0] = 1
    most = torch.zeros_like(is_evicted)
    most[:, :1] = True
    for inputs in (case, (far, values, most, one_query), (far, values, is_evicted, one_query)):
        bias = match_tokens(*inputs, M).bias
        present = bias != ABSENT_BIAS
        weights = bias[present].exp()
        assert present.any()
        assert (weights >= LEAST_WEIGHT * 0.999).all()
        assert (weights <= LARGEST_WEIGHT * 1.001).all()


def test_weights_solve_the_bounded_least_squares(generator):
    columns = torch.rand(2, 40, 9, generator=generator).double() * torch.logspace(0, -3, 9)
    target = columns[..., :2].sum(-1) + torch.randn(2, 40, generator=generator) / 10
    weights = fit_weights(columns, target, 2000)
    gram, product = columns.mT @ columns, (columns.mT @ target[..., None])[..., 0]
    slope = (gram @ weights[..., None])[..., 0] - product
    size = gram.diagonal(dim1=1, dim2=2).sqrt()
    at_bound = weights <= LEAST_WEIGHT * (1 + 1e-9)
    assert at_bound.any() and not at_bound.all()
    # at an optimum the slope is 0 where the weight is free, and positive at the least weight
    assert ((slope / size).abs()[~at_bound] < 1e-3).all()
    assert ((slope / size)[at_bound] > -1e-3).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_pages_of_any_dtype_are_read(case, dtype):
    keys, values, is_evicted, queries = case
    rounded = keys.to(dtype), values.to(dtype)
    actual = match_tokens(*rounded, is_evicted, queries.bfloat16(), M)
    expected = match_tokens(*(one.float() for one in rounded), is_evicted, queries.bfloat16(), M)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_one_query_and_one_matched_token_are_enough(case):
    keys, values, is_evicted, queries = case
    one_query = keys, values, is_evicted, queries[:, :1]
    matched = match_tokens(*one_query, 1)
    for head in range(B):
        mine = kept_and(one_query, head, *(one[head] for one in matched))
        torch.testing.assert_close(mine, full_attention(one_query, head), rtol=0, atol=2e-2)


@pytest.mark.gpu
def test_the_gpu_matches_as_well_as_the_cpu_does_and_nothing_waits_for_it(case):
    """Rounding lets it choose other keys among those that the queries hardly tell apart."""
    keys, values, is_evicted, queries = case
    room = 8  # heads of 32
    keys, values, queries = (F.pad(one, (0, room)) for one in (keys, values, queries))
    case = keys.bfloat16(), values.bfloat16(), is_evicted, queries
    kernels = MatchKernels(evicted_attention, bounded_least_squares)
    on_gpu = [one.cuda() for one in case]
    match_tokens(*on_gpu, M, kernels=kernels)  # libraries load with the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        matched = match_tokens(*on_gpu, M, kernels=kernels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = match_tokens(*case, M)
    for head in range(B):
        full = full_attention(case, head)
        ours, theirs = (
            (kept_and(case, head, *(one[head].cpu() for one in found)) - full).norm()
            for found in (matched, expected)
        )
        assert ours < 1.05 * theirs, (ours, theirs)
