"""`one_bit_step_select` against its reference, in Triton's interpreter and on a GPU. Its second
launch is that of `step_select`, which has more tests."""

from __future__ import annotations

import pytest
import torch
from step_case import SMALL_ROWS, StepCase, StepRow, make_step_case, with_bits
from triton_mode import FP8_ON_DEVICE, ON_GPU

from vllm_heterocache.kernels import one_bit_step_select as module
from vllm_heterocache.kernels import step_select
from vllm_heterocache.kernels.one_bit_step_select import one_bit_step_select
from vllm_heterocache.kernels.one_bit_step_select_ref import one_bit_step_select_ref
from vllm_heterocache.kernels.values import Protected

PROTECTED = Protected(1, 3)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Each costs time in the interpreter; a part has several tiles."""
    if not ON_GPU:
        monkeypatch.setattr(step_select, "MAX_PROGRAMS", 16)
        monkeypatch.setattr(module, "TILE_PAGES", 32)


def make_case(*arguments, **settings) -> StepCase:
    return with_bits(make_step_case(*arguments, **settings))


def check(case: StepCase, protected: Protected = PROTECTED) -> None:
    """Entries and positions are the reference's bit by bit, poison included."""
    expected, actual = case.fresh(), case.fresh()
    one_bit_step_select_ref(case.query, expected, case.step, case.rows, case.layer, protected)
    one_bit_step_select(case.query, actual, case.step, case.rows, case.layer, protected)
    assert torch.equal(actual.positions, expected.positions)
    assert torch.equal(actual.entries, expected.entries)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8])
def test_lists_are_those_of_the_reference(group, generator):
    head_dim, dtype = (64, torch.bfloat16) if group % 2 else (128, torch.float16)
    check(make_case(2, 2, group, head_dim, dtype, generator, layer=1))


def test_fp32_and_protected_pages(generator):
    case = make_case(3, 3, 3, 64, torch.float32, generator, layer=2)
    for protected in ((0, 0), (7, 9), (300, 300)):
        check(case, Protected(*protected))


@pytest.mark.parametrize("page_dtype", FP8_ON_DEVICE, ids=str)
def test_fp8_pages(page_dtype, generator):
    check(make_case(2, 3, 4, 64, torch.bfloat16, generator, layer=1, page_dtype=page_dtype))


def test_long_prompts(generator):
    rows = [StepRow(8192, (820, 8192, 100)), StepRow(5003, (5002,))] if ON_GPU else []
    check(make_case(1, 2, 4, 64, torch.bfloat16, generator, [*rows, StepRow(300, (40, 299))]))


def test_pages_that_no_list_may_look_at_stay_unread(generator):
    """Of rows without tokens the summaries are NaN, and so are all other pages'."""
    case = make_case(2, 2, 2, 64, torch.bfloat16, generator, shapes=SMALL_ROWS[2:4])
    tables = case.fresh()
    one_bit_step_select(case.query, tables, case.step, case.rows, case.layer, Protected(0, 0))
    assert int((tables.positions >= 0).sum()) == int(tables.count[0, 0].sum())


@pytest.mark.gpu
def test_a_captured_graph_chooses_by_what_its_tensors_hold_then(generator):
    first = make_case(1, 2, 4, 128, torch.bfloat16, generator)
    other = make_case(1, 2, 4, 128, torch.bfloat16, generator)
    tables = first.fresh()
    inputs = first.query, tables, first.step, first.rows, 0, PROTECTED
    one_bit_step_select(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_bit_step_select(*inputs)
    for held, new in zip(
        (first.query, first.step.summaries, first.step.bits, first.rows.block_table),
        (other.query, other.step.summaries, other.step.bits, other.rows.block_table),
        strict=True,
    ):
        held.copy_(new)
    graph.replay()
    expected = other.fresh()
    one_bit_step_select_ref(other.query, expected, other.step, other.rows, 0, PROTECTED)
    written = expected.positions >= 0
    assert torch.equal(tables.positions[written], expected.positions[written])
    assert torch.equal(tables.entries[written], expected.entries[written])
