"""Attention of reference queries on evicted tokens: the reference against token by token softmax,
the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from triton_mode import DEVICE

# isort: split
from evicted_case import make_evicted_case

from vllm_heterocache.kernels import evicted_attention as kernel
from vllm_heterocache.kernels.evicted_attention import evicted_attention
from vllm_heterocache.kernels.evicted_attention_ref import evicted_attention_ref

DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def make_case(*arguments):
    return [one.to(DEVICE) for one in make_evicted_case(*arguments)]


@pytest.mark.parametrize("block_elements", [1, 3 * 11 * 7, 1 << 20])
def test_the_reference_is_what_token_by_token_softmax_says(generator, block_elements):
    case = make_case(generator, 3, 61, 11, 24)
    keys, values, is_evicted, queries = case
    evicted = evicted_attention_ref(*case, block_elements=block_elements)
    for head in range(3):
        logits = torch.stack([keys[head] @ query for query in queries[head]])
        torch.testing.assert_close(evicted.lse[head], logits.logsumexp(1))
        mine = logits.softmax(1)[:, is_evicted[head]]
        torch.testing.assert_close(evicted.share[head], mine.sum(1))
        output = mine @ values[head][is_evicted[head]]
        torch.testing.assert_close(evicted.output[head], output, rtol=1e-5, atol=1e-5)
        importance = evicted.importance[head]
        torch.testing.assert_close(importance[is_evicted[head]], mine.square().mean(0))
        assert (importance[~is_evicted[head]] == -1).all()


def with_sinks(generator, queries):
    """One logit a query; some outweigh all tokens."""
    return (4 * torch.randn(queries.shape[:2], generator=generator) + 3).to(DEVICE)


@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
def test_sinks_take_their_share_and_logits_are_capped(generator, soft_cap):
    case = make_case(generator, 3, 61, 11, 24)
    keys, values, is_evicted, queries = case
    sinks = with_sinks(generator, queries)
    evicted = evicted_attention_ref(*case, sinks, soft_cap, block_elements=231)
    for head in range(3):
        logits = queries[head] @ keys[head].T
        if soft_cap:
            logits = soft_cap * (logits / soft_cap).tanh()
        logits = torch.cat([logits, sinks[head, :, None]], 1)
        torch.testing.assert_close(evicted.lse[head], logits.logsumexp(1))
        mine = logits.softmax(1)[:, :-1][:, is_evicted[head]]
        torch.testing.assert_close(evicted.share[head], mine.sum(1))
        output = mine @ values[head][is_evicted[head]]
        torch.testing.assert_close(evicted.output[head], output, rtol=1e-5, atol=1e-5)
        importance = evicted.importance[head][is_evicted[head]]
        torch.testing.assert_close(importance, mine.square().mean(0))


def assert_as_the_reference(case, sinks=None, soft_cap=0.0) -> None:
    keys, values, is_evicted, queries = case
    actual = evicted_attention(*case, sinks, soft_cap)
    exact = keys.double(), values.double(), is_evicted, queries.double()
    expected = evicted_attention_ref(*exact, None if sinks is None else sinks.double(), soft_cap)
    assert all(one.dtype == torch.float32 for one in actual)
    torch.testing.assert_close(actual.lse.double(), expected.lse, rtol=0, atol=2e-3)
    torch.testing.assert_close(actual.share.double(), expected.share, rtol=4e-3, atol=1e-6)
    torch.testing.assert_close(actual.output.double(), expected.output, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        actual.importance.double(), expected.importance, rtol=1e-2, atol=1e-9
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "num_queries"), [(1, 1), (63, 5), (64, 64), (200, 67), (333, 130)]
)
def test_the_kernel_agrees_with_the_reference(generator, num_tokens, num_queries, dtype):
    assert_as_the_reference(make_case(generator, 2, num_tokens, num_queries, 64, dtype))


@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_knows_sinks_and_caps(generator, monkeypatch, dtype, has_sinks, soft_cap):
    monkeypatch.setattr(kernel, "LEAST_SPLIT", 64)
    case = make_case(generator, 2, 200, 67, 64, dtype)
    sinks = with_sinks(generator, case[3]) if has_sinks else None
    assert_as_the_reference(case, sinks, soft_cap)


@pytest.mark.parametrize("head_dim", [16, 128, 256])
def test_heads_of_all_sizes(generator, head_dim):
    assert_as_the_reference(make_case(generator, 1, 100, 9, head_dim, torch.bfloat16))


def test_splits_of_a_prompt_are_merged(generator, monkeypatch):
    monkeypatch.setattr(kernel, "LEAST_SPLIT", 64)
    case = make_case(generator, 2, 500, 20, 64, torch.bfloat16)
    case[0][:, 130:140] += 4  # one split has nearly all of the attention
    assert_as_the_reference(case)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_or_all_may_be_evicted(generator, share):
    keys, values, is_evicted, queries = make_case(generator, 1, 90, 7, 64, torch.bfloat16)
    values = torch.ones_like(values) if share else torch.full_like(values, torch.nan)
    is_evicted.fill_(bool(share))
    evicted = evicted_attention(keys, values, is_evicted, queries)
    torch.testing.assert_close(evicted.share, torch.full_like(evicted.share, share))
    torch.testing.assert_close(
        evicted.output, torch.full_like(evicted.output, share), rtol=1e-2, atol=0
    )
    assert share or (evicted.importance == -1).all()


def test_keys_of_fp32_are_refused(generator):
    with pytest.raises(AssertionError, match="no kernel for keys of"):
        evicted_attention(*make_case(generator, 1, 16, 1, 64))
