"""CudaSwap against SynchronousSwap on the same pages; most of it needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton_mode  # noqa: F401  before anything that defines kernels
from world import CPU, mixed_assignment

from vllm_heterocache.heads.recipes import all_full
from vllm_heterocache.kernels.tables import HeadMaps, Moves
from vllm_heterocache.worker.host import cuda_swap
from vllm_heterocache.worker.host.cuda_swap import CudaSwap
from vllm_heterocache.worker.host.host_pool import HostPool
from vllm_heterocache.worker.host.swap import SynchronousSwap
from vllm_heterocache.worker.tables.head_maps import head_maps

NUM_BLOCKS, HEADS, SATELLITES, HEAD_DIM = 23, 9, 5, 8
PAGE_BYTES = 16 * 2 * HEAD_DIM * 2


def make_maps(device: torch.device) -> HeadMaps:
    return head_maps(mixed_assignment(), device)


def test_the_staging_buffer_holds_whole_blocks(monkeypatch):
    maps, pool = make_maps(CPU), torch.zeros(9, 16, 2 * HEAD_DIM, dtype=torch.bfloat16)
    for size, blocks in ((PAGE_BYTES * SATELLITES * 4 - 1, 3), (PAGE_BYTES, 1)):
        monkeypatch.setattr(cuda_swap, "STAGING_BYTES", size)
        assert CudaSwap.staged_blocks(pool, maps) == blocks


def test_no_satellites_need_no_staging():
    maps = head_maps(all_full(3, 3), CPU)
    assert CudaSwap.staged_blocks(torch.zeros(9, 16, 2 * HEAD_DIM), maps) >= 0


def random_pages(*shape: int, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 16, 2 * HEAD_DIM, generator=generator).bfloat16()


@pytest.fixture
def host() -> Iterator[HostPool]:
    pool = HostPool(19, SATELLITES, 16, HEAD_DIM, torch.bfloat16)
    yield pool
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(pool.pages.data_ptr())


@pytest.fixture
def two_swaps(monkeypatch, host) -> tuple[CudaSwap, SynchronousSwap, torch.Tensor]:
    """One on the GPU, with staging for three blocks, and one on the CPU with the same pages."""
    monkeypatch.setattr(cuda_swap, "STAGING_BYTES", 3 * SATELLITES * PAGE_BYTES)
    pages = random_pages(NUM_BLOCKS * HEADS)
    twin = HostPool(19, SATELLITES, 16, HEAD_DIM, torch.bfloat16)
    twin.pages.zero_()
    gpu_pool = pages.cuda()
    swap = CudaSwap(gpu_pool, host, make_maps(gpu_pool.device))
    host.pages.zero_()
    return swap, SynchronousSwap(pages, twin, make_maps(CPU)), gpu_pool


def fetch(swap: CudaSwap, moves: Moves, after: int = 0) -> torch.cuda.Event:
    with swap.beside():
        return swap.fetch(moves, after)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "host_blocks", [[0, 1, 2, 3, 4, 5, 6], [3, 4, 9, 10, 11, 0, 18], [17], [8, 6, 4, 2, 0]], ids=str
)
def test_offload_fills_the_host_blocks_in_runs_and_in_batches(two_swaps, host, host_blocks):
    swap, slow, _ = two_swaps
    dense = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).int()
    dense = dense[: len(host_blocks)]
    slow.offload(dense, np.array(host_blocks))
    swap.offload(dense.cuda(), np.array(host_blocks))
    mark = swap.mark()
    torch.cuda.synchronize()
    assert swap.take_completed() == [mark] and swap.take_completed() == []
    assert torch.equal(host.pages, slow._host.pages)


@pytest.mark.gpu
def test_an_offload_reads_what_the_compute_stream_wrote_before_it(two_swaps, host):
    swap, _, gpu_pool = two_swaps
    torch.cuda._sleep(50_000_000)
    gpu_pool.fill_(7.0)
    swap.offload(torch.arange(4, dtype=torch.int32, device="cuda"), np.arange(4))
    first = swap.mark()
    swap.offload(torch.arange(4, 8, dtype=torch.int32, device="cuda"), np.arange(2, 6))
    second = swap.mark()
    torch.cuda.synchronize()
    assert swap.take_completed() == [first, second]
    assert bool((host.pages[: 6 * SATELLITES] == 7).all())
    assert not host.pages[6 * SATELLITES :].any()


@pytest.mark.gpu
@pytest.mark.parametrize("totals", [(0, 40), (1, 0), (40, 64)], ids=str)
def test_fetch_makes_the_moves_in_use_and_settle_orders_the_compute_stream_after_it(
    two_swaps, host, totals
):
    swap, slow, gpu_pool = two_swaps
    moves, slow_moves = Moves.allocate(64, gpu_pool.device), Moves.allocate(64, CPU)
    generator = torch.Generator().manual_seed(2)
    for seed, total in enumerate(totals):  # the same tensors again, with other moves
        host.pages.copy_(random_pages(19 * SATELLITES, seed=seed))
        slow._host.pages.copy_(host.pages)
        for name, high in (("host_page", 19 * SATELLITES), ("gpu_page", NUM_BLOCKS * HEADS)):
            ids = torch.randperm(high, generator=generator)[:64].int()
            getattr(slow_moves, name).copy_(ids)
            getattr(moves, name).copy_(ids)
        slow_moves.total.fill_(total)
        moves.total.fill_(total)
        slow.fetch(slow_moves, 0)
        swap.settle(fetch(swap, moves))
        after = gpu_pool.clone()  # on the compute stream
        torch.cuda.synchronize()
        assert torch.equal(after.cpu(), slow._pool)


@pytest.mark.gpu
def test_what_runs_beside_comes_before_the_fetch_and_holds_nobody_up(two_swaps, host):
    swap, _, gpu_pool = two_swaps
    host.pages.fill_(7.0)
    gpu_pool.zero_()
    moves = Moves.allocate(4, gpu_pool.device)
    ids = torch.zeros(4, dtype=torch.int32, device="cuda")
    torch.cuda._sleep(50_000_000)
    ids.copy_(torch.arange(4))  # on the compute stream, before
    with swap.beside():
        torch.cuda._sleep(400_000_000)
        moves.host_page.copy_(ids)
        moves.gpu_page.copy_(ids)
        moves.total.fill_(4)
        handle = swap.fetch(moves, 0)
    passed = torch.cuda.Event()
    passed.record()
    passed.synchronize()
    assert not handle.query(), "the compute stream waited for what ran beside it"
    swap.settle(handle)
    after = gpu_pool.float().sum(dim=(1, 2)).cpu()
    assert bool((after[:4] != 0).all()) and not after[4:].any()


@pytest.mark.gpu
def test_a_fetch_reads_what_the_offloads_before_it_brought_and_lateness_is_counted(two_swaps, host):
    swap, _, gpu_pool = two_swaps
    gpu_pool.fill_(7.0)
    moves = Moves.allocate(SATELLITES, gpu_pool.device)
    moves.host_page.copy_(torch.arange(SATELLITES))  # all of host block 0
    moves.gpu_page.copy_(torch.arange(HEADS, HEADS + SATELLITES))
    moves.total.fill_(SATELLITES)
    with torch.cuda.stream(swap._offload_stream):
        torch.cuda._sleep(200_000_000)
    swap.offload(torch.tensor([5], dtype=torch.int32, device="cuda"), np.array([0]))
    mark = swap.mark()
    gpu_pool[HEADS : HEADS + SATELLITES] = 0.0
    late = fetch(swap, moves, mark)
    assert swap.take_late() == 0, "nobody waits yet"
    swap.settle(late)
    after = gpu_pool[HEADS : HEADS + SATELLITES].clone()
    torch.cuda.synchronize()
    assert bool((after == 7).all())
    assert swap.take_late() == 1
    early = fetch(swap, moves, mark)
    torch.cuda.synchronize()
    swap.settle(early)
    torch.cuda.synchronize()
    assert swap.take_late() == 0


@pytest.mark.gpu
def test_settling_all_orders_the_compute_stream_after_what_runs_beside_it(two_swaps):
    swap, _, _ = two_swaps
    numbers = torch.zeros(4, device="cuda")
    with swap.beside():
        torch.cuda._sleep(200_000_000)
        numbers.fill_(7.0)
    swap.settle_all()
    after = numbers.clone()  # on the compute stream
    torch.cuda.synchronize()
    assert bool((after == 7).all())
    assert swap.take_late() == 0


@pytest.mark.gpu
def test_a_fetch_outside_of_beside_is_refused(two_swaps):
    swap, _, gpu_pool = two_swaps
    with pytest.raises(AssertionError, match="beside"):
        swap.fetch(Moves.allocate(4, gpu_pool.device), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("num_satellites", [0, SATELLITES], ids=["no satellites", "threshold 0"])
def test_an_empty_host_pool_can_be_bound(num_satellites):
    assignment = mixed_assignment() if num_satellites else all_full(3, 3)
    pool = random_pages(NUM_BLOCKS * HEADS).cuda()
    empty = HostPool(0, num_satellites, 16, HEAD_DIM, torch.bfloat16)
    swap = CudaSwap(pool, empty, head_maps(assignment, pool.device))
    assert swap.take_completed() == []
