"""Host pools that are too small, or larger than the memory of the host."""

from __future__ import annotations

from vllm_heterocache.refusal import Refusal, refuse

GIB = 1 << 30


def check_host_pool(pool_bytes: int, needed_bytes: int, max_model_len: int) -> None:
    """Raise Refusal when one worker's host pool cannot hold the pages of one longest request.

    `pool_bytes` is the pool's size, as asked for or as sized automatically; `needed_bytes` is what
    the satellites or finders of one request of `max_model_len` tokens offload.
    """
    if pool_bytes >= needed_bytes:
        return
    raise Refusal(
        f"heterocache option cpu_pool_gib gives a host pool of {pool_bytes / GIB:.2f} GiB per "
        f"worker, which is too small: one request of max_model_len={max_model_len} offloads "
        f"{needed_bytes / GIB:.2f} GiB",
        f"set cpu_pool_gib to at least {_round_up_gib(needed_bytes):.2f} or lower --max-model-len",
    )


def check_host_memory(pool_gib: float | None, free_bytes: int) -> None:
    """Raise Refusal for a host pool that this host has no memory for.

    Args:
        pool_gib: the option `cpu_pool_gib`; automatic sizing (None) stays within what is free.
        free_bytes: memory free on the host for each worker.
    """
    if pool_gib is None or pool_gib * GIB <= free_bytes:
        return
    refuse(
        "cpu_pool_gib",
        pool_gib,
        f"the host has {free_bytes / GIB:.2f} GiB of memory free for each worker",
        "choose less, or remove it for automatic sizing",
    )


def _round_up_gib(num_bytes: int) -> float:
    """Hundredths of a GiB, rounded up, so that the printed number is enough."""
    return -(-num_bytes * 100 // GIB) / 100
