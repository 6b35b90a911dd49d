from __future__ import annotations

import random

import pytest
import torch

from vllm_heterocache.cpu_pool import CpuPool


def make_pool(num_pages: int) -> CpuPool:
    return CpuPool(num_pages, page_size=16, head_dim=8, dtype=torch.bfloat16)


def test_pages_hold_k_and_v_of_a_page_in_the_dtype_of_the_gpu_pool():
    assert make_pool(3).pages.shape == (3, 16, 16)
    assert make_pool(3).pages.dtype == torch.bfloat16


@pytest.mark.parametrize("seed", range(4))
def test_random_allocation_and_release_hands_out_every_page_at_most_once(seed):
    rng = random.Random(seed)
    pool = make_pool(37)
    held: list[torch.Tensor] = []
    for _ in range(200):
        if held and rng.random() < 0.45:
            pool.release(held.pop(rng.randrange(len(held))))
        else:
            wanted = rng.randint(0, 12)
            free = pool.num_free
            pages = pool.allocate(wanted)
            if pages is None:
                assert wanted > free == pool.num_free
            else:
                assert pages.shape == (wanted,) and pages.dtype == torch.int64
                # as the runtime keeps them: [num_satellites, P]
                held.append(pages.view(2, -1) if wanted % 2 == 0 else pages)
        used = [page for pages in held for page in pages.flatten().tolist()]
        assert len(used) == len(set(used)) == pool.num_used
        assert set(used) <= set(range(37))
        assert pool.num_used + pool.num_free == pool.num_pages == 37
        pool.check_integrity(held)
    for pages in held:
        pool.release(pages)
    assert pool.num_free == 37
    pool.check_integrity([])


def test_every_page_can_be_taken_and_then_none_is_left():
    pool = make_pool(5)
    assert sorted(pool.allocate(5).tolist()) == [0, 1, 2, 3, 4]
    assert pool.allocate(1) is None
    assert pool.allocate(0).shape == (0,)


def test_an_allocation_that_fails_changes_nothing():
    pool = make_pool(5)
    held = pool.allocate(3)
    assert pool.allocate(3) is None
    assert pool.num_free == 2
    pool.check_integrity([held])


def test_page_ids_stay_what_they_were_when_the_pool_goes_on():
    pool = make_pool(6)
    first = pool.allocate(2)
    before = first.tolist()
    second = pool.allocate(2)
    pool.release(second)
    pool.release(pool.allocate(4))
    assert first.tolist() == before


def test_a_pool_without_pages_serves_requests_without_satellites():
    pool = make_pool(0)
    assert pool.allocate(0).numel() == 0
    assert pool.allocate(1) is None
    pool.check_integrity([])


def test_more_pages_than_there_are_cannot_be_given_back():
    pool = make_pool(4)
    pages = pool.allocate(2)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages)


def test_check_integrity_detects_lost_double_and_foreign_pages():
    pool = make_pool(6)
    first, second = pool.allocate(2), pool.allocate(2)
    pool.check_integrity([first, second])
    for books in ([first], [first, first], [first, second, second[:1]], [first, second + 6]):
        with pytest.raises(AssertionError, match="lost or used twice"):
            pool.check_integrity(books)
    pool.release(first)
    with pytest.raises(AssertionError, match="lost or used twice"):
        pool.check_integrity([first, second])
