"""`quantized_keys` against its reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from finder_case import make_finder_case, quantize
from triton_mode import FP8_ON_DEVICE, ON_GPU

from vllm_heterocache.kernels.quantized_keys import quantized_keys
from vllm_heterocache.kernels.quantized_keys_ref import quantized_keys_ref


def check(case) -> None:
    """Bit by bit, but that the interpreter cuts digits of bf16 off. What nobody may write is as
    before."""
    expected, actual = case.fresh(), case.fresh()
    quantize(quantized_keys_ref, expected)
    quantize(quantized_keys, actual)
    assert torch.equal(actual.finders.codes, expected.finders.codes)
    is_cut = case.query.dtype == torch.bfloat16 and not ON_GPU
    grids, exact = actual.finders.grids.float(), expected.finders.grids.float()
    rtol = torch.finfo(torch.bfloat16).eps if is_cut else 0
    torch.testing.assert_close(grids, exact, rtol=rtol, atol=0, equal_nan=True)


# The interpreter, which is slow, tries each head size and each dtype, and not all pairs.
PAIRS = [
    (head_dim, dtype)
    for column, head_dim in enumerate([64, 128, 256])
    for row, dtype in enumerate([torch.bfloat16, torch.float16, torch.float32])
    if ON_GPU or row == column or row + column == 2
]


@pytest.mark.parametrize(("head_dim", "dtype"), PAIRS, ids=str)
def test_codes_and_grids_are_those_of_the_reference(head_dim, dtype, generator):
    check(make_finder_case(1, head_dim, dtype, generator))


@pytest.mark.parametrize("page_dtype", FP8_ON_DEVICE, ids=str)
def test_fp8_pages(page_dtype, generator):
    check(make_finder_case(4, 64, torch.bfloat16, generator, page_dtype))
