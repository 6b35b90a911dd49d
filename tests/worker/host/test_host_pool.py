from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from vllm_heterocache.worker.host.host_pool import HostPool


def make_pool(num_blocks: int, num_satellites: int = 3) -> HostPool:
    return HostPool(num_blocks, num_satellites, page_size=16, head_dim=8, dtype=torch.bfloat16)


def test_a_block_has_a_page_of_k_and_v_for_every_satellite_in_the_dtype_of_the_gpu_pool():
    assert make_pool(5).pages.shape == (5 * 3, 16, 16)
    assert make_pool(5).pages.dtype == torch.bfloat16


@pytest.mark.parametrize("seed", range(4))
def test_random_allocation_and_release_hands_out_every_block_at_most_once(seed):
    rng = random.Random(seed)
    pool = make_pool(37)
    held: list[np.ndarray] = []
    for _ in range(200):
        if held and rng.random() < 0.45:
            pool.release(held.pop(rng.randrange(len(held))))
        else:
            wanted = rng.randint(0, 12)
            free = pool.num_free
            blocks = pool.allocate(wanted)
            if blocks is None:
                assert wanted > free == pool.num_free
            else:
                assert blocks.shape == (wanted,) and blocks.dtype == np.int64
                assert (np.diff(blocks) > 0).all()
                held.append(blocks)
        used = [block for blocks in held for block in blocks.tolist()]
        assert len(used) == len(set(used)) == pool.num_blocks - pool.num_free
        assert set(used) <= set(range(37))
        pool.check_integrity(held)
    for blocks in held:
        pool.release(blocks)
    assert pool.num_free == pool.num_blocks == 37
    pool.check_integrity([])


def test_the_lowest_free_blocks_are_handed_out_so_that_most_follow_one_another():
    pool = make_pool(9)
    first, second = pool.allocate(2), pool.allocate(3)
    assert (first.tolist(), second.tolist()) == ([0, 1], [2, 3, 4])
    pool.release(first)
    assert pool.allocate(4).tolist() == [0, 1, 5, 6]


def test_every_block_can_be_taken_and_then_none_is_left():
    pool = make_pool(5)
    assert pool.allocate(5).tolist() == [0, 1, 2, 3, 4]
    assert pool.allocate(1) is None
    assert pool.allocate(0).shape == (0,)


def test_an_allocation_that_fails_changes_nothing():
    pool = make_pool(5)
    held = pool.allocate(3)
    assert pool.allocate(3) is None
    assert pool.num_free == 2
    pool.check_integrity([held])


def test_block_ids_stay_what_they_were_when_the_pool_goes_on():
    pool = make_pool(6)
    first = pool.allocate(2)
    before = first.tolist()
    second = pool.allocate(2)
    pool.release(second)
    pool.release(pool.allocate(4))
    assert first.tolist() == before


def test_a_pool_without_blocks_serves_requests_without_satellites():
    pool = make_pool(0, num_satellites=0)
    assert pool.pages.shape == (0, 16, 16)
    assert pool.allocate(0).size == 0
    assert pool.allocate(1) is None
    pool.check_integrity([])


def test_blocks_cannot_be_given_back_twice():
    pool = make_pool(4)
    blocks = pool.allocate(2)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)
    assert pool.num_free == 4


def test_check_integrity_detects_lost_double_and_foreign_blocks():
    pool = make_pool(6)
    first, second = pool.allocate(2), pool.allocate(2)
    pool.check_integrity([first, second])
    for books in ([first], [first, first], [first, second, second[:1]], [first, second + 6]):
        with pytest.raises(AssertionError, match="host blocks lost"):
            pool.check_integrity(books)
    pool.release(first)
    with pytest.raises(AssertionError, match="host blocks lost"):
        pool.check_integrity([first, second])
