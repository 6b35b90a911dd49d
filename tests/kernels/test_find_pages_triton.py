"""`find_pages` against its reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from finder_case import make_finder_case, quantize
from searched import searched
from triton_mode import FP8_ON_DEVICE, ON_GPU

from vllm_heterocache.kernels import find_pages as module
from vllm_heterocache.kernels.find_pages import find_pages
from vllm_heterocache.kernels.find_pages_ref import find_pages_ref
from vllm_heterocache.kernels.quantized_keys_ref import quantized_keys_ref


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Each costs time in the interpreter; a part has several tiles."""
    if not ON_GPU:
        monkeypatch.setattr(module, "MAX_PROGRAMS", 30)
        monkeypatch.setattr(module, "TILE_PAGES", 32)


def search(case, layer: int, soft_cap: float = 0.0) -> torch.Tensor:
    """By the kernel; its `program_lse`, which was NaN."""
    program_lse = torch.full_like(searched(case.tables, case.finders, case.rows, layer), torch.nan)
    find_pages(
        case.query, case.tables, case.finders, case.rows, layer, 0.2, case.kv_scales, soft_cap,
        program_lse=program_lse,
    )  # fmt: skip
    return program_lse


def check(case, soft_cap: float = 0.0) -> None:
    """The reference's log-sum-exps but for the rounding of keys, and the programs' of these; what
    nobody may write is as before."""
    quantize(quantized_keys_ref, case)
    expected, actual = case.fresh(), case.fresh()
    is_rounded = case.query.dtype != torch.float32
    for layer in range(2):
        program_lse = search(actual, layer, soft_cap)
        one = expected
        find_pages_ref(
            one.query, one.tables, one.finders, one.rows, layer, 0.2, one.kv_scales, soft_cap
        )
        by_pages = searched(actual.tables, actual.finders, actual.rows, layer)
        assert by_pages.isneginf().any()
        torch.testing.assert_close(program_lse, by_pages, rtol=1e-5, atol=1e-5, equal_nan=True)
        lse, exact = actual.tables.page_lse, expected.tables.page_lse
        assert torch.equal(lse.isnan(), exact.isnan()) and not exact.isnan().all()
        atol = 0.05 if is_rounded else 1e-4
        torch.testing.assert_close(lse, exact, rtol=1e-4, atol=atol, equal_nan=True)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_scores_are_those_of_the_reference(group, generator):
    head_dim, dtype = (64, torch.bfloat16) if group % 2 else (128, torch.float16)
    check(make_finder_case(group, head_dim, dtype, generator))


def test_fp32_and_a_soft_cap(generator):
    check(make_finder_case(2, 64, torch.float32, generator), soft_cap=1.5)
    check(make_finder_case(2, 64, torch.float32, generator))


@pytest.mark.parametrize("page_dtype", FP8_ON_DEVICE, ids=str)
def test_fp8_pages(page_dtype, generator):
    check(make_finder_case(4, 64, torch.bfloat16, generator, page_dtype))


@pytest.mark.gpu
def test_a_captured_graph_searches_with_what_its_tensors_hold_then(generator):
    case = make_finder_case(4, 128, torch.bfloat16, generator)
    quantize(quantized_keys_ref, case)
    inputs = case.query, case.tables, case.finders, case.rows, 1, 0.2
    program_lse = search(case, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        find_pages(*inputs, program_lse=program_lse)
    case.query.copy_(torch.randn_like(case.query))
    expected = case.fresh()
    graph.replay()
    find_pages_ref(*inputs[:1], expected.tables, *inputs[2:])
    torch.testing.assert_close(
        case.tables.page_lse, expected.tables.page_lse, rtol=1e-4, atol=0.05, equal_nan=True
    )
    by_pages = searched(case.tables, case.finders, case.rows, 1)
    torch.testing.assert_close(program_lse, by_pages, rtol=1e-5, atol=1e-5, equal_nan=True)
