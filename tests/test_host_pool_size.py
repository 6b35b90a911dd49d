from __future__ import annotations

import numpy as np
import pytest

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.head_profile import HeadAssignment, HeadRole
from vllm_heterocache.host_pool_size import MAX_HOST_SHARE, host_pool_pages, num_satellites
from vllm_heterocache.roles import all_full

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
    assert host_pool_pages(config, three_satellites, 1000, PAGE_BYTES, 1 << 40) == 1000


def test_automatic_size_leaves_most_of_the_free_memory(three_satellites):
    available = 1001 * PAGE_BYTES
    pages = host_pool_pages(HeteroCacheConfig(), three_satellites, 10**6, PAGE_BYTES, available)
    assert pages == 250 == int(1001 * MAX_HOST_SHARE)


@pytest.mark.parametrize("gib, pages", [(1.0, 131072), (0.5, 65536), (1e-5, 1), (1e-6, 0)])
def test_a_size_in_gib_is_taken_literally(gib, pages, three_satellites):
    config = HeteroCacheConfig(cpu_pool_gib=gib)
    assert host_pool_pages(config, three_satellites, 7, PAGE_BYTES, 0) == pages


def test_without_satellites_there_is_no_host_pool():
    for config in (HeteroCacheConfig(), HeteroCacheConfig(cpu_pool_gib=4)):
        assert host_pool_pages(config, all_full(2, 2), 1000, PAGE_BYTES, 1 << 40) == 0
