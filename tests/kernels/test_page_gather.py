from __future__ import annotations

import pytest
import torch

from vllm_heterocache.kernels.page_gather_ref import page_gather_ref

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def bits(pages: torch.Tensor) -> torch.Tensor:
    """The bytes of each page, so that NaN equals itself."""
    return pages.contiguous().view(torch.uint8).view(pages.shape[0], -1)


def random_pages(num_pages: int, head_dim: int, dtype: torch.dtype, generator) -> torch.Tensor:
    pages = torch.randn(num_pages, 16, 2 * head_dim, generator=generator).to(dtype)
    pages[0, 3] = torch.nan
    return pages


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("num_copies", [0, 1, 7, 23])
def test_copies_pages_bit_by_bit_and_touches_no_other(num_copies, head_dim, dtype, generator):
    source = random_pages(31, head_dim, dtype, generator)
    target = random_pages(37, head_dim, dtype, generator)
    before = bits(target).clone()
    source_ids = torch.randint(31, (num_copies,), generator=generator).int()
    source_ids[:1] = 0
    target_ids = torch.randperm(37, generator=generator)[:num_copies]
    page_gather_ref(source, source_ids, target, target_ids)
    for source_id, target_id in zip(source_ids.tolist(), target_ids.tolist(), strict=True):
        before[target_id] = bits(source)[source_id]
    assert torch.equal(bits(target), before)


def test_copies_within_one_pool(generator):
    pool = random_pages(20, 64, torch.bfloat16, generator)
    expected = bits(pool).clone()
    order = torch.randperm(20, generator=generator)
    read, written = order[:8], order[8:16]
    expected[written] = expected[read]
    page_gather_ref(pool, read, pool, written.int())
    assert torch.equal(bits(pool), expected)


@pytest.mark.parametrize(
    ("num_ids", "width"), [((2, 3), 128), ((2, 2), 64)], ids=["ids differ", "page sizes differ"]
)
def test_ids_or_pages_that_do_not_match_are_an_error(num_ids, width):
    ids = [torch.arange(n) for n in num_ids]
    with pytest.raises(AssertionError):
        page_gather_ref(torch.zeros(5, 16, 128), ids[0], torch.zeros(5, 16, width), ids[1])
