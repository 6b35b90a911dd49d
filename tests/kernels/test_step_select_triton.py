"""`step_select` against its reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from step_case import SMALL_ROWS, StepCase, StepRow, make_step_case
from triton_mode import DEVICE, FP8_ON_DEVICE, ON_GPU

from vllm_heterocache.kernels import step_select as module
from vllm_heterocache.kernels.step_select import step_select
from vllm_heterocache.kernels.step_select_ref import step_select_ref
from vllm_heterocache.kernels.values import Protected

PROTECTED = Protected(1, 3)
HALVES = [torch.bfloat16, torch.float16]
LARGE_ROWS = [StepRow(8192, (820, 8192, 100)), StepRow(5003, (5002,)), StepRow(0, (0,))]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Each costs time in the interpreter."""
    if not ON_GPU:
        monkeypatch.setattr(module, "MAX_PROGRAMS", 32)


def check(case: StepCase, protected: Protected = PROTECTED) -> None:
    """Entries and positions are the reference's bit by bit, poison included."""
    expected, actual = case.fresh(), case.fresh()
    step_select_ref(case.query, expected, case.step, case.rows, case.layer, protected)
    step_select(case.query, actual, case.step, case.rows, case.layer, protected)
    assert torch.equal(actual.positions, expected.positions)
    assert torch.equal(actual.entries, expected.entries)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8])
def test_lists_are_those_of_the_reference(group, generator):
    head_dim, dtype = (64, torch.bfloat16) if group % 2 else (128, torch.float16)
    check(make_step_case(2, 2, group, head_dim, dtype, generator, layer=1))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_heads_and_dtypes(num_kv_heads, dtype, generator):
    check(make_step_case(3, num_kv_heads, 3, 64, dtype, generator, layer=2))


@pytest.mark.parametrize("page_dtype", FP8_ON_DEVICE, ids=str)
def test_summaries_of_fp8_pages(page_dtype, generator):
    check(make_step_case(2, 3, 4, 64, torch.bfloat16, generator, layer=1, page_dtype=page_dtype))


@pytest.mark.parametrize("protected", [(0, 0), (0, 5), (4, 0), (7, 9), (300, 300)], ids=str)
def test_protected_pages_come_first(protected, generator):
    check(make_step_case(1, 2, 2, 64, torch.bfloat16, generator), Protected(*protected))


def test_more_keys_than_a_program_looks_at_together(monkeypatch, generator):
    if not ON_GPU:
        monkeypatch.setattr(module, "BLOCK_KEYS", 64)
        monkeypatch.setattr(module, "MAX_PROGRAMS", 5)  # a part has several tiles
    rows = LARGE_ROWS if ON_GPU else [StepRow(300, (40, 299)), StepRow(129, (128, 1))]
    check(make_step_case(1, 2, 4, 64, torch.bfloat16, generator, rows))


def test_two_million_tokens(monkeypatch, generator):
    if not ON_GPU:
        monkeypatch.setattr(module, "BLOCK_KEYS", 16384)
        monkeypatch.setattr(module, "TILE_PAGES", 4096)
    rows = [StepRow(131071, (65537, 131070)), StepRow(9, (4,))]
    check(make_step_case(1, 2, 2, 16, torch.bfloat16, generator, rows))


def test_rows_of_a_wider_buffer_are_read_by_their_stride(generator):
    case = make_step_case(2, 2, 2, 64, torch.bfloat16, generator)
    rows, heads, head_dim = case.query.shape
    wide = torch.full((rows, heads + 3, head_dim), torch.nan, dtype=case.query.dtype, device=DEVICE)
    wide[:, :heads] = case.query
    case.query = wide[:, :heads]
    table = torch.full((rows, case.rows.block_table.shape[1] + 5), -(10**6), dtype=torch.int32)
    table = table.to(DEVICE)
    table[:, :-5] = case.rows.block_table
    case.rows = case.rows._replace(block_table=table[:, :-5])
    check(case)


def test_pages_that_no_list_may_look_at_stay_unread(generator):
    """Of rows without tokens the summaries are NaN, and so are all other pages'."""
    case = make_step_case(2, 2, 2, 64, torch.bfloat16, generator, SMALL_ROWS[2:4])
    tables = case.fresh()
    step_select(case.query, tables, case.step, case.rows, case.layer, Protected(0, 0))
    heads = range(2)
    listed = {int(tables.start[0, 0, head]): int(tables.count[0, 0, head]) for head in heads}
    assert int((tables.positions >= 0).sum()) == sum(listed.values())


@pytest.mark.gpu
def test_batches_and_prompts_of_all_sizes_share_the_compiled_kernels(generator):
    def num_compiled() -> int:
        kernels = module._keys_kernel, module._choose_kernel
        device = torch.cuda.current_device()
        return sum(len(kernel.device_caches[device][0]) for kernel in kernels)

    for size in [1, 16, 17, 100, 5003]:
        rows = [StepRow(size, (size // 2,))] * (1 + size % 16)
        for layer in range(2):
            case = make_step_case(2, 2, 4, 128, torch.bfloat16, generator, rows, layer)
            check(case, Protected(size % 3, 1))
        if size == 1:
            before = num_compiled()
    assert num_compiled() == before


@pytest.mark.gpu
def test_a_captured_graph_chooses_by_what_its_tensors_hold_then(generator):
    first = make_step_case(1, 2, 4, 128, torch.bfloat16, generator)
    other = make_step_case(1, 2, 4, 128, torch.bfloat16, generator)
    tables = first.fresh()
    inputs = first.query, tables, first.step, first.rows, 0, PROTECTED
    step_select(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_select(*inputs)
    for held, new in zip(
        (first.query, first.step.summaries, first.rows.block_table),
        (other.query, other.step.summaries, other.rows.block_table),
        strict=True,
    ):
        held.copy_(new)
    tables.entries.fill_(7)
    graph.replay()
    expected = other.fresh()
    step_select_ref(other.query, expected, other.step, other.rows, 0, PROTECTED)
    written = expected.positions >= 0
    assert torch.equal(tables.positions[written], expected.positions[written])
    assert torch.equal(tables.entries[written], expected.entries[written])
