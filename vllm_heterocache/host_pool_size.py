"""How large a worker's host pool is."""

from __future__ import annotations

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.head_profile import HeadAssignment, HeadRole

# Automatic sizing takes at most this share of the memory that is free on the host at start-up.
MAX_HOST_SHARE = 0.25


def num_satellites(assignment: HeadAssignment) -> int:
    return assignment.count(HeadRole.SATELLITE)


def host_pool_pages(
    config: HeteroCacheConfig,
    assignment: HeadAssignment,
    wanted_pages: int,
    page_bytes: int,
    available_bytes: int,
) -> int:
    """Pages of one worker's host pool.

    Args:
        assignment: the roles of this worker's heads.
        wanted_pages: what automatic sizing aims at, within MAX_HOST_SHARE of the free memory.
        page_bytes: bytes of a page.
        available_bytes: memory free on the host.
    """
    if not num_satellites(assignment):
        return 0
    if config.cpu_pool_gib is not None:
        return int(config.cpu_pool_gib * 2**30) // page_bytes
    return min(wanted_pages, int(available_bytes * MAX_HOST_SHARE) // page_bytes)
