"""How large a worker's host pool is."""

from __future__ import annotations

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole

# Automatic sizing takes at most this share of the memory that is free on the host at start-up.
MAX_HOST_SHARE = 0.25


def num_satellites(assignment: HeadAssignment) -> int:
    return assignment.count(HeadRole.SATELLITE)


def host_pool_blocks(
    config: HeteroCacheConfig,
    assignment: HeadAssignment,
    wanted_blocks: int,
    page_bytes: int,
    available_bytes: int,
) -> int:
    """Blocks of one worker's host pool, each a page of every satellite; 0 where nothing is ever
    fetched back.

    Args:
        assignment: the roles of this worker's heads.
        wanted_blocks: what automatic sizing aims at, within MAX_HOST_SHARE of the free memory.
        page_bytes: bytes of a page.
        available_bytes: memory free on the host for this worker.
    """
    if not num_satellites(assignment) or not config.watches_drift:
        return 0
    block_bytes = num_satellites(assignment) * page_bytes
    if config.cpu_pool_gib is not None:
        return int(config.cpu_pool_gib * 2**30) // block_bytes
    return min(wanted_blocks, int(available_bytes * MAX_HOST_SHARE) // block_bytes)
