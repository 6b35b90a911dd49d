"""`hybrid_step_select` against its reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from hybrid_case import SMALL_ROWS, HybridCase, HybridRow, check_permuted, make_hybrid_case
from triton_mode import DEVICE, FP8_ON_DEVICE, ON_GPU

from vllm_heterocache.kernels import hybrid_step_select as module
from vllm_heterocache.kernels.hybrid_step_select import hybrid_step_select
from vllm_heterocache.kernels.hybrid_step_select_ref import hybrid_step_select_ref
from vllm_heterocache.kernels.values import Protected

PROTECTED = Protected(1, 3)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Small prompts have several tiles and blocks."""
    if not ON_GPU:
        monkeypatch.setattr(module, "BLOCK_KEYS", 64)
        monkeypatch.setattr(module, "TILE_PAGES", 16)


def check(case: HybridCase, protected: Protected = PROTECTED, channel_share: float = 1.0) -> None:
    """Twice, as the second call finds the order of the first."""
    tables = case.fresh()
    for _ in range(2):
        hybrid_step_select(
            case.query, tables, case.step, case.rows, case.layer, case.scale, protected,
            channel_share, case.kv_scales,
        )  # fmt: skip
        check_permuted(case, tables, protected, channel_share)


@pytest.mark.parametrize("channel_share", [1.0, 0.5, 0.01])
def test_the_check_holds_for_the_reference(channel_share, generator):
    case = make_hybrid_case(2, 3, 2, 16, torch.float32, generator, layer=1)
    tables = case.fresh()
    hybrid_step_select_ref(
        case.query, tables, case.step, case.rows, 1, case.scale, PROTECTED, channel_share
    )
    check_permuted(case, tables, PROTECTED, channel_share)
    with pytest.raises(AssertionError):
        check_permuted(case, case.fresh(), PROTECTED, channel_share)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8])
def test_lists_are_those_of_the_reference(group, generator):
    head_dim, dtype = (64, torch.bfloat16) if group % 2 else (128, torch.float16)
    num_kv_heads = 4 if ON_GPU else 2  # each costs time in the interpreter
    check(make_hybrid_case(2, num_kv_heads, group, head_dim, dtype, generator, layer=1))


@pytest.mark.parametrize("channel_share", [0.75, 0.3, 0.001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_few_channels(dtype, channel_share, generator):
    check(make_hybrid_case(1, 3, 3, 64, dtype, generator), channel_share=channel_share)


def test_equal_channels_are_taken_in_their_order(generator):
    case = make_hybrid_case(1, 2, 2, 16, torch.float32, generator, SMALL_ROWS[2:3])
    case.query.copy_(torch.where(case.query > 0, 1.0, -1.0))
    check(case, Protected(0, 0), 0.5)


@pytest.mark.parametrize("channel_share", [1.0, 0.5])
def test_channels_whose_queries_add_up_to_zero(channel_share, generator):
    """Scaled by 64 ** -0.5 * 1.1, many of them would not."""
    case = make_hybrid_case(1, 3, 4, 64, torch.bfloat16, generator)
    case.scale *= 1.1
    grouped = case.query.view(len(case.shapes), 3, 4, 64)
    grouped.mul_(8).round_().div_(8)
    grouped[:, :, 3] = -grouped[:, :, :3].sum(dim=2)
    sums = (grouped.float() * case.scale).sum(dim=2)
    assert not grouped.nan_to_num().float().sum(dim=2).any() and (sums > 0).any()
    check(case, channel_share=channel_share)


def test_of_equal_pages_the_first_are_listed(generator):
    """Of three kinds of pages, so far apart that rounding changes no place: the lists are the
    reference's entry by entry."""
    case = make_hybrid_case(1, 3, 2, 16, torch.bfloat16, generator)
    summaries = case.step.summaries
    kinds = summaries[~summaries.isnan().any(dim=2).any(dim=1)][:3]
    of_page = kinds[torch.arange(len(summaries), device=DEVICE) % 3]
    summaries.copy_(torch.where(summaries.isnan(), summaries, of_page))
    found, expected = case.fresh(), case.fresh()
    inputs = case.step, case.rows, case.layer, case.scale, PROTECTED
    hybrid_step_select(case.query, found, *inputs)
    hybrid_step_select_ref(case.query, expected, *inputs)
    assert torch.equal(found.positions, expected.positions)
    assert torch.equal(found.entries, expected.entries)


@pytest.mark.parametrize("page_dtype", FP8_ON_DEVICE, ids=str)
def test_summaries_of_fp8_pages(page_dtype, generator):
    check(make_hybrid_case(2, 3, 4, 64, torch.bfloat16, generator, layer=1, page_dtype=page_dtype))


@pytest.mark.parametrize("protected", [(0, 0), (0, 5), (4, 0), (7, 9), (300, 300)], ids=str)
def test_protected_pages_come_first(protected, generator):
    check(make_hybrid_case(1, 2, 2, 64, torch.bfloat16, generator), Protected(*protected))


def test_long_prompts(monkeypatch, generator):
    rows = [HybridRow(14336, ((262, 2606), (1, 14000)))] * 2 if ON_GPU else []
    rows += [HybridRow(301, ((30, 270), (299, 1)))]
    check(make_hybrid_case(1, 2, 4, 64, torch.bfloat16, generator, rows))


def test_rows_of_a_wider_buffer_are_read_by_their_stride(generator):
    case = make_hybrid_case(2, 2, 2, 64, torch.bfloat16, generator)
    rows, heads, head_dim = case.query.shape
    wide = torch.full((rows, heads + 3, head_dim), torch.nan, dtype=case.query.dtype, device=DEVICE)
    wide[:, :heads] = case.query
    case.query = wide[:, :heads]
    check(case)


@pytest.mark.gpu
def test_batches_and_prompts_of_all_sizes_share_the_compiled_kernels(generator):
    def num_compiled() -> int:
        kernels = module._approximate_attention_kernel, module._permute_kernel
        device = torch.cuda.current_device()
        return sum(len(kernel.device_caches[device][0]) for kernel in kernels)

    for size in [1, 16, 17, 100, 5003]:
        rows = [HybridRow(size + 1, ((size // 2, 1 + size // 3),))] * (1 + size % 16)
        for layer in range(2):
            case = make_hybrid_case(2, 2, 4, 128, torch.bfloat16, generator, rows, layer)
            check(case, Protected(size % 3, 1))
        if size == 1:
            before = num_compiled()
    assert num_compiled() == before


@pytest.mark.gpu
def test_a_captured_graph_chooses_by_what_its_tensors_hold_then(generator):
    first = make_hybrid_case(1, 2, 4, 128, torch.bfloat16, generator)
    tables = first.fresh()
    inputs = first.query, tables, first.step, first.rows, 0, first.scale, PROTECTED
    hybrid_step_select(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hybrid_step_select(*inputs)
    first.query.copy_(torch.randn_like(first.query))
    graph.replay()
    check_permuted(first, tables, PROTECTED)
