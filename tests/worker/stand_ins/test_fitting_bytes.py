"""The memory that a fit of matched tokens takes on a GPU, and what is left free for it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from allocated_bytes import AllocatedBytes
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_heterocache.heads.matched_tokens import REFERENCE_POSITIONS, most_pages
from vllm_heterocache.kernels import bounded_least_squares, evicted_attention
from vllm_heterocache.kernels.matched_tokens import MatchKernels
from vllm_heterocache.worker.ops.interface import Geometry
from vllm_heterocache.worker.requests import References
from vllm_heterocache.worker.stand_ins import matched_tokens
from vllm_heterocache.worker.stand_ins.matched_tokens import MatchedTokensFiller, fitting_bytes

CUDA = torch.device("cuda", 0)
LISTED = 1000  # pages of all heads; only the tables' part of the work depends on them


class NoLaunch:
    """In a Triton kernel's place: what is launched takes no memory."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture
def shapes_alone(monkeypatch):
    """Tensors of CUDA without a GPU, and without elements."""
    monkeypatch.setattr(evicted_attention, "_attention_kernel", NoLaunch())
    monkeypatch.setattr(evicted_attention, "_importance_kernel", NoLaunch())
    monkeypatch.setattr(bounded_least_squares, "_bounded_least_squares_kernel", NoLaunch())

    def upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
        return torch.empty(values.shape, dtype=torch.from_numpy(values).dtype, device=device)

    monkeypatch.setattr(matched_tokens, "upload", upload)
    with FakeTensorMode():
        yield


def filler(g: Geometry, pages: np.ndarray, num_pages: int) -> MatchedTokensFiller:
    """Of a prompt in table slot 0, over a pool and tables that are small beside the fit."""

    def table(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=CUDA)

    of_heads = ("count", "start", "bias_start", "stand_in_pages")
    tensors = SimpleNamespace(
        positions=table(LISTED),
        entries=table(LISTED),
        token_bias=torch.empty(LISTED, 16, device=CUDA),
        **{name: table(1, *pages.shape) for name in of_heads},
    )
    extent = SimpleNamespace(
        stand_in_pages=pages, budgets=2 * pages, num_pages=num_pages, num_listed=LISTED
    )
    pool = torch.empty(1, 16, 2 * g.head_dim, dtype=g.dtype, device=CUDA)
    memory = SimpleNamespace(pool=pool, tables=tensors, kv_scales=None, sink_logits=None)
    kernels = MatchKernels(
        evicted_attention.evicted_attention, bounded_least_squares.bounded_least_squares
    )
    books = SimpleNamespace(tensors=tensors, base=lambda slot: 0, extents=[extent])
    return MatchedTokensFiller(g, memory, books, np.ones(g.num_layers, bool), None, kernels)


@pytest.mark.usefixtures("shapes_alone")
@pytest.mark.parametrize(
    ("gpu_budget", "num_tokens", "matched"),
    [
        pytest.param(0.1, 131072, 8, id="bound"),
        pytest.param(0.2, 131072, 256, id="long"),
        pytest.param(0.2, 32768, 204, id="no-bound"),
    ],
)
def test_the_fit_of_a_prompt_takes_no_more_than_is_left_free_for_it(
    gpu_budget, num_tokens, matched
):
    """Of Llama-3.1-8B, whose heads give half of their pages to matched tokens, or the most."""
    assert matched == min(most_pages(4, gpu_budget), int(gpu_budget * num_tokens / 16 / 2))
    g = Geometry(32, 32, 8, 128, 1.0, torch.bfloat16, 8, 1, 8)
    num_pages = num_tokens // 16
    fit = filler(g, np.full((32, 8), matched, np.int32), num_pages)
    blocks = torch.empty(num_pages, dtype=torch.int32, device=CUDA)
    one = torch.empty(1, *g.query_shape, dtype=g.dtype, device=CUDA)
    queries = one.expand(REFERENCE_POSITIONS, *g.query_shape)  # theirs is memory of its own
    with AllocatedBytes(CUDA) as allocated:
        fit.fill(0, blocks, References(queries, behind=REFERENCE_POSITIONS))
    reserved = fitting_bytes(g, gpu_budget, num_tokens)
    assert reserved / 2 < allocated.peak < reserved, allocated.peak
