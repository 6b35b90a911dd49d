from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vllm_heterocache.kernels.dense_pages import gather_dense
from vllm_heterocache.kernels.kv_scales import FP8_DTYPES
from vllm_heterocache.kernels.prefill_attention_ref import prefill_attention_ref

PAGE = 16
CASES = [  # new tokens, tokens, H, G, D, dtype
    (1, 1, 2, 2, 64, torch.float32),
    (1, 63, 3, 3, 64, torch.bfloat16),
    (63, 63, 2, 4, 64, torch.float16),
    (17, 111, 1, 8, 128, torch.float32),
    (31, 47, 2, 1, 256, torch.bfloat16),
    (2, 33, 1, 7, 128, torch.float16),
    (15, 16, 1, 5, 64, torch.float32),
    (20, 20, 1, 6, 64, torch.bfloat16),
]


def case_id(case) -> str:
    new, tokens, num_kv_heads, group, head_dim, dtype = case
    return f"{new}of{tokens}-H{num_kv_heads}-G{group}-D{head_dim}-{str(dtype)[6:]}"


def random_case(case, generator):
    new, tokens, num_kv_heads, group, head_dim, dtype = case
    query = torch.randn(new, num_kv_heads * group, head_dim, generator=generator).to(dtype)
    keys = torch.randn(num_kv_heads, tokens, head_dim, generator=generator).to(dtype)
    values = torch.randn(num_kv_heads, tokens, head_dim, generator=generator).to(dtype)
    return query, keys, values, head_dim**-0.5


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_each_token_of_a_chunk_attends_to_itself_and_all_before_it(
    case, generator, exact_weights, assert_close_to_exact
):
    query, keys, values, scale = random_case(case, generator)
    new, tokens, _, group, _, _ = case
    exact = np.empty(query.shape)
    same_dtype = torch.empty_like(query)
    for i in range(new):
        seen = tokens - new + i + 1
        for q_head in range(query.shape[1]):
            head = q_head // group
            weights = exact_weights(query[i, q_head], keys[head, :seen], scale)
            exact[i, q_head] = weights @ values[head, :seen].double().numpy()
            logits = keys[head, :seen] @ query[i, q_head] * scale
            same_dtype[i, q_head] = F.softmax(logits, dim=0) @ values[head, :seen]
    assert_close_to_exact(prefill_attention_ref(query, keys, values, scale), exact, same_dtype)


@pytest.mark.parametrize(("has_sinks", "soft_cap"), [(True, 0.0), (False, 1.5), (True, 1.5)])
@pytest.mark.parametrize("block_elements", [1, 500, 1 << 20])
def test_sinks_take_weight_and_logits_are_capped(has_sinks, soft_cap, block_elements, generator):
    query, keys, values, scale = random_case((9, 25, 2, 3, 64, torch.float32), generator)
    sinks = 3 * torch.randn(6, generator=generator).bfloat16() if has_sinks else None
    kind = {"sink_logits": sinks, "soft_cap": soft_cap, "block_elements": block_elements}
    output = prefill_attention_ref(query, keys, values, scale, **kind)
    for i, q_head in itertools.product(range(9), range(6)):
        seen, head = 17 + i, q_head // 3
        logits = (keys[head, :seen] @ query[i, q_head] * scale).double()
        if soft_cap:
            logits = soft_cap * (logits / soft_cap).tanh()
        if has_sinks:
            logits = torch.cat([logits, sinks[q_head : q_head + 1].double()])
        exact = logits.softmax(0)[:seen] @ values[head, :seen].double()
        torch.testing.assert_close(output[i, q_head].double(), exact, rtol=1e-4, atol=1e-5)


def test_later_tokens_of_the_chunk_change_nothing(generator):
    query, keys, values, scale = random_case((9, 25, 2, 3, 64, torch.float32), generator)
    before = prefill_attention_ref(query, keys, values, scale)
    keys[:, 21:], values[:, 21:] = 100, -100  # seen by the last four rows alone
    after = prefill_attention_ref(query, keys, values, scale)
    assert torch.equal(after[:5], before[:5])
    assert not torch.isclose(after[5:], before[5:]).all(dim=-1).any()


def test_chunks_give_what_the_whole_prompt_gives(generator):
    query, keys, values, scale = random_case((45, 45, 2, 2, 64, torch.float32), generator)
    whole = prefill_attention_ref(query, keys, values, scale)
    ends = [0, 7, 8, 31, 45]
    chunks = [
        prefill_attention_ref(query[a:b], keys[:, :b], values[:, :b], scale)
        for a, b in itertools.pairwise(ends)
    ]
    torch.testing.assert_close(torch.cat(chunks), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 63, 64])
def test_gather_dense_collects_the_tokens_of_a_request_and_nothing_else(num_tokens, generator):
    num_kv_heads, head_dim, num_blocks = 3, 64, 9
    keys = torch.randn(num_kv_heads, num_tokens, head_dim, generator=generator)
    values = torch.randn(num_kv_heads, num_tokens, head_dim, generator=generator)
    kv_cache = torch.full((num_blocks, num_kv_heads, PAGE, 2 * head_dim), torch.nan)
    used = -(-num_tokens // PAGE)
    block_ids = torch.randperm(num_blocks, generator=generator)[:used].int()
    for token in range(num_tokens):
        page = kv_cache[int(block_ids[token // PAGE])]
        page[:, token % PAGE] = torch.cat((keys[:, token], values[:, token]), dim=-1)
    got_keys, got_values = gather_dense(kv_cache, block_ids, num_tokens)
    assert torch.equal(got_keys, keys) and torch.equal(got_values, values)


@pytest.mark.parametrize("dtype", FP8_DTYPES, ids=str)
def test_gather_dense_scales_the_elements_of_an_fp8_cache(dtype, generator):
    kv_cache = torch.randn(5, 3, PAGE, 2 * 64, generator=generator).to(dtype)
    of_keys, of_values = 0.3 + torch.rand(2, 3, generator=generator)
    keys, values = gather_dense(kv_cache, torch.tensor([4, 0, 2]), 41, (of_keys, of_values))
    assert keys.dtype == values.dtype == torch.float32
    for head, token in itertools.product(range(3), range(41)):
        elements = kv_cache[(4, 0, 2)[token // PAGE], head, token % PAGE].tolist()
        numbers = [e * of_keys[head].item() for e in elements[:64]]
        torch.testing.assert_close(keys[head, token], torch.tensor(numbers))
        numbers = [e * of_values[head].item() for e in elements[64:]]
        torch.testing.assert_close(values[head, token], torch.tensor(numbers))


def test_keys_of_a_wider_dtype_than_the_query_are_not_rounded(generator):
    query, keys, values, scale = random_case((9, 25, 2, 3, 64, torch.float32), generator)
    query = query.bfloat16()
    exact = prefill_attention_ref(query.float(), keys, values, scale)
    output = prefill_attention_ref(query, keys, values, scale)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, exact.bfloat16())
