"""How keys and values become elements of an fp8 pool, and what goes with which pool."""

from __future__ import annotations

import pytest
import torch

from vllm_heterocache.kernels.kv_scales import (
    FP8_DTYPES,
    KVScales,
    check_scales,
    logit_scales,
    to_elements,
)


@pytest.mark.parametrize("dtype", FP8_DTYPES, ids=str)
def test_an_element_is_the_nearest_that_the_scale_allows(dtype, generator):
    scales = torch.tensor([0.03, 0.5, 7.0])
    numbers = 4 * torch.randn(5, 3, 64, generator=generator) * scales[:, None]
    elements = to_elements(numbers, scales, dtype)
    assert elements.dtype == dtype
    all_elements = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    all_elements = all_elements[all_elements.isfinite()]
    for head, scale in enumerate(scales):
        wanted = (numbers[:, head] / scale).flatten()
        errors = (elements[:, head].float().flatten() - wanted).abs()
        best = (all_elements[:, None] - wanted).abs().amin(0)
        assert torch.equal(errors, best)


@pytest.mark.parametrize(("dtype", "largest"), zip(FP8_DTYPES, [448.0, 57344.0], strict=True))
def test_numbers_beyond_the_largest_element_become_that_element(dtype, largest):
    numbers = torch.tensor([[[1e9, -1e9, 3 * largest, largest, torch.inf]]])
    elements = to_elements(numbers, torch.tensor([2.0]), dtype).float()
    assert elements.flatten().tolist() == [largest, -largest, largest, largest / 2, largest]


def test_logits_carry_the_scale_of_their_heads_keys():
    key = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    scales = logit_scales(0.5, KVScales(key, key * 100, key[:, :1]), 1)
    assert scales.tolist() == [[[1.5]], [[2.0]]]
    assert logit_scales(0.5, None, 1) == 0.5


@pytest.mark.parametrize("dtype", [*FP8_DTYPES, torch.bfloat16], ids=str)
def test_fp8_pages_without_scales_and_others_with_scales_are_a_mistake(dtype):
    ones = torch.ones(2, 3)
    scales = KVScales(ones, ones, ones)
    right, wrong = (scales, None) if dtype in FP8_DTYPES else (None, scales)
    pages = torch.zeros(4, 16, 8).to(dtype)
    check_scales(pages, right, ones.shape)
    with pytest.raises(AssertionError):
        check_scales(pages, wrong, ones.shape)


def test_scales_of_other_heads_are_a_mistake():
    ones, pages = torch.ones(2, 3), torch.zeros(4, 16, 8).to(torch.float8_e5m2)
    with pytest.raises(AssertionError):
        check_scales(pages, KVScales(ones, ones[:, :1], ones), ones.shape)
