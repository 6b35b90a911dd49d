"""`page_gather` against its reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from triton_mode import DEVICE

from vllm_heterocache.kernels.page_gather import page_gather
from vllm_heterocache.kernels.page_gather_ref import page_gather_ref

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
PAGES = 61


def make_pools(head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Source pages, and a target that holds NaN."""
    source = torch.randn(PAGES, 16, 2 * head_dim, device=DEVICE).to(dtype)
    target = torch.full((PAGES + 2, 16, 2 * head_dim), torch.nan, device=DEVICE).to(dtype)
    return source, target


def make_ids(num_copies: int) -> tuple[torch.Tensor, torch.Tensor]:
    source_ids = torch.randint(0, PAGES, (num_copies,), device=DEVICE)
    return source_ids, torch.randperm(PAGES + 2, device=DEVICE)[:num_copies].int()


@pytest.mark.parametrize("num_copies", [1, 7, PAGES])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_named_pages_are_copied_and_no_others_are_written(dtype, head_dim, num_copies):
    source, target = make_pools(head_dim, dtype)
    source_ids, target_ids = make_ids(num_copies)
    expected = target.clone()
    page_gather_ref(source, source_ids, expected, target_ids)
    page_gather(source, source_ids, target, target_ids)
    assert torch.equal(target.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("num_programs", [None, 1, 3])
@pytest.mark.parametrize("num_used", [0, 1, 5])
def test_device_side_count_leaves_the_rest_alone(num_used, num_programs):
    source, target = make_pools(64, torch.bfloat16)
    source_ids, target_ids = make_ids(9)
    expected = target.clone()
    page_gather_ref(source, source_ids[:num_used], expected, target_ids[:num_used])
    count = torch.tensor([num_used], dtype=torch.int32, device=DEVICE)
    page_gather(source, source_ids, target, target_ids, count, num_programs)
    assert torch.equal(target.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_pages_move_within_one_pool():
    pool, _ = make_pools(64, torch.float16)
    before = pool.clone()
    ids = torch.arange(20, device=DEVICE)
    page_gather(pool, ids, pool, ids + 30)
    assert torch.equal(pool[30:50], before[:20]) and torch.equal(pool[:30], before[:30])


def test_nothing_to_copy_is_no_launch():
    source, target = make_pools(64, torch.float16)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    page_gather(source, none, target, none)
    assert target.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_pinned_host_pages_are_read_from_the_gpu(head_dim):
    source, target = make_pools(head_dim, torch.bfloat16)
    host = torch.empty_like(source, device="cpu", pin_memory=True)
    host.copy_(source)
    source_ids, target_ids = make_ids(PAGES)
    page_gather(host, source_ids, target, target_ids)
    assert torch.equal(target[target_ids.long()], source[source_ids])
