"""`paged_decode` against its reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from triton_mode import BF16_LOG2_ERROR, DEVICE, FP8_ON_DEVICE, ON_GPU

# isort: split
from decode_cases import MATCHED, MEANS, PAGE, SMALL_ROWS, Case, Results, make_case, shape_id
from draft_case import DraftCase, with_drafts

from vllm_heterocache.kernels import paged_decode as paged_decode_module
from vllm_heterocache.kernels import tuning
from vllm_heterocache.kernels.paged_decode import DecodeWorkspace, paged_decode, split_decode
from vllm_heterocache.kernels.paged_decode_kernels import decode_kernel, split_kernel
from vllm_heterocache.kernels.paged_merge_kernels import merge_kernel

# the interpreter takes the logarithm of lanes that are not stored, too
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
PROGRAMS = None if ON_GPU else 5
LARGE_ROWS = [
    *SMALL_ROWS,
    (None, 0, 20011),
    ((1250, 63, 111), 1250, 20031),
    ((7, 401, 129, 0), 2000, 32001),
    (None, 0, 63 * PAGE),
    ((313,), 3000, 48111),
]
ROWS = LARGE_ROWS if ON_GPU else SMALL_ROWS
SHAPES = [  # L, H, G, D, dtype
    (3, 2, 4, 128, torch.bfloat16),
    (1, 1, 1, 64, torch.float16),
    (3, 2, 2, 128, torch.float16),
    (2, 3, 3, 64, torch.bfloat16),
    (2, 1, 5, 256, torch.bfloat16),
    (5, 2, 6, 128, torch.float16),
    (2, 1, 7, 256, torch.float16),
    (3, 2, 8, 64, torch.bfloat16),
    (2, 8, 4, 128, torch.bfloat16),
]


MERGES = {False: "two-launches", True: "fused-merge"}


@pytest.fixture(params=MERGES, ids=MERGES.values())
def fused(request) -> bool:
    return request.param


def shapes_and_merges(shapes):
    """Both ways to merge on a GPU. The interpreter, which is slow, tries each shape with one."""
    pairs = [
        pytest.param(shape, fused, id=f"{shape_id(shape)}-{MERGES[fused]}")
        for index, shape in enumerate(shapes)
        for fused in MERGES
        if ON_GPU or fused == bool(index % 2)
    ]
    return pytest.mark.parametrize(("shape", "fused"), pairs)


def workspace_of(
    case: Case, num_programs: int | None = PROGRAMS, late_heads: Sequence[int] = ()
) -> DecodeWorkspace:
    num_rows, head_dim = case.rows.seq_lens.shape[0], case.query.shape[2]
    _, num_layers, num_kv_heads = case.tables.count.shape
    return DecodeWorkspace.allocate(
        num_rows + 2,
        num_layers,
        num_kv_heads,
        case.group,
        head_dim,
        DEVICE,
        num_programs,
        case.rows.max_queries,
        late_heads=late_heads,
    )


def launch_of(case: Case, fused: bool, **changes) -> tuning.PagedDecodeLaunch:
    return tuning.PAGED_DECODE[case.query.shape[2]]._replace(fused_merge=fused, **changes)


def run(
    case: Case,
    launch: tuning.PagedDecodeLaunch | None,
    workspace: DecodeWorkspace | None = None,
    with_scores: bool = True,
) -> Results:
    workspace = workspace or workspace_of(case)
    results = case.poisoned()._replace(head_lse=workspace.head_lse.fill_(torch.nan))
    for partial in (workspace.partial_out, workspace.partial_lse):
        partial.fill_(torch.nan)
    split_decode(case.tables, case.rows, workspace)
    paged_decode(
        case.query, case.pages, case.tables, case.rows, workspace, case.layer, case.scale,
        results.output, results.last_queries, case.pivot_of_head if with_scores else None, launch,
        case.kv_scales, case.sink_logits, case.soft_cap,
    )  # fmt: skip
    assert not workspace.finished.any(), "the next launch would count from here"
    return results._replace(page_lse=results.page_lse.clone())


def check(case: Case, actual: Results, with_scores: bool = True) -> None:
    """NaN on both sides is what must not be written."""
    kept = case.reference(False, case.query.dtype).last_queries
    expected = case.reference(with_scores, torch.float32)
    case.check_output(actual.output, expected.output)
    assert torch.equal(actual.last_queries.nan_to_num(9.0), kept.nan_to_num(9.0))
    # the weights of a page are rounded to bfloat16 before they are added
    torch.testing.assert_close(
        actual.page_lse, expected.page_lse, rtol=1e-5, atol=BF16_LOG2_ERROR, equal_nan=True
    )
    torch.testing.assert_close(
        actual.head_lse, expected.head_lse, rtol=1e-5, atol=1e-4, equal_nan=True
    )


@shapes_and_merges(SHAPES)
def test_output_by_products_and_kept_queries_are_those_of_the_reference(shape, fused, generator):
    case = make_case(*shape, generator, rows=ROWS)
    check(case, run(case, launch_of(case, fused)))


@pytest.mark.parametrize("late", [[0], [1, 2], [0, 1, 2]], ids=str)
def test_late_heads_are_read_as_the_others_are(late, fused, generator):
    case = make_case(2, 3, 2, 64, torch.bfloat16, generator, rows=ROWS, stand_ins=MATCHED)
    first = case.layer * 3
    workspace = workspace_of(case, late_heads=[first + head for head in late])
    check(case, run(case, launch_of(case, fused), workspace))


@shapes_and_merges(SHAPES[:-1:2])
@pytest.mark.parametrize("stand_ins", [MEANS, MATCHED])
def test_stand_ins_weigh_as_the_tokens_they_stand_for(shape, stand_ins, fused, generator):
    case = make_case(*shape, generator, rows=ROWS, stand_ins=stand_ins)
    check(case, run(case, launch_of(case, fused)))


FP8_SHAPES = [*SHAPES[2:5], SHAPES[8]]
# In the interpreter each of these goes with one of the shapes, and with one way to merge.
FP8_CASES = [(dtype, stand_ins) for dtype in FP8_ON_DEVICE for stand_ins in (None, MATCHED)]


@pytest.mark.parametrize(
    ("shape", "page_dtype", "stand_ins", "fused"),
    [
        pytest.param(
            *(shape, page_dtype, stand_ins, fused),
            id=f"{shape_id(shape)}-{page_dtype}-{stand_ins}-{MERGES[fused]}",
        )
        for index, shape in enumerate(FP8_SHAPES)
        for case, (page_dtype, stand_ins) in enumerate(FP8_CASES)
        for fused in MERGES
        if ON_GPU or (case == index and fused == bool(index % 2))
    ],
)
def test_fp8_pages_are_read_with_the_scales_of_their_heads(
    shape, page_dtype, stand_ins, fused, generator
):
    case = make_case(*shape, generator, rows=ROWS, stand_ins=stand_ins, page_dtype=page_dtype)
    check(case, run(case, launch_of(case, fused)))


@pytest.mark.parametrize(
    ("has_sinks", "soft_cap"),
    [(True, 0.0), (False, 1.5), (True, 1.5)],
    ids=["sinks", "cap", "sinks-and-cap"],
)
@shapes_and_merges([SHAPES[3], *[SHAPES[0], SHAPES[4]] * ON_GPU])
def test_sinks_take_weight_and_logits_are_capped(shape, has_sinks, soft_cap, fused, generator):
    case = make_case(*shape, generator, rows=ROWS, has_sinks=has_sinks, soft_cap=soft_cap)
    check(case, run(case, launch_of(case, fused)))


@pytest.mark.parametrize("num_programs", [1, 3, 63] if ON_GPU else [3, 63])
def test_a_sink_counts_once_however_the_work_is_cut(num_programs, fused, generator):
    logits = {"has_sinks": True, "soft_cap": 2.0, "stand_ins": MATCHED}
    case = make_case(2, 2, 4, 64, torch.float16, generator, rows=ROWS, **logits)
    check(case, run(case, launch_of(case, fused), workspace_of(case, num_programs)))


@pytest.mark.parametrize(
    "page_dtype", [pytest.param(one, id=str(one)) for one in FP8_ON_DEVICE[-1:]]
)
def test_caps_are_of_the_numbers_that_elements_stand_for(page_dtype, generator):
    logits = {"has_sinks": True, "soft_cap": 2.0, "stand_ins": MEANS}
    rows = ROWS if ON_GPU else SMALL_ROWS[:5]
    case = make_case(*SHAPES[3], generator, rows=rows, page_dtype=page_dtype, **logits)
    check(case, run(case, launch_of(case, False)))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
def test_a_cap_that_logits_exceed_by_far_is_reached(generator):
    case = make_case(1, 1, 3, 64, torch.float16, generator, rows=SMALL_ROWS[:5], soft_cap=3.0)
    case.query *= 60
    check(case, run(case, launch_of(case, False)))


WIDE_SHAPES = [  # many query heads on a KV head, and many KV heads
    (2, 1, 24, 64, torch.bfloat16),
    (1, 1, 32, 128, torch.float16),
    (1, 2, 20, 64, torch.bfloat16),
    (1, 1, 64, 256, torch.bfloat16),
    (1, 16, 1, 64, torch.float16),
]
if ON_GPU:
    WIDE_SHAPES += [
        (1, 1, 32, 256, torch.float16),
        (1, 1, 64, 64, torch.float16),
        (1, 1, 64, 128, torch.bfloat16),
        (1, 1, 16, 256, torch.float16),
        (2, 4, 17, 64, torch.bfloat16),
        (2, 16, 2, 128, torch.float16),
        (2, 16, 1, 256, torch.bfloat16),
    ]


@pytest.mark.parametrize("shape", WIDE_SHAPES, ids=shape_id)
def test_heads_may_be_shared_by_many_or_by_few(shape, generator):
    rows = LARGE_ROWS if ON_GPU else [SMALL_ROWS[1], SMALL_ROWS[5]]
    case = make_case(*shape, generator, rows=rows, stand_ins=MATCHED, has_sinks=True)
    check(case, run(case, None))


@pytest.mark.parametrize("shape", [one for one in WIDE_SHAPES if 16 < one[2] <= 32], ids=shape_id)
def test_wide_groups_verify_drafts(shape, generator):
    rows = LARGE_ROWS if ON_GPU else SMALL_ROWS[4:5]
    case = make_case(*shape, generator, rows=rows, has_sinks=True, soft_cap=2.0)
    case = with_drafts(case, 2, generator)
    check_drafts(case, run(case.several, None))


def check_drafts(case: DraftCase, actual: Results, with_scores: bool = True) -> None:
    """Against the reference of a row for each query."""
    kept = case.single.reference(False, case.single.query.dtype).last_queries
    expected = case.joined(case.single.reference(with_scores, torch.float32))
    case.single.check_output(actual.output[: case.num_queries], expected.output)
    case.check_nothing_behind(actual)
    stored = actual.last_queries.nan_to_num(9.0)
    assert torch.equal(stored[: len(kept)], kept.nan_to_num(9.0))
    assert stored[len(kept) :].eq(9.0).all()
    torch.testing.assert_close(
        actual.page_lse, expected.page_lse, rtol=1e-5, atol=BF16_LOG2_ERROR, equal_nan=True
    )
    torch.testing.assert_close(
        actual.head_lse, expected.head_lse, rtol=1e-5, atol=1e-4, equal_nan=True
    )


@pytest.mark.parametrize(
    ("shape", "max_queries", "stand_ins"),
    [
        (SHAPES[0] if ON_GPU else (2, 2, 4, 64, torch.bfloat16), 8, MEANS),
        (SHAPES[1], 2, MATCHED),
        (SHAPES[3], 5, None),
        (SHAPES[6], 3, None),
    ],
    ids=lambda value: shape_id(value) if isinstance(value, tuple) else str(value),
)
def test_each_query_of_a_row_sees_the_tokens_up_to_its_own(
    shape, max_queries, stand_ins, generator
):
    rows = LARGE_ROWS if ON_GPU else SMALL_ROWS[1:5]
    case = make_case(*shape, generator, rows=rows, stand_ins=stand_ins)
    case = with_drafts(case, max_queries, generator)
    check_drafts(case, run(case.several, None))


@pytest.mark.parametrize("num_programs", [1, 7, 63])
def test_work_of_several_queries_may_be_cut_anywhere(num_programs, generator):
    """Also behind the last token that an early query sees."""
    case = make_case(2, 3, 4, 64, torch.float16, generator, rows=[*ROWS[3:5], (None, 0, 2 * PAGE)])
    case = with_drafts(case, 8, generator)
    check_drafts(case, run(case.several, None, workspace_of(case.several, num_programs)))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[6]], ids=shape_id)
def test_without_pivots_nothing_but_the_output_and_kept_queries_is_written(shape, fused, generator):
    case = make_case(*shape, generator, rows=ROWS)
    check(case, run(case, launch_of(case, fused), with_scores=False), with_scores=False)


class CountedLaunches:
    """A kernel whose launches are counted."""

    def __init__(self, kernel) -> None:
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid):
        self.count += 1
        return self.kernel[grid]


@pytest.mark.parametrize("asked", [None, False, True], ids=["by-rule", "two-launches", "fused"])
@pytest.mark.parametrize("segments_missing", [0, 1], ids=["at-the-rule", "under-the-rule"])
def test_the_merge_is_fused_from_so_many_segments_on(
    segments_missing, asked, generator, monkeypatch
):
    case = make_case(2, 3, 4, 64, torch.float16, generator, rows=ROWS)
    num_segments = case.query.shape[0] * 3
    monkeypatch.setattr(tuning, "FUSED_MERGE_SEGMENTS", num_segments + segments_missing)
    merge = CountedLaunches(merge_kernel)
    monkeypatch.setattr(paged_decode_module, "merge_kernel", merge)
    check(case, run(case, None if asked is None else launch_of(case, asked)))
    is_fused = not segments_missing if asked is None else asked
    assert merge.count == (0 if is_fused else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [63, 64])
def test_both_ways_at_the_border_of_the_rule(num_rows, fused, generator):
    rows = (SMALL_ROWS * 20)[:num_rows]
    case = make_case(1, 8, 4, 128, torch.bfloat16, generator, rows=rows)
    check(case, run(case, launch_of(case, fused)))
    check(case, run(case, None))


@pytest.mark.parametrize("stand_ins", [None, MATCHED])
@pytest.mark.parametrize("num_programs", [1, 2, 3, 7, 63] if ON_GPU else [1, 3, 63])
def test_work_may_be_cut_anywhere(num_programs, stand_ins, fused, generator):
    case = make_case(2, 3, 4, 64, torch.float16, generator, rows=ROWS, stand_ins=stand_ins)
    check(case, run(case, launch_of(case, fused), workspace_of(case, num_programs)))


@pytest.mark.parametrize("tile_tokens", [16, 32, 128])
def test_tiles_of_every_size_give_the_same(tile_tokens, fused, generator):
    case = make_case(2, 2, 3, 64, torch.bfloat16, generator, rows=ROWS)
    check(case, run(case, launch_of(case, fused, tile_tokens=tile_tokens)))


@pytest.mark.parametrize("layer", [0, 1])
def test_every_layer_has_its_own_plan_and_place(layer, fused, generator):
    case = make_case(4, 2, 2, 64, torch.float16, generator, rows=ROWS, layer=layer)
    check(case, run(case, launch_of(case, fused)))


def test_a_workspace_serves_one_batch_after_another(fused, generator):
    """Shorter and longer batches, in which other segments are cut."""
    whole = make_case(2, 2, 2, 64, torch.float16, generator, rows=ROWS)
    workspace = workspace_of(whole)
    for rows in (ROWS, ROWS[:2], ROWS[::-1], ROWS[3:4]):
        case = make_case(2, 2, 2, 64, torch.float16, generator, rows=rows)
        actual = run(case, launch_of(case, fused), workspace)
        segments = (len(rows) + 2) * 2
        assert actual.head_lse[:, segments:].isnan().all()
        check(case, actual._replace(head_lse=actual.head_lse[:, :segments]))


@pytest.mark.parametrize(("split_segments", "find_segments"), [(8, 4), (16, 32)])
def test_batches_of_more_segments_than_a_block_holds(
    split_segments, find_segments, fused, generator, monkeypatch
):
    monkeypatch.setattr(paged_decode_module, "SPLIT_SEGMENTS", split_segments)
    monkeypatch.setattr(paged_decode_module, "FIND_SEGMENTS", find_segments)
    rows = ROWS + [(None, 0, 0)] * 7 + ROWS[:5]
    case = make_case(2, 3, 1, 64, torch.float16, generator, rows=rows)
    check(case, run(case, launch_of(case, fused)))


def test_query_and_output_may_be_views_with_wider_rows(fused, generator):
    case = make_case(2, 2, 2, 64, torch.float16, generator, rows=ROWS)
    wide = torch.full((len(ROWS), 8, 64), torch.nan, dtype=torch.float16, device=DEVICE)
    wide[:, :4] = case.query
    case.query = wide[:, :4]
    check(case, run(case, launch_of(case, fused)))


def test_a_batch_without_any_token_gives_zeros(fused, generator):
    case = make_case(2, 2, 2, 64, torch.float16, generator, rows=[(None, 0, 0), ((2,), 2, 0)])
    results = run(case, launch_of(case, fused))
    assert torch.equal(results.output, torch.zeros_like(case.query))
    assert all(field.isnan().all() for field in results[1:])


def test_one_token_is_attended_to_alone(fused, generator):
    case = make_case(2, 2, 2, 64, torch.float16, generator, rows=[(None, 0, 1)])
    values = torch.stack([case.kv(0, head)[0, 64:] for head in range(2)])
    output = run(case, launch_of(case, fused)).output
    assert torch.equal(output[0], values.repeat_interleave(2, dim=0))


@pytest.mark.gpu
def test_a_captured_graph_follows_its_tables(fused, generator):
    """Replays after every input changed in place, with partials left by others. Another case of
    the same rows has lists and arenas of the same sizes."""
    rows = LARGE_ROWS
    case = make_case(2, 8, 4, 128, torch.bfloat16, generator, rows=rows)
    workspace, launch = workspace_of(case), launch_of(case, fused)
    results = case.poisoned()._replace(head_lse=workspace.head_lse)
    last_queries = torch.empty(len(rows) + 3, *results.last_queries.shape[1:], device=DEVICE)
    last_queries = last_queries.to(case.query.dtype)

    def step():
        split_decode(case.tables, case.rows, workspace)
        paged_decode(
            case.query, case.pages, case.tables, case.rows, workspace, case.layer, case.scale,
            results.output, last_queries, case.pivot_of_head, launch,
        )  # fmt: skip

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(4):
        other = make_case(2, 8, 4, 128, torch.bfloat16, generator, rows=rows)
        order = torch.randperm(len(rows), generator=generator, device=DEVICE)
        case.query.copy_(other.query[order])
        case.pages.copy_(other.pages)
        case.pivot_of_head.copy_(other.pivot_of_head)
        for mine, theirs in zip(case.tables[:7], other.tables[:7], strict=True):
            if mine is not None and mine.numel():
                mine.copy_(theirs)
        for mine, theirs in zip(case.rows, other.rows, strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(theirs[order])
        for written in (results.output, last_queries, workspace.head_lse, case.tables.page_lse):
            written.fill_(torch.nan)
        graph.replay()
        num_places = max(int(case.rows.query_place.max()) + 1, 1)
        check(
            case,
            results._replace(
                last_queries=last_queries[:num_places], page_lse=case.tables.page_lse.clone()
            ),
        )


@pytest.mark.gpu
def test_merging_gives_the_same_every_time(fused, generator):
    """The work is cut by shapes and lengths alone, so sums run in one order."""
    case = make_case(1, 8, 4, 128, torch.bfloat16, generator, rows=[((2001, 211), 2001, 32100)])
    workspace, launch = workspace_of(case), launch_of(case, fused)
    first = run(case, launch, workspace)
    check(case, first)
    head_lse = first.head_lse.clone()
    for _ in range(200):
        again = run(case, launch, workspace)
        assert torch.equal(again.output, first.output)
        assert torch.equal(again.head_lse.nan_to_num(9.0), head_lse.nan_to_num(9.0))


@pytest.mark.gpu
def test_batch_size_and_layer_compile_nothing_new(fused, generator):
    def variants() -> list[int]:
        device = torch.cuda.current_device()
        kernels = (split_kernel, decode_kernel, merge_kernel)
        return [len(kernel.device_caches[device][0]) for kernel in kernels]

    seen = []
    for num_rows, layer in [(2, 2), (1, 0), (1, 1), (16, 2), (37, 2), (150, 0)]:
        rows = (SMALL_ROWS * 20)[1 : num_rows + 1]
        case = make_case(3, 8, 4, 128, torch.bfloat16, generator, rows=rows, layer=layer)
        check(case, run(case, launch_of(case, fused)))
        seen.append(variants())
    assert seen == [seen[0]] * len(seen)
