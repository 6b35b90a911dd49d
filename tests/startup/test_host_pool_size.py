from __future__ import annotations

import numpy as np
import pytest

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole
from vllm_heterocache.heads.recipes import all_full
from vllm_heterocache.startup.host_pool_size import MAX_HOST_SHARE, host_pool_blocks, num_satellites

PAGE_BYTES = 8192


@pytest.fixture
def three_satellites() -> HeadAssignment:
    roles = np.array([[HeadRole.PIVOT, HeadRole.SATELLITE], [HeadRole.SATELLITE] * 2], np.int8)
    leaders = np.array([[-1, 0], [0, 0]], np.int32)
    return HeadAssignment(roles, leaders, np.array([[0, 1], [1, 1]], np.float32))


def test_satellites_are_counted(three_satellites):
    assert num_satellites(three_satellites) == 3
    assert num_satellites(all_full(4, 3)) == 0


def test_automatic_size_is_what_is_wanted_where_memory_allows(three_satellites):
    config = HeteroCacheConfig()
    assert host_pool_blocks(config, three_satellites, 1000, PAGE_BYTES, 1 << 40) == 1000


def test_automatic_size_leaves_most_of_the_free_memory(three_satellites):
    available = 3 * 1001 * PAGE_BYTES
    blocks = host_pool_blocks(HeteroCacheConfig(), three_satellites, 10**6, PAGE_BYTES, available)
    assert blocks == 250 == int(1001 * MAX_HOST_SHARE)


# a block of three satellites takes 24 KiB
@pytest.mark.parametrize("gib, blocks", [(1.0, 43690), (0.75, 32768), (3e-5, 1), (2e-5, 0)])
def test_a_size_in_gib_is_taken_literally(gib, blocks, three_satellites):
    config = HeteroCacheConfig(cpu_pool_gib=gib)
    assert host_pool_blocks(config, three_satellites, 7, PAGE_BYTES, 0) == blocks


@pytest.mark.parametrize("gib", [None, 4])
def test_without_satellites_or_without_refreshes_there_is_no_host_pool(gib, three_satellites):
    config = HeteroCacheConfig(cpu_pool_gib=gib)
    assert host_pool_blocks(config, all_full(2, 2), 1000, PAGE_BYTES, 1 << 40) == 0
    never = HeteroCacheConfig(cpu_pool_gib=gib, drift_threshold=0)
    assert host_pool_blocks(never, three_satellites, 1000, PAGE_BYTES, 1 << 40) == 0
