from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_heterocache.kernels.page_scores_ref import page_scores_ref

PAGE = 16
CASES = [  # tokens, H, G, D, dtype
    (16, 1, 1, 64, torch.float32),
    (63, 3, 2, 64, torch.bfloat16),
    (111, 2, 4, 128, torch.float32),
    (97, 2, 8, 64, torch.float16),
    (80, 1, 3, 256, torch.bfloat16),
    (49, 2, 5, 128, torch.float16),
    (33, 1, 6, 64, torch.float32),
    (127, 1, 7, 64, torch.float32),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"T{c[0]}-H{c[1]}-G{c[2]}-D{c[3]}")
def test_a_page_scores_the_largest_mass_any_query_head_of_the_group_puts_on_it(
    case, generator, exact_weights
):
    tokens, num_kv_heads, group, head_dim, dtype = case
    query = torch.randn(num_kv_heads * group, head_dim, generator=generator).to(dtype)
    keys = torch.randn(num_kv_heads, tokens, head_dim, generator=generator).to(dtype)
    num_pages, scale = tokens // PAGE, head_dim**-0.5
    exact = np.zeros((num_kv_heads, num_pages))
    for q_head in range(num_kv_heads * group):
        head = q_head // group
        weights = exact_weights(query[q_head], keys[head], scale)
        for page in range(num_pages):
            mass = weights[page * PAGE : (page + 1) * PAGE].sum()
            exact[head, page] = max(exact[head, page], mass)
    scores = page_scores_ref(query, keys, num_pages, PAGE, scale)
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), exact, rtol=2e-5)


def test_tokens_after_the_full_pages_take_their_share_of_the_mass(generator):
    query = torch.randn(2, 64, generator=generator)
    keys = torch.randn(2, 45, 64, generator=generator)
    full = page_scores_ref(query, keys[:, :32], 2, PAGE, 0.125)
    torch.testing.assert_close(full.sum(dim=1), torch.ones(2))
    keys[:, 44] = query * 10  # the last token draws nearly everything
    assert (page_scores_ref(query, keys, 2, PAGE, 0.125) < 1e-6).all()


def test_low_precision_keys_are_scored_in_fp32(generator):
    """In fp16 most of 2000 equal weights round to the same few values, and sums drift."""
    keys = torch.zeros(1, 2000, 64, dtype=torch.float16)
    keys[0, :, 0] = torch.linspace(0, 1, 2000)
    query = torch.zeros(1, 64, dtype=torch.float16)
    query[0, 0] = 1
    scores = page_scores_ref(query, keys, 125, PAGE, 1.0)[0]
    assert (scores.diff() > 0).all()
    torch.testing.assert_close(scores.sum(), torch.tensor(1.0))
