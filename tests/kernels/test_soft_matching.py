from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from vllm_heterocache.kernels.soft_matching import soft_matching


def slow_round(chunk: list[tuple[np.ndarray, int]], num_merged: int) -> list:
    """[(K and V, tokens)] of a chunk without the A that are merged."""

    def cosine(one: np.ndarray, other: np.ndarray) -> float:
        x, y = one[: len(one) // 2], other[: len(other) // 2]
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    pairs = []
    for a in range(0, len(chunk), 2):
        likeness = [(cosine(chunk[a][0], chunk[b][0]), b) for b in range(1, len(chunk), 2)]
        if likeness:
            pairs.append((*max(likeness), a))
    merged = sorted(pairs, reverse=True)[:num_merged]
    joined = dict(enumerate(chunk))
    for _, b, a in merged:
        (kv, count), (more, more_count) = joined[b], chunk[a]
        joined[b] = ((kv * count + more * more_count) / (count + more_count), count + more_count)
    return [joined[i] for i in range(len(chunk)) if i not in {a for _, _, a in merged}]


def slow_matching(kv: np.ndarray, num_kept: int, chunk_tokens: int):
    num_tokens = len(kv)
    num_chunks = max(1, min(num_tokens // chunk_tokens, num_kept // 2))
    bounds = [i * num_tokens // num_chunks for i in range(num_chunks + 1)]
    result = []
    for begin, end in itertools.pairwise(bounds):
        share = end * num_kept // num_tokens - begin * num_kept // num_tokens
        chunk = [(token, 1) for token in kv[begin:end]]
        while len(chunk) > share:
            chunk = slow_round(chunk, min(len(chunk) // 2, len(chunk) - share))
        result += chunk
    return np.array([token for token, _ in result]), np.array([count for _, count in result])


@pytest.mark.parametrize(
    ("num_tokens", "num_kept", "chunk_tokens"),
    [(48, 32, 16), (48, 17, 16), (50, 7, 16), (37, 36, 9), (64, 64, 8), (33, 1, 8), (100, 9, 64)],
)
def test_centroids_are_those_of_the_matching_in_loops(
    num_tokens, num_kept, chunk_tokens, generator
):
    kv = torch.randn(2, num_tokens, 12, generator=generator)
    found = soft_matching(kv, num_kept, chunk_tokens)
    assert found.keys.shape == found.values.shape == (2, num_kept, 6)
    for head in range(2):
        tokens, counts = slow_matching(kv[head].double().numpy(), num_kept, chunk_tokens)
        actual = torch.cat((found.keys[head], found.values[head]), dim=1).double().numpy()
        np.testing.assert_allclose(actual, tokens, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.bias[head].exp().numpy(), counts, rtol=1e-5)
        assert counts.sum() == num_tokens


def test_tokens_that_are_alike_are_merged_and_the_odd_one_stays():
    """Means of neighbours would mix the third token with another."""
    a, b, odd = [4.0, 0.0], [0.0, 4.0], [-3.0, -3.0]
    keys = torch.tensor([a, b, odd, a, b, b])
    values = torch.tensor([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0], [4.0, 4.0], [3.0, 3.0], [7.0, 7.0]])
    found = soft_matching(torch.cat((keys, values), dim=1)[None], 4, 6)
    assert found.keys[0].tolist() == [b, odd, a, b]
    assert found.values[0].tolist() == [[2.0, 2.0], [9.0, 9.0], [2.0, 2.0], [7.0, 7.0]]
    torch.testing.assert_close(found.bias[0].exp(), torch.tensor([2.0, 1.0, 2.0, 1.0]))


def test_a_centroid_weighs_as_its_tokens_do_where_these_are_equal(generator):
    keys = torch.randn(8, 6, generator=generator).repeat_interleave(2, dim=0)
    values = torch.randn(16, 6, generator=generator)
    found = soft_matching(torch.cat((keys, values), dim=1)[None], 8, 16)
    query = torch.randn(6, generator=generator)
    weights = (found.keys[0] @ query + found.bias[0]).softmax(0)
    torch.testing.assert_close(weights @ found.values[0], (keys @ query).softmax(0) @ values)
