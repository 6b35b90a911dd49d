"""`exchange_pages` against its reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from exchange_case import PROTECTED, make_exchange_case
from triton_mode import device_generator

from vllm_heterocache.kernels import exchange_pages as module
from vllm_heterocache.kernels.exchange_pages import exchange_pages
from vllm_heterocache.kernels.exchange_pages_ref import exchange_pages_ref
from vllm_heterocache.kernels.values import DriftCounter


@pytest.fixture
def generator() -> torch.Generator:
    return device_generator()


def run(exchange, case, layer: int) -> None:
    exchange(
        case.pages, case.host_pages, case.tables, case.finders, case.rows, layer, PROTECTED,
        case.counters,
    )  # fmt: skip


def assert_same(actual, expected) -> None:
    """Bit by bit, but for the rounding of scores."""
    assert torch.equal(actual.pages.view(torch.uint8), expected.pages.view(torch.uint8))
    for name in ("positions", "is_resident"):
        found, exact = getattr(actual.tables, name), getattr(expected.tables, name)
        assert torch.equal(found, exact), name
    torch.testing.assert_close(
        actual.tables.scores, expected.tables.scores, rtol=1e-5, atol=0, equal_nan=True
    )
    assert torch.equal(actual.counters, expected.counters)


@pytest.mark.parametrize(("group", "block"), [(1, 64), (3, 16384), (4, 128)])
def test_pages_come_and_go_as_the_reference_says(group, block, generator, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_LSES", block)
    monkeypatch.setattr(module, "BLOCK_ENTRIES", 32)
    head_dim, dtype = (64, torch.bfloat16) if group % 2 else (128, torch.float8_e4m3fn)
    case = make_exchange_case(group, head_dim, dtype, generator)
    expected, actual = case.fresh(), case.fresh()
    for layer in range(2):
        run(exchange_pages_ref, expected, layer)
        run(exchange_pages, actual, layer)
        assert_same(actual, expected)
    assert expected.counters[DriftCounter.PAGES_FETCHED] > 8
    # until nothing better is left on the host
    for _ in range(4):
        run(exchange_pages_ref, expected, 1)
        run(exchange_pages, actual, 1)
    assert_same(actual, expected)


@pytest.mark.gpu
def test_a_captured_graph_exchanges_by_what_its_tensors_hold_then(generator):
    case = make_exchange_case(4, 128, torch.bfloat16, generator)
    case.rows.is_due.zero_()
    run(exchange_pages, case, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(exchange_pages, case, 1)
    case.rows.is_due.fill_(1)
    expected = case.fresh()
    graph.replay()
    run(exchange_pages_ref, expected, 1)
    assert_same(case, expected)
    assert expected.counters[DriftCounter.PAGES_FETCHED] > 0
