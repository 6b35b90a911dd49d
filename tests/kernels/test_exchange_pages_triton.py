"""`exchange_pages` against its reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from exchange_case import (
    PROTECTED,
    WORKED,
    make_exchange_case,
    make_worked_case,
    worked_lists,
)
from searched import searched
from triton_mode import ON_GPU

from vllm_heterocache.kernels import exchange_pages as module
from vllm_heterocache.kernels import find_pages
from vllm_heterocache.kernels.exchange_pages import exchange_pages
from vllm_heterocache.kernels.exchange_pages_ref import exchange_pages_ref
from vllm_heterocache.kernels.values import DriftCounter, Protected


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Of a search: several for most prompts, some of them with several tiles, some with none."""
    if not ON_GPU:
        monkeypatch.setattr(find_pages, "MAX_PROGRAMS", 60)


def run(exchange, case, layer: int, protected: Protected = PROTECTED) -> None:
    found = {}
    if exchange is exchange_pages:
        found["program_lse"] = searched(case.tables, case.finders, case.rows, layer)
    exchange(
        case.pages, case.host_pages, case.tables, case.finders, case.rows, layer, protected,
        case.counters, **found,
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


@pytest.mark.parametrize(("group", "block"), [(1, 16), (3, 4096), (4, 64)])
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


def test_exchanges_worked_by_hand(generator):
    case = make_worked_case(generator)
    expected = case.fresh()
    run(exchange_pages, case, 0, Protected(1, 1))
    assert worked_lists(case) == [one.after for one in WORKED]
    run(exchange_pages_ref, expected, 0, Protected(1, 1))
    assert_same(case, expected)


@pytest.mark.gpu
def test_a_captured_graph_exchanges_by_what_its_tensors_hold_then(generator):
    case = make_exchange_case(4, 128, torch.bfloat16, generator)
    case.rows.is_due.fill_(1)
    program_lse = searched(case.tables, case.finders, case.rows, 1)
    case.rows.is_due.zero_()
    inputs = (
        case.pages, case.host_pages, case.tables, case.finders, case.rows, 1, PROTECTED,
        case.counters,
    )  # fmt: skip
    exchange_pages(*inputs, program_lse=program_lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        exchange_pages(*inputs, program_lse=program_lse)
    case.rows.is_due.fill_(1)
    expected = case.fresh()
    graph.replay()
    run(exchange_pages_ref, expected, 1)
    assert_same(case, expected)
    assert expected.counters[DriftCounter.PAGES_FETCHED] > 0
