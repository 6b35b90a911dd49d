"""Matched tokens: what evicted tokens leave behind, fitted to a prompt's own queries.

After Attention Matching (arXiv 2602.16284). A head that evicts tokens keeps a few of their keys,
each with a weight w and a value of its own. Decode attention adds ln w to the logit of the token.
Weights are such that the matched tokens take the attention that the evicted tokens took. Values are
such that the output is what it was. Both are least squares over reference queries. All is plain
torch for CPU and CUDA, but for two kernels. Nothing here waits for the device, and no shape depends
on the data.

B heads, T tokens of the prompt, N reference queries (of all query heads of a group), m matched
tokens, D the size of a head. A share is attention on one token divided by that on the whole prompt,
and on the sink of the query head where it has one. The sink divides the evicted tokens' shares and
those of the matched tokens alike. So it asks for no other solution, but queries that look at little
else than the sink weigh less in the fit, as they do in the output.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch

from vllm_heterocache.kernels.bounded_least_squares_ref import bounded_least_squares_ref
from vllm_heterocache.kernels.evicted_attention_ref import (
    EvictedAttention,
    evicted_attention_ref,
    logits,
)


class MatchKernels(NamedTuple):
    """What a platform computes by kernels of its own."""

    attend: Callable[..., EvictedAttention]  # as evicted_attention_ref
    solve: Callable[..., torch.Tensor]  # as bounded_least_squares_ref


REFERENCE = MatchKernels(evicted_attention_ref, bounded_least_squares_ref)
# Keys are chosen in so many rounds, out of the most important tokens, so many times as many.
ROUNDS, CANDIDATES = 4, 4
# Heads whose candidates' shares are computed at a time, in fp32.
HEADS_AT_A_TIME = 4
# Of the weights, so that ln w is small and finite.
LEAST_WEIGHT, LARGEST_WEIGHT = 1e-4, 1e4
# ln w of the places that no evicted token fills. fp16 holds it, and exp makes 0 of it.
ABSENT_BIAS = -1e4
WEIGHT_ITERATIONS = 20
# Ridges, as shares of the mean squared norm of the columns that are fitted.
WEIGHT_RIDGE, VALUE_RIDGE = 1e-5, 1e-3
# Share of a column's squared norm under which it counts as explained by the columns before.
PIVOT_RIDGE = 1e-4
_POWER_ITERATIONS = 3


class MatchedTokens(NamedTuple):
    """What B heads keep of the tokens that they evicted."""

    keys: torch.Tensor  # [B, m, D] fp32, m of the evicted keys
    values: torch.Tensor  # [B, m, D] fp32
    bias: torch.Tensor  # [B, m] fp32, ln w; ABSENT_BIAS where fewer tokens than m are evicted


class Candidates(NamedTuple):
    """What is left to look at of a prompt of any length once attention is known.

    B heads, C candidates each, N reference queries. A candidate with a negative importance is no
    evicted token; all others are in front of it.
    """

    keys: torch.Tensor  # [B, C, D], any float dtype
    values: torch.Tensor  # [B, C, D]
    importance: torch.Tensor  # [B, C] fp32, falling
    lse: torch.Tensor  # [B, N] fp32, of all tokens and the sink
    share: torch.Tensor  # [B, N] fp32, of all evicted tokens
    output: torch.Tensor  # [B, N, D] fp32, of all evicted tokens


def match_tokens(
    keys: torch.Tensor,
    values: torch.Tensor,
    is_evicted: torch.Tensor,
    queries: torch.Tensor,
    num_matched: int,
    counts: torch.Tensor | None = None,
    *,
    sink_logits: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    iterations: int = WEIGHT_ITERATIONS,
    kernels: MatchKernels = REFERENCE,
) -> MatchedTokens:
    """Keys, weights and values that stand for the evicted tokens of each head.

    Keys are important ones that differ (`_pivots`). Weights are non-negative least squares, so
    that the sum of w * exp(q . k) is the evicted tokens' share. Values are a ridge regression
    towards the keys' own values.

    Args:
        keys: [B, T, D], any float dtype, after RoPE.
        values: [B, T, D], any float dtype; those of tokens that are not evicted are not used.
        is_evicted: [B, T] bool.
        queries: [B, N, D], N >= 1, after RoPE, times the softmax scale.
        num_matched: m, 1 <= m <= T.
        counts: [B] int64, matched tokens of each head, at most m; None: m. Places behind them are
            absent. What a head keeps does not depend on the others.
        iterations: of the fit of the weights.
        kernels: of the platform.

    Returns:
        Tokens of a head in falling order of what they add. All are finite for finite inputs.
    """
    queries = queries.float()
    found = find_candidates(
        keys, values, is_evicted, queries, num_matched, kernels, sink_logits, soft_cap
    )
    return match_candidates(found, queries, num_matched, counts, iterations, kernels, soft_cap)


def find_candidates(
    keys: torch.Tensor,
    values: torch.Tensor,
    is_evicted: torch.Tensor,
    queries: torch.Tensor,
    num_matched: int,
    kernels: MatchKernels = REFERENCE,
    sink_logits: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> Candidates:
    """The first half of `match_tokens`: attention, and the most important tokens, CANDIDATES times
    as many as are to be matched. A head takes 6 * N * T * D flops, and reads keys twice and values
    once. Queries are fp32.
    """
    num_heads, num_tokens, head_dim = keys.shape
    assert values.shape == keys.shape and is_evicted.shape == (num_heads, num_tokens)
    assert queries.shape[::2] == (num_heads, head_dim) and queries.shape[1] >= 1
    assert is_evicted.dtype == torch.bool and 1 <= num_matched <= num_tokens
    evicted = kernels.attend(keys, values, is_evicted, queries, sink_logits, soft_cap)
    count = min(CANDIDATES * num_matched, num_tokens)
    importance, candidates = evicted.importance.topk(count, dim=1)
    return Candidates(
        _tokens_of(keys, candidates),
        _tokens_of(values, candidates),
        importance,
        evicted.lse,
        evicted.share,
        evicted.output,
    )


def match_candidates(
    found: Candidates,
    queries: torch.Tensor,
    num_matched: int,
    counts: torch.Tensor | None = None,
    iterations: int = WEIGHT_ITERATIONS,
    kernels: MatchKernels = REFERENCE,
    soft_cap: float = 0.0,
) -> MatchedTokens:
    """The second half of `match_tokens`, whose arguments are meant.

    With r = min(N, m), a head takes m * N * (16 * r + 8 * D) flops for the choice, and 4 * N * (m *
    (N + iterations + 2 * D) + N * N / 6) for the fit. Temporaries have `fit_bytes`.
    """
    if counts is None:
        counts = found.importance.new_full((len(queries),), num_matched, dtype=torch.long)
    shares = _shares(found, queries, soft_cap)
    taken, added = _pivots(shares, found.importance >= 0, num_matched, counts)
    del shares
    return _fit(found, queries, taken, added >= 0, iterations, kernels, soft_cap)


def fit_bytes(num_queries: int, head_dim: int, num_matched: int) -> int:
    """Memory that one head's candidates, of two bytes an element, and the temporaries of
    `match_candidates` take at most; beside it, HEADS_AT_A_TIME heads take as much once more."""
    candidates = CANDIDATES * num_matched
    # bf16 shares, or behind them twice as many bytes for the fit
    of_choice = candidates * (4 * head_dim + 5 * num_queries)
    return of_choice + 8 * num_queries * (2 * head_dim + num_queries)


def _shares(found: Candidates, queries: torch.Tensor, soft_cap: float) -> torch.Tensor:
    """[B, C, N] of the candidates; bf16 on CUDA, whose error of 2**-16 of a squared norm is below
    PIVOT_RIDGE, and fp32 elsewhere."""
    num_heads, count, _ = found.keys.shape
    dtype = torch.bfloat16 if queries.is_cuda else queries.dtype
    shares = queries.new_empty(num_heads, count, queries.shape[1], dtype=dtype)
    for first in range(0, num_heads, HEADS_AT_A_TIME):
        some = slice(first, first + HEADS_AT_A_TIME)
        of_some = logits(found.keys[some].to(queries.dtype), queries[some], soft_cap)
        shares[some] = of_some.sub_(found.lse[some, None]).exp_()
    return shares


def _pivots(
    columns: torch.Tensor, is_candidate: torch.Tensor, most: int, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns in the order of a Gram-Schmidt process that pivots in rounds, each head in rounds of
    its own size.

    Args:
        columns: [B, C, N]; left behind is the part that is orthogonal to those of all rounds but
            the last.
        is_candidate: [B, C] bool; all others come last.
        most: columns of a head at most, at most C.
        counts: [B] int64, columns to take of each head, at most `most`.

    Returns:
        [B, most] int64, and the squared norm of each column's part that is orthogonal to those of
        the rounds before [B, most]; -1 for what is no candidate, and behind a head's count.
    """
    device, num_queries = columns.device, columns.shape[2]
    size = _squared_norm(columns)
    is_early = torch.arange(columns.shape[1], device=device) < CANDIDATES * counts[:, None]
    is_candidate = is_candidate & is_early
    left, is_taken = size.masked_fill(~is_candidate, -1), torch.zeros_like(is_candidate)
    # N columns span all others; what is taken behind them is ranked by importance
    spanning = counts.clamp(max=num_queries)
    ends = [spanning * number // ROUNDS for number in range(ROUNDS + 1)] + [counts]
    widths = [-(-min(most, num_queries) // ROUNDS)] * ROUNDS + [max(most - num_queries, 0)]
    rounds: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for (start, end), width in zip(pairwise(ends), widths, strict=True):
        if width == 0:
            break
        if rounds:
            newest, _, is_own = rounds[-1]
            is_taken.scatter_(1, newest, is_taken.gather(1, newest) | is_own)
            own = _tokens_of(columns, newest).to(size.dtype).masked_fill(~is_own[..., None], 0)
            basis = _basis(own, PIVOT_RIDGE * size.gather(1, newest)).to(columns.dtype)
            columns.baddbmm_(columns @ basis.mT, basis, alpha=-1)
            left = _squared_norm(columns).maximum(PIVOT_RIDGE * size)
            left = left.masked_fill(~is_candidate, -1).masked_fill(is_taken, -2)
        largest, newest = left.topk(width, dim=1)
        is_own = torch.arange(width, device=device) < (end - start)[:, None]
        rounds.append((newest, largest.masked_fill(~is_own, -1), is_own))
    taken, added, is_own = (torch.cat(parts, 1) for parts in zip(*rounds, strict=True))
    order = is_own.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    return taken.gather(1, order), added.gather(1, order)


def _squared_norm(columns: torch.Tensor) -> torch.Tensor:
    """[B, C] of [B, C, N], in fp32 at least."""
    dtype = torch.promote_types(columns.dtype, torch.float32)
    return torch.linalg.vector_norm(columns, dim=2, dtype=dtype).square_()


def _basis(columns: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """[B, k, N]: an orthonormal basis of k columns [B, k, N], but for the ridge [B, k]; zeros where
    there is none."""
    block = columns @ columns.mT
    block.diagonal(dim1=1, dim2=2).add_(ridge + torch.finfo(block.dtype).tiny)
    triangle, info = torch.linalg.cholesky_ex(block)
    basis = torch.linalg.solve_triangular(triangle, columns, upper=False)
    return torch.where((info == 0)[:, None, None], basis, 0)


def _fit(
    found: Candidates,
    queries: torch.Tensor,
    taken: torch.Tensor,
    is_present: torch.Tensor,
    iterations: int,
    kernels: MatchKernels,
    soft_cap: float,
) -> MatchedTokens:
    """Fit weights and values to keys that are already chosen.

    Args:
        taken: [B, m] int64, places among the candidates.
        is_present: [B, m] bool; False where `taken` names no evicted token.
    """
    absent = ~is_present[..., None]
    keys = _tokens_of(found.keys, taken).to(queries.dtype).masked_fill(absent, 0)
    values = _tokens_of(found.values, taken).to(queries.dtype).masked_fill(absent, 0)
    shares = logits(queries, keys, soft_cap).sub_(found.lse[..., None]).exp_()  # [B, N, m]
    shares.mul_(is_present[:, None])
    weights = fit_weights(shares, found.share, iterations, kernels)
    weighted = shares.mul_(weights[:, None])
    fitted = values + fit_values(weighted, found.output - weighted @ values)
    bias = weights.log().masked_fill_(~is_present, ABSENT_BIAS)
    return MatchedTokens(keys, fitted, bias)


def fit_weights(
    shares: torch.Tensor,
    target: torch.Tensor,
    iterations: int,
    kernels: MatchKernels = REFERENCE,
) -> torch.Tensor:
    """[B, m]: least squares between LEAST_WEIGHT and LARGEST_WEIGHT.

    Descent begins at the clamped solution without bounds. Columns are scaled to norm 1 first,
    because important tokens have columns that are longer by orders of magnitude. There may be far
    more columns than queries, so the products of the columns are not formed.

    Args:
        shares: [B, N, m], not negative; columns of zeros are absent.
        target: [B, N], what the weighted columns are to add up to.
        iterations: of the descent.
        kernels: of the platform.
    """
    norm = shares.norm(dim=1).clamp(min=torch.finfo(shares.dtype).tiny ** 0.5)
    scaled = shares / norm[:, None]
    least, most = LEAST_WEIGHT * norm, LARGEST_WEIGHT * norm
    products = scaled @ scaled.mT
    step = 1 / (largest_eigenvalue(products) + WEIGHT_RIDGE)
    # a ridge above the rounding of sums over so many columns
    ridge = torch.full_like(target[:, :1], max(WEIGHT_RIDGE, 1e-6 * norm.shape[1]))
    start = _ridge(scaled, products, target[..., None], ridge)[..., 0]
    start = torch.clamp(start, least, most)
    weights = kernels.solve(scaled, target, start, least, most, step, WEIGHT_RIDGE, iterations)
    return weights / norm


def fit_values(weighted: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    """[B, m, D]: what to add to the values of the chosen tokens, by ridge regression.

    Args:
        weighted: [B, N, m], shares times weights; columns of zeros are absent.
        missing: [B, N, D], what the output lacks.
    """
    squares = weighted.square().sum(1)  # [B, m]
    # the mean is over the columns that are there, however many other heads of the batch have
    present = (squares > 0).sum(1, keepdim=True).clamp(min=1)
    ridge = VALUE_RIDGE * squares.sum(1, keepdim=True) / present
    return _ridge(weighted, weighted @ weighted.mT, missing, ridge)


def _ridge(
    columns: torch.Tensor, products: torch.Tensor, target: torch.Tensor, ridge: torch.Tensor
) -> torch.Tensor:
    """[B, m, K]: ridge regression, solved for the N queries and not for the m columns.

    Args:
        columns: [B, N, m].
        products: [B, N, N], of the columns' rows; changed.
        target: [B, N, K].
        ridge: [B, 1], what the squared solution costs.
    """
    products.diagonal(dim1=1, dim2=2).add_(ridge.clamp(min=torch.finfo(columns.dtype).tiny))
    factor, info = torch.linalg.cholesky_ex(products)
    half = torch.linalg.solve_triangular(factor, target, upper=False)
    solution = columns.mT @ torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solution.masked_fill((info != 0)[:, None, None], 0)


def largest_eigenvalue(products: torch.Tensor) -> torch.Tensor:
    """[B], at least the largest eigenvalue of matrices [B, N, N] without negative elements.

    The largest (M v)_i / v_i bounds the eigenvalue for every positive v (Collatz and Wielandt).
    """
    vector = products.new_ones(len(products), products.shape[2], 1)
    for _ in range(_POWER_ITERATIONS):
        vector = products @ vector
        largest = vector.amax(1, keepdim=True).clamp(min=torch.finfo(products.dtype).tiny)
        vector = (vector / largest).clamp_(min=1e-6)
    return ((products @ vector) / vector).amax(1)[:, 0]


def _tokens_of(tokens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """[B, m, D]: tokens [B, T, D] at `chosen` [B, m]."""
    head = torch.arange(len(tokens), device=tokens.device)[:, None]
    return tokens[head, chosen]
