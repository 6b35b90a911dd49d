"""`paged_decode_ref` against softmax in float64, head by head and page by page."""

from __future__ import annotations

import pytest
import torch
from decode_cases import MATCHED, MEANS, PAGE, Case, make_case, shape_id
from draft_case import with_drafts

from vllm_heterocache.kernels.kv_scales import FP8_DTYPES
from vllm_heterocache.kernels.paged_decode_ref import paged_decode_ref
from vllm_heterocache.kernels.tables import DecodeRows

SHAPES = [  # L, H, G, D, dtype
    (1, 1, 1, 64, torch.float32),
    (3, 2, 2, 128, torch.float32),
    (2, 3, 3, 64, torch.bfloat16),
    (1, 5, 4, 64, torch.float16),
    (2, 1, 5, 256, torch.bfloat16),
    (5, 2, 6, 128, torch.float16),
    (2, 1, 7, 256, torch.float32),
    (3, 2, 8, 64, torch.bfloat16),
]


def only_row(case: Case, row: int) -> Case:
    alone = slice(row, row + 1)
    rows = DecodeRows(*(field[alone] for field in case.rows[:5]))
    return Case(case.query[alone], case.pages, case.tables, rows, case.pivot_of_head, case.layer)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_each_head_attends_to_its_own_pages_and_the_live_tail_and_to_nothing_else(shape, generator):
    case = make_case(*shape, generator)
    case.check_output(case.reference().output, case.exact().output)


@pytest.mark.parametrize("stand_ins", [MEANS, MATCHED])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_stand_ins_take_part_with_the_weight_of_the_tokens_they_stand_for(
    shape, stand_ins, generator
):
    case = make_case(*shape, generator, stand_ins=stand_ins)
    assert any(case.bias(row, 0).count_nonzero() for row in case.live_rows())
    results, exact = case.reference(), case.exact()
    case.check_output(results.output, exact.output)
    near = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(results.page_lse.double(), exact.page_lse, **near)
    torch.testing.assert_close(results.head_lse.double(), exact.head_lse, **near)


@pytest.mark.parametrize("stand_ins", [None, MEANS, MATCHED])
@pytest.mark.parametrize("page_dtype", FP8_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[5], SHAPES[6]], ids=shape_id)
def test_elements_of_fp8_pages_stand_for_their_multiples(shape, page_dtype, stand_ins, generator):
    case = make_case(*shape, generator, stand_ins=stand_ins, page_dtype=page_dtype)
    results, exact = case.reference(dtype=torch.float32), case.exact()
    near = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(results.output.double(), exact.output, **near)
    torch.testing.assert_close(results.page_lse.double(), exact.page_lse, **near)
    torch.testing.assert_close(results.head_lse.double(), exact.head_lse, **near)


@pytest.mark.parametrize("stand_ins", [None, MEANS, MATCHED])
@pytest.mark.parametrize(
    ("has_sinks", "soft_cap"), [(True, 0.0), (False, 1.5), (True, 1.5)],
    ids=["sinks", "cap", "sinks-and-cap"],
)  # fmt: skip
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3]], ids=shape_id)
def test_sinks_take_weight_and_logits_are_capped(shape, has_sinks, soft_cap, stand_ins, generator):
    """The bias of a stand-in token is added behind the cap; sinks are not capped."""
    logits = {"has_sinks": has_sinks, "soft_cap": soft_cap, "stand_ins": stand_ins}
    case = make_case(*shape, generator, **logits)
    results, exact = case.reference(dtype=torch.float32), case.exact()
    near = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(results.output.double(), exact.output, **near)
    torch.testing.assert_close(results.page_lse.double(), exact.page_lse, **near)
    torch.testing.assert_close(results.head_lse.double(), exact.head_lse, **near)


@pytest.mark.parametrize("max_queries", [2, 5, 8])
@pytest.mark.parametrize("stand_ins", [None, MEANS, MATCHED])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[7]], ids=shape_id)
def test_each_query_of_a_row_sees_the_tokens_up_to_its_own(
    shape, stand_ins, max_queries, generator
):
    """By-products are of the first one, which no verification rejects."""
    case = with_drafts(make_case(*shape, generator, stand_ins=stand_ins), max_queries, generator)
    results, exact = case.several.reference(dtype=torch.float32), case.single.exact()
    exact = case.joined(exact)
    near = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
    output = results.output[: case.num_queries].double()
    torch.testing.assert_close(output, exact.output, **near)
    case.check_nothing_behind(results)
    for name in ("last_queries", "page_lse", "head_lse"):
        actual, expected = getattr(results, name).double(), getattr(exact, name)
        torch.testing.assert_close(actual[: len(expected)], expected, **near)
    assert exact.head_lse.isfinite().any()


def test_a_mean_of_equal_tokens_counts_as_all_of_them(generator):
    """A head that evicted two pages of one and the same token reads one mean page for both."""
    case = make_case(2, 1, 3, 64, torch.float32, generator, rows=[((3,), 3, 3 * PAGE + 5)])
    slot = int(case.rows.row_to_table_slot[0])
    start = int(case.tables.start[slot, case.layer, 0])
    listed = case.tables.entries[start : start + 3].long()
    case.pages[listed[1:]] = case.pages[listed[1], 0].clone()
    before = case.reference().output
    case.tables.count[slot, case.layer, 0] = 1
    case.tables = case.tables._replace(
        stand_in_pages=(case.tables.count == 1).int(), has_stand_ins=True
    )
    torch.testing.assert_close(case.reference().output, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_pivots_of_due_rows_leave_the_lse_of_their_listed_pages_and_of_all_they_read(
    shape, generator
):
    case = make_case(*shape, generator)
    results, exact = case.reference(), case.exact()
    near = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}  # NaN: what must not be written
    torch.testing.assert_close(results.page_lse.double(), exact.page_lse, **near)
    torch.testing.assert_close(results.head_lse.double(), exact.head_lse, **near)


def test_no_lse_is_written_where_no_head_leads(generator):
    case = make_case(*SHAPES[1], generator)
    results = case.reference(with_scores=False)
    assert torch.equal(results.output, case.reference().output)
    assert results.page_lse.isnan().all() and results.head_lse.isnan().all()


def test_queries_of_rows_with_a_place_are_kept(generator):
    case = make_case(*SHAPES[1], generator)
    kept, exact = case.reference().last_queries.double(), case.exact().last_queries
    assert (~exact.isnan()).any()
    assert torch.equal(kept.nan_to_num(9.0), exact.nan_to_num(9.0))


def test_every_page_of_a_head_can_be_listed_in_any_order(generator):
    case = make_case(2, 2, 3, 64, torch.float32, generator)
    before = case.reference().output
    slot, head = int(case.rows.row_to_table_slot[4]), 1
    start, count = (int(t[slot, case.layer, head]) for t in (case.tables.start, case.tables.count))
    assert count == 7
    entries = case.tables.entries
    entries[start : start + count] = entries[start : start + count].flip(0)
    torch.testing.assert_close(case.reference().output, before, rtol=1e-5, atol=1e-6)


def test_a_row_does_not_depend_on_the_rest_of_the_batch(generator):
    case = make_case(2, 3, 2, 64, torch.bfloat16, generator)
    whole = case.reference().output
    for row in range(len(case.query)):
        assert torch.equal(only_row(case, row).reference().output[0], whole[row])


def test_one_token_is_attended_to_alone(generator):
    case = make_case(2, 2, 2, 64, torch.float32, generator, rows=[(None, 0, 1)])
    values = torch.stack([case.kv(0, head)[0, 64:] for head in range(2)])
    assert torch.equal(case.reference().output[0], values.repeat_interleave(2, dim=0))


def test_a_batch_without_any_token_gives_zeros(generator):
    case = make_case(2, 2, 2, 64, torch.float16, generator, rows=[(None, 0, 0), ((2,), 2, 0)])
    results = case.reference()
    assert torch.equal(results.output, torch.zeros_like(case.query))
    assert all(field.isnan().all() for field in results[1:])


def test_dense_rows_need_no_list_at_all(generator):
    case = make_case(2, 2, 2, 64, torch.float32, generator, rows=[(None, 0, 49), (None, 0, 20)])
    case.tables = case.tables._replace(entries=torch.empty(0, dtype=torch.int32))
    case.check_output(case.reference().output, case.exact().output)


def test_the_output_may_be_a_strided_view(generator):
    case = make_case(2, 2, 2, 64, torch.float16, generator)
    room = torch.full((len(case.query), 6, 64), torch.nan, dtype=torch.float16)
    results = case.poisoned()
    paged_decode_ref(
        case.query, case.pages, case.tables, case.rows, case.layer, case.scale,
        room[:, 1:5], results.last_queries,
    )  # fmt: skip
    assert torch.equal(room[:, 1:5], case.reference().output)
    assert room[:, ::5].isnan().all()
