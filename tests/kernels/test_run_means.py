"""Means of runs of evicted pages, and what is left for matched tokens beside them."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_heterocache.kernels.matched_tokens import ABSENT_BIAS, find_candidates
from vllm_heterocache.kernels.run_means import beside_means, run_means

B, P, PAGE, D = 3, 29, 16, 8


@pytest.fixture
def pages(generator):
    """Pages that stay hold NaN."""
    kv = torch.randn(B, P, PAGE, 2 * D, generator=generator)
    is_evicted = torch.rand(B, P, generator=generator) < 0.7
    is_evicted[2] = False
    is_evicted[2, 5:7] = True
    return kv.masked_fill(~is_evicted[..., None, None], torch.nan), is_evicted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_each_mean_is_that_of_its_run(pages, dtype):
    kv, is_evicted = pages
    kv = kv.to(dtype)
    counts = torch.tensor([7, 1, 5])
    means = run_means(kv, is_evicted, counts, 7)
    for head, count in enumerate(counts.tolist()):
        mine = kv[head, is_evicted[head]].float()
        first = [len(mine) * i // count for i in range(count + 1)]
        for i in range(7):
            if i >= count or first[i] == first[i + 1]:
                assert means.bias[head, i] == ABSENT_BIAS
                assert not means.keys[head, i].any() and not means.values[head, i].any()
                continue
            run = mine[first[i] : first[i + 1]].flatten(0, 1).mean(0)
            torch.testing.assert_close(means.keys[head, i], run[:D])
            torch.testing.assert_close(means.values[head, i], run[D:])
            assert float(means.bias[head, i]) == pytest.approx(math.log(PAGE * len(mine) / count))


def test_heads_that_evict_or_want_nothing_have_no_means(pages):
    kv, is_evicted = pages
    is_evicted = is_evicted.clone()
    is_evicted[0] = False
    means = run_means(kv, is_evicted, torch.tensor([2, 0, 2]), 2)
    assert (means.bias[:2] == ABSENT_BIAS).all() and (means.bias[2] > 0).all()
    assert all(one.isfinite().all() for one in means)


def test_candidates_beside_means_lack_what_the_means_do(pages, generator):
    kv, is_evicted = pages
    kv = kv.nan_to_num(0.5)
    means = run_means(kv, is_evicted, torch.tensor([4, 4, 4]), 4)
    queries = torch.randn(B, 11, D, generator=generator)
    keys, values = kv.flatten(1, 2).chunk(2, dim=2)
    found = find_candidates(keys, values, is_evicted.repeat_interleave(PAGE, 1), queries, 6)
    rest = beside_means(found, queries, means)
    for head in range(B):
        for n, query in enumerate(queries[head].double()):
            total = (keys[head].double() @ query).exp().sum()
            bias = means.bias[head].double()
            weights = (means.keys[head].double() @ query + bias).exp() / total
            share = max(float(found.share[head, n]) - float(weights.sum()), 0.0)
            assert float(rest.share[head, n]) == pytest.approx(share, abs=1e-5)
            output = found.output[head, n].double() - weights @ means.values[head].double()
            torch.testing.assert_close(rest.output[head, n].double(), output, rtol=0, atol=1e-5)
    assert (rest.share == 0).any() or (rest.share < found.share).all()
    assert torch.equal(rest.keys, found.keys) and torch.equal(rest.lse, found.lse)
