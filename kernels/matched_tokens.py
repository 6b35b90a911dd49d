"""Matched tokens: what evicted tokens leave behind, fitted to a prompt's own queries.

After Attention Matching (arXiv 2602.16284). A head that evicts tokens keeps a few of their keys,
each with a weight w and a value of its own. Decode attention adds ln w to the logit of the token.
Weights are such that the matched tokens take the attention that the evicted tokens took. Values are
such that the output is what it was. Both are least squares over reference queries, in plain torch
for CPU and CUDA. Nothing here waits for the device, and no shape depends on the data.

B heads, T tokens of the prompt, N reference queries (of all query heads of a group), m matched
tokens, D the size of a head. A share is attention on one token divided by that on the whole prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

# fp32 elements of one temporary: 64 MiB
BLOCK_ELEMENTS = 1 << 24
# Keys are chosen in so many rounds, out of parts of about so many tokens, of which at most so many
# are an equal portion. Smaller parts are cheaper and worse: simulated at 8,192 tokens and 10 %, one
# part has KL .030, two .039, four .048.
ROUNDS, PART_TOKENS, MOST_OF_PART = 8, 16384, 512
# What a part looks at and offers, times its equal portion of the matched tokens.
CANDIDATES, OFFERS = 4, 2
# Of the weights, so that ln w is small and finite.
LEAST_WEIGHT, LARGEST_WEIGHT = 1e-4, 1e4
# ln w of the places that no evicted token fills. fp16 holds it, and exp makes 0 of it.
ABSENT_BIAS = -1e4
WEIGHT_ITERATIONS = 50
# Ridges, as shares of the mean squared norm of the columns that are fitted.
WEIGHT_RIDGE, VALUE_RIDGE = 1e-5, 1e-3
# Share of a column's squared norm under which it counts as explained by the columns before.
PIVOT_RIDGE = 1e-4
_POWER_ITERATIONS = 12


class MatchedTokens(NamedTuple):
    """What B heads keep of the tokens that they evicted."""

    keys: torch.Tensor  # [B, m, D] fp32, m of the evicted keys
    values: torch.Tensor  # [B, m, D] fp32
    bias: torch.Tensor  # [B, m] fp32, ln w; ABSENT_BIAS where fewer tokens than m are evicted


class EvictedAttention(NamedTuple):
    """What the evicted tokens do to the reference queries."""

    share: torch.Tensor  # [B, N] fp32, sum of the evicted tokens' shares
    output: torch.Tensor  # [B, N, D] fp32, sum of their shares times their values
    importance: torch.Tensor  # [B, T] fp32, mean squared share of a token; -1 if it is not evicted


def match_tokens(
    keys: torch.Tensor,
    values: torch.Tensor,
    is_evicted: torch.Tensor,
    queries: torch.Tensor,
    num_matched: int,
    counts: torch.Tensor | None = None,
    *,
    part_tokens: int = PART_TOKENS,
    iterations: int = WEIGHT_ITERATIONS,
    block_elements: int = BLOCK_ELEMENTS,
) -> MatchedTokens:
    """Keys, weights and values that stand for the evicted tokens of each head.

    Keys are important ones that differ (`choose_keys`). Weights are non-negative least squares, so
    that the sum of w * exp(q . k) is the evicted tokens' share. Values are a ridge regression
    towards the keys' own values.

    With p parts and u = m / p, a head takes 6 * N * T * D flops for attention, m * (32 * N * u
    + 8 * N * D + 16 * u * u) for the choice, and 4 * N * (m * (N + iterations + 2 * D) + N * N / 6)
    for the fit. It reads keys twice and values once. Temporaries have 4 bytes an element:
    `fit_elements` a head, and three of `block_elements` for all.

    Args:
        keys: [B, T, D], any float dtype, after RoPE.
        values: [B, T, D], any float dtype; those of tokens that are not evicted are not used.
        is_evicted: [B, T] bool.
        queries: [B, N, D], N >= 1, after RoPE, times the softmax scale.
        num_matched: m, 1 <= m <= T.
        counts: [B] int64, matched tokens of each head, at most m; None: m. Places behind them are
            absent.
        part_tokens: about so many tokens are compared with one another when keys are chosen.
        iterations: of the fit of the weights.
        block_elements: bound of a temporary over tokens, in elements.

    Returns:
        Tokens of a head in falling order of what they add. All are finite for finite inputs.
    """
    num_heads, num_tokens, head_dim = keys.shape
    assert values.shape == keys.shape and is_evicted.shape == (num_heads, num_tokens)
    assert queries.shape[::2] == (num_heads, head_dim) and queries.shape[1] >= 1
    assert is_evicted.dtype == torch.bool and 1 <= num_matched <= num_tokens
    queries = queries.float()
    lse = attention_lse(keys, queries, block_elements)
    evicted = evicted_attention(keys, values, is_evicted, queries, lse, block_elements)
    chosen, is_present = choose_keys(
        keys, queries, lse, evicted.importance, num_matched, part_tokens
    )
    if counts is not None:
        is_present &= torch.arange(num_matched, device=keys.device) < counts[:, None]
    return fit_chosen(keys, values, queries, lse, evicted, chosen, is_present, iterations)


def fit_elements(num_queries: int, head_dim: int, num_matched: int) -> int:
    """Most fp32 elements of the temporaries of one head, but for those of `block_elements`."""
    portion = min(num_matched, MOST_OF_PART)
    of_queries = num_queries * (8 * num_matched + 4 * head_dim + 2 * num_queries)
    return of_queries + 24 * num_matched * portion


def attention_lse(
    keys: torch.Tensor, queries: torch.Tensor, block_elements: int = BLOCK_ELEMENTS
) -> torch.Tensor:
    """[B, N] fp32: log-sum-exp of each query's logits over all T tokens; arguments as above."""
    lse = queries.new_full(queries.shape[:2], -torch.inf)
    for tokens in _token_blocks(keys, queries, block_elements):
        lse = torch.logaddexp(lse, _logits(queries, keys[:, tokens]).logsumexp(-1))
    return lse


def evicted_attention(
    keys: torch.Tensor,
    values: torch.Tensor,
    is_evicted: torch.Tensor,
    queries: torch.Tensor,
    lse: torch.Tensor,
    block_elements: int = BLOCK_ELEMENTS,
) -> EvictedAttention:
    """The evicted tokens' part of attention, a block of tokens at a time.

    Arguments are those of `match_tokens`, and `lse` from `attention_lse`; the dtype of
    the queries, fp32 or fp64, is that of the results.
    """
    share, output = torch.zeros_like(lse), torch.zeros_like(queries)
    importance = queries.new_empty(is_evicted.shape)
    for tokens in _token_blocks(keys, queries, block_elements):
        is_mine = is_evicted[:, tokens]
        shares = _logits(queries, keys[:, tokens]).sub_(lse[..., None]).exp_()
        shares.mul_(is_mine[:, None])
        share += shares.sum(-1)
        # 0 times whatever stands in a value that is not evicted would not be 0
        mine = values[:, tokens].to(queries.dtype).masked_fill(~is_mine[..., None], 0)
        output.baddbmm_(shares, mine)
        importance[:, tokens] = shares.square_().mean(1).masked_fill_(~is_mine, -1)
    return EvictedAttention(share, output, importance)


def choose_keys(
    keys: torch.Tensor,
    queries: torch.Tensor,
    lse: torch.Tensor,
    importance: torch.Tensor,
    num_matched: int,
    part_tokens: int = PART_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens whose shares differ from one another, those that add most first.

    Tokens that resemble one another would stand for the same part of attention. So a round takes
    the tokens whose shares have the largest part that is orthogonal to the shares of those taken
    before. Each part of the prompt offers up to OFFERS times its equal portion of the m tokens,
    out of the CANDIDATES times as many that are the most important in it. Of all offers, the m with
    the largest orthogonal parts are chosen.

    Returns:
        The tokens [B, m] int64, and whether they are evicted [B, m] bool; those that are not have a
        negative importance and come last.
    """
    num_heads, num_tokens = importance.shape
    num_parts = max(-(-num_tokens // part_tokens), -(-num_matched // MOST_OF_PART))
    size = -(-num_tokens // num_parts)
    portion = -(-num_matched // num_parts)
    of_parts = _in_parts(importance, num_parts, -1)
    found, candidates = of_parts.topk(min(CANDIDATES * portion, size), dim=1)
    first = torch.arange(num_parts, device=keys.device).repeat(num_heads)[:, None] * size
    # a place behind the last token has no importance, and any key will do
    candidates = (candidates + first).clamp(max=num_tokens - 1).view(num_heads, -1)
    shares = _logits(queries, _tokens_of(keys, candidates)).sub_(lse[..., None]).exp_()
    columns = shares.mT.unflatten(1, (num_parts, -1)).flatten(0, 1)  # [B * parts, C, N]
    count = min(portion if num_parts == 1 else OFFERS * portion, columns.shape[1])
    taken, size_left = _pivots(columns @ columns.mT, found >= 0, count)
    offers = candidates.view(*found.shape).gather(1, taken).view(num_heads, -1)
    added, best = size_left.view(num_heads, -1).topk(num_matched, dim=1)
    return offers.gather(1, best), added >= 0


def _in_parts(tokens: torch.Tensor, num_parts: int, filling: float) -> torch.Tensor:
    """[B * num_parts, ceil(T / num_parts)]: elements of [B, T], the last part filled up."""
    size = -(-tokens.shape[1] // num_parts)
    missing = num_parts * size - tokens.shape[1]
    return F.pad(tokens, (0, missing), value=filling).unflatten(1, (num_parts, size)).flatten(0, 1)


def _pivots(
    gram: torch.Tensor, is_candidate: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns in the order of a Cholesky factorisation that pivots in rounds.

    Args:
        gram: [B, C, C], products of the columns.
        is_candidate: [B, C] bool; all others come last.
        count: columns to take, at most C.

    Returns:
        [B, count] int64, and the squared norm of each column's part that is orthogonal to those of
        the rounds before [B, count]; -1 for what is no candidate.
    """
    size = gram.diagonal(dim1=1, dim2=2)
    left = size.masked_fill(~is_candidate, -1)
    factor = gram.new_zeros(*gram.shape[:2], count)
    chosen = torch.empty(len(gram), 0, dtype=torch.long, device=gram.device)
    sizes = gram.new_empty(len(gram), 0)
    ends = [count * (i + 1) // ROUNDS for i in range(ROUNDS)]
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        if start == end:
            continue
        largest, newest = left.topk(end - start, dim=1)
        chosen, sizes = torch.cat([chosen, newest], 1), torch.cat([sizes, largest], 1)
        done = factor[..., :start]
        columns = _columns_of(gram, newest) - done @ _tokens_of(done, newest).mT
        block = _tokens_of(columns, newest)
        ridge = PIVOT_RIDGE * size.gather(1, newest) + torch.finfo(gram.dtype).tiny
        block.diagonal(dim1=1, dim2=2).add_(ridge)
        triangle, info = torch.linalg.cholesky_ex(block)
        solved = torch.linalg.solve_triangular(triangle, columns.mT, upper=False).mT
        solved = torch.where((info == 0)[:, None, None], solved, 0)
        factor[..., start:end] = solved
        # what the columns taken explain but for rounding is ranked by importance
        left = (left - solved.square().sum(2)).maximum(PIVOT_RIDGE * size)
        left = left.masked_fill(~is_candidate, -1).scatter_(1, chosen, -2)
    return chosen, sizes


def fit_chosen(
    keys: torch.Tensor,
    values: torch.Tensor,
    queries: torch.Tensor,
    lse: torch.Tensor,
    evicted: EvictedAttention,
    chosen: torch.Tensor,
    is_present: torch.Tensor,
    iterations: int = WEIGHT_ITERATIONS,
) -> MatchedTokens:
    """Fit weights and values to keys that are already chosen.

    Args:
        keys, values, queries, lse, evicted: as in `evicted_attention`, and its result.
        chosen: [B, m] int64, tokens of each head.
        is_present: [B, m] bool; False where `chosen` names no evicted token.
        iterations: of the fit of the weights.
    """
    absent = ~is_present[..., None]
    own_keys = _tokens_of(keys, chosen).to(queries.dtype).masked_fill(absent, 0)
    own_values = _tokens_of(values, chosen).to(queries.dtype).masked_fill(absent, 0)
    shares = _logits(queries, own_keys).sub_(lse[..., None]).exp_()  # [B, N, m]
    shares.mul_(is_present[:, None])
    weights = fit_weights(shares, evicted.share, iterations)
    weighted = shares.mul_(weights[:, None])
    fitted = own_values + fit_values(weighted, evicted.output - weighted @ own_values)
    bias = weights.log().masked_fill_(~is_present, ABSENT_BIAS)
    return MatchedTokens(own_keys, fitted, bias)


def fit_weights(shares: torch.Tensor, target: torch.Tensor, iterations: int) -> torch.Tensor:
    """[B, m]: least squares between LEAST_WEIGHT and LARGEST_WEIGHT.

    Accelerated projected gradient from the clamped solution without bounds. A head whose momentum
    points uphill starts its momentum anew. Columns are scaled to norm 1 first, because important
    tokens have columns that are longer by orders of magnitude. All products are with the columns
    themselves: there may be far more of them than queries, so their Gram matrix is not formed.

    Args:
        shares: [B, N, m], not negative; columns of zeros are absent.
        target: [B, N], what the weighted columns are to add up to.
        iterations: steps, the same for all heads.
    """
    norm = shares.norm(dim=1).clamp(min=torch.finfo(shares.dtype).tiny ** 0.5)
    scaled = shares / norm[:, None]
    least, most = LEAST_WEIGHT * norm, LARGEST_WEIGHT * norm
    # a ridge above the rounding of sums over so many columns
    ridge = torch.full_like(target[:, :1], max(WEIGHT_RIDGE, 1e-6 * norm.shape[1]))
    start = _ridge(scaled, target[..., None], ridge)
    weights = start[..., 0].clamp(least, most)
    step = 1 / (_largest_eigenvalue(scaled) + WEIGHT_RIDGE)[:, None]
    ahead, momentum = weights, torch.ones_like(step)
    for _ in range(iterations):
        error = scaled @ ahead[..., None] - target[..., None]
        slope = (scaled.mT @ error)[..., 0] + WEIGHT_RIDGE * ahead
        moved = torch.clamp(ahead - step * slope, least, most)
        is_uphill = ((ahead - moved) * (moved - weights)).sum(1, keepdim=True) > 0
        momentum = momentum.masked_fill(is_uphill, 1)
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        rate = ((momentum - 1) / following).masked_fill(is_uphill, 0)
        ahead = moved + rate * (moved - weights)
        weights, momentum = moved, following
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
    return _ridge(weighted, missing, ridge)


def _ridge(columns: torch.Tensor, target: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """[B, m, K]: ridge regression, solved for the N queries and not for the m columns.

    Args:
        columns: [B, N, m].
        target: [B, N, K].
        ridge: [B, 1], what the squared solution costs.
    """
    products = columns @ columns.mT
    products.diagonal(dim1=1, dim2=2).add_(ridge.clamp(min=torch.finfo(columns.dtype).tiny))
    factor, info = torch.linalg.cholesky_ex(products)
    solution = columns.mT @ torch.cholesky_solve(target, factor)
    return solution.masked_fill((info != 0)[:, None, None], 0)


def _largest_eigenvalue(columns: torch.Tensor) -> torch.Tensor:
    """[B], at least the largest eigenvalue of the Gram matrix of columns [B, N, m] that have no
    negative elements.

    The largest (M v)_i / v_i bounds the eigenvalue for every positive v (Collatz and Wielandt).
    """
    vector = columns.new_ones(len(columns), columns.shape[2], 1)
    for _ in range(_POWER_ITERATIONS):
        vector = columns.mT @ (columns @ vector)
        largest = vector.amax(1, keepdim=True).clamp(min=torch.finfo(columns.dtype).tiny)
        vector = (vector / largest).clamp_(min=1e-6)
    return ((columns.mT @ (columns @ vector)) / vector).amax(1)[:, 0]


def _logits(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return queries @ keys.to(queries.dtype).mT


def _tokens_of(tokens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """[B, m, D]: tokens [B, T, D] at `chosen` [B, m]."""
    head = torch.arange(len(tokens), device=tokens.device)[:, None]
    return tokens[head, chosen]


def _columns_of(matrix: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """[B, C, m]: columns of [B, C, C] at `chosen` [B, m]."""
    return matrix.gather(2, chosen[:, None].expand(-1, matrix.shape[1], -1))


def _token_blocks(keys: torch.Tensor, queries: torch.Tensor, block_elements: int) -> list[slice]:
    """Blocks of tokens whose logits for all heads and queries have `block_elements` or fewer."""
    num_heads, num_tokens, _ = keys.shape
    size = max(1, block_elements // (num_heads * queries.shape[1]))
    return [slice(first, first + size) for first in range(0, num_tokens, size)]
