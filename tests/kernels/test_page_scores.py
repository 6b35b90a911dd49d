from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from dense_prompt import PAGE, make_dense_prompt

from vllm_heterocache.kernels.kv_scales import FP8_DTYPES
from vllm_heterocache.kernels.page_scores_ref import page_scores_ref

CASES = [  # tokens, L, H, G, D, dtype
    (16, 1, 1, 1, 64, torch.float32),
    (63, 2, 3, 2, 64, torch.bfloat16),
    (111, 1, 2, 4, 128, torch.float32),
    (97, 3, 2, 8, 64, torch.float16),
    (80, 2, 1, 3, 256, torch.bfloat16),
    (49, 1, 2, 5, 128, torch.float16),
    (33, 3, 1, 6, 64, torch.float32),
    (127, 1, 1, 7, 64, torch.float32),
]


def case_id(case) -> str:
    return "T{}-L{}-H{}-G{}-D{}-{}".format(*case[:5], str(case[5])[6:])


def scores_of(query, keys, scale: float = 0.125) -> torch.Tensor:
    """Scores of one layer and one head, whose pages lie in token order."""
    padded = torch.zeros(-(-keys.shape[0] // PAGE), PAGE, 2 * keys.shape[1], dtype=keys.dtype)
    padded.flatten(0, 1)[: keys.shape[0], : keys.shape[1]] = keys
    out = torch.full((1, 1, keys.shape[0] // PAGE), torch.nan)
    page_scores_ref(query[None], padded, torch.arange(len(padded)), keys.shape[0], scale, out)
    return out[0, 0]


@pytest.mark.parametrize(
    ("case", "page_dtype"),
    [*[(case, None) for case in CASES], *itertools.product(CASES[2:5], FP8_DTYPES)],
    ids=lambda one: case_id(one) if isinstance(one, tuple) else str(one),
)
def test_a_page_scores_the_largest_mass_any_query_head_of_the_group_puts_on_it(
    case, page_dtype, generator, exact_weights
):
    num_tokens, num_layers, num_kv_heads, group, head_dim, _ = case
    prompt = make_dense_prompt(*case, generator, page_dtype)
    num_pages, scale = num_tokens // PAGE, head_dim**-0.5
    exact = np.zeros((num_layers, num_kv_heads, num_pages))
    for layer in range(num_layers):
        for q_head in range(num_kv_heads * group):
            head = q_head // group
            query = prompt.last_query[layer, q_head]
            weights = exact_weights(query, prompt.keys[layer, head], scale)
            for page in range(num_pages):
                mass = weights[page * PAGE : (page + 1) * PAGE].sum()
                exact[layer, head, page] = max(exact[layer, head, page], mass)
    out = torch.full(exact.shape, torch.nan)
    inputs = prompt.last_query, prompt.pages, prompt.dense_blocks
    page_scores_ref(*inputs, num_tokens, scale, out, prompt.kv_scales)
    np.testing.assert_allclose(out.numpy(), exact, rtol=2e-5)


@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
def test_a_score_is_a_share_of_what_a_head_and_its_sink_attend_to(soft_cap, generator):
    prompt = make_dense_prompt(45, 2, 2, 3, 64, torch.float32, generator)
    sinks = 3 * torch.randn(2, 6, generator=generator).bfloat16()
    out = torch.full((2, 2, 2), torch.nan)
    inputs = prompt.last_query, prompt.pages, prompt.dense_blocks
    page_scores_ref(*inputs, 45, 0.125, out, None, sinks, soft_cap)
    for layer, head, page in itertools.product(range(2), range(2), range(2)):
        masses = []
        for q_head in range(3 * head, 3 * head + 3):
            logits = prompt.keys[layer, head] @ prompt.last_query[layer, q_head] * 0.125
            if soft_cap:
                logits = soft_cap * (logits / soft_cap).tanh()
            weights = torch.cat([logits, sinks[layer, q_head : q_head + 1].float()]).softmax(0)
            masses.append(weights[PAGE * page : PAGE * (page + 1)].sum())
        torch.testing.assert_close(out[layer, head, page], max(masses))


def test_tokens_after_the_full_pages_take_their_share_of_the_mass(generator):
    query = torch.randn(1, 64, generator=generator)
    keys = torch.randn(45, 64, generator=generator)
    torch.testing.assert_close(scores_of(query, keys[:32]).sum(), torch.tensor(1.0))
    keys[44] = query * 10  # the last token draws nearly everything
    assert (scores_of(query, keys) < 1e-6).all()


def test_a_prompt_shorter_than_a_page_has_no_scores(generator):
    assert scores_of(torch.ones(1, 64), torch.ones(15, 64)).shape == (0,)


def test_low_precision_keys_are_scored_in_fp32():
    """In fp16 most of 2000 equal weights round to the same few values, and sums drift."""
    keys = torch.zeros(2000, 64, dtype=torch.float16)
    keys[:, 0] = torch.linspace(0, 1, 2000)
    query = torch.zeros(1, 64, dtype=torch.float16)
    query[0, 0] = 1
    scores = scores_of(query, keys, 1.0)
    assert (scores.diff() > 0).all()
    torch.testing.assert_close(scores.sum(), torch.tensor(1.0))
