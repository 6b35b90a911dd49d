"""`page_summaries` and its reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from triton_mode import DEVICE, FP8_ON_DEVICE

from vllm_heterocache.kernels import page_summaries as module
from vllm_heterocache.kernels.page_summaries import page_summaries
from vllm_heterocache.kernels.page_summaries_ref import CHUNK_BLOCKS, page_summaries_ref

DTYPES = [torch.bfloat16, torch.float16, torch.float32, *FP8_ON_DEVICE]
BOTH = pytest.mark.parametrize("summarize", [page_summaries, page_summaries_ref])


def make_pool(num_blocks: int, per_block: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    shape = (num_blocks * per_block, 16, 2 * head_dim)
    return torch.randn(shape, device=DEVICE).to(dtype)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("per_block", "head_dim"), [(1, 64), (6, 128), (5, 16)])
def test_each_channel_has_its_least_and_largest_key(summarize, per_block, head_dim, dtype):
    pool = make_pool(7, per_block, head_dim, dtype)
    pool[:, :, head_dim:] = torch.nan  # values are not looked at
    pool.view(7, per_block, -1)[[0, 4, 6]] = torch.nan  # nor other blocks
    summaries = torch.full((pool.shape[0], 2, head_dim), torch.nan, device=DEVICE).to(dtype)
    blocks = torch.tensor([5, 1, 2, 3], dtype=torch.int32, device=DEVICE)
    summarize(pool, blocks, per_block, summaries)
    for page, keys in enumerate(pool.tolist()):
        if page // per_block not in (5, 1, 2, 3):
            assert summaries[page].isnan().all()
            continue
        columns = list(zip(*keys, strict=True))[:head_dim]
        assert summaries[page, 0].tolist() == [min(column) for column in columns]
        assert summaries[page, 1].tolist() == [max(column) for column in columns]


@BOTH
@pytest.mark.parametrize("num_blocks", [0, 1, CHUNK_BLOCKS + 1])
def test_any_number_of_blocks(summarize, num_blocks):
    pool = make_pool(CHUNK_BLOCKS + 2, 1, 16, torch.float32)
    summaries = torch.full((pool.shape[0], 2, 16), torch.nan, device=DEVICE)
    blocks = torch.randperm(CHUNK_BLOCKS + 2, device=DEVICE).int()
    # a view that begins anywhere
    summarize(pool, blocks[1 : 1 + num_blocks], 1, summaries)
    written = ~summaries.isnan().any(dim=(1, 2))
    assert written.nonzero().flatten().tolist() == sorted(blocks[1 : 1 + num_blocks].tolist())
    ids = blocks[1 : 1 + num_blocks].long()
    assert torch.equal(summaries[ids, 1], pool[ids, :, :16].max(dim=1).values)


def test_blocks_of_two_million_tokens_fit_the_grid(monkeypatch):
    """CUDA takes 65,535 programs along all axes but the first."""
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **more: None

    monkeypatch.setattr(module, "_page_summaries_kernel", Recorder())
    pool, summaries = make_pool(1, 3, 16, torch.float32), torch.zeros(3, 2, 16, device=DEVICE)
    blocks = torch.zeros(131072, dtype=torch.int32, device=DEVICE)
    page_summaries(pool, blocks, 3, summaries)
    assert grids == [(3 * 131072,)]
