"""One small case of every Triton kernel against its reference, for scripts/bench/check.py.

Inputs are made on the CPU and references run there, so that on the GPU next to nothing but our
kernels runs: a sanitizer looks at all that runs there. The cases are those of the tests.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from triton_mode import BF16_LOG2_ERROR, DEVICE, FP8_ON_DEVICE, ON_GPU

# isort: split
import decode_cases
import retrieval_case
from dense_prompt import make_dense_prompt
from draft_case import with_drafts
from evicted_case import make_evicted_case
from exchange_case import PROTECTED as EXCHANGE_PROTECTED
from exchange_case import make_exchange_case
from finder_case import make_finder_case, quantize
from hybrid_case import check_permuted, make_hybrid_case
from least_squares_case import make_least_squares
from mean_case import SLOT, make_mean_case
from searched import searched
from selection_case import make_selection_case
from step_case import StepRow, make_step_case, with_bits

from vllm_heterocache.kernels import tuning
from vllm_heterocache.kernels.bounded_least_squares import bounded_least_squares
from vllm_heterocache.kernels.bounded_least_squares_ref import bounded_least_squares_ref
from vllm_heterocache.kernels.drift_check import drift_check, drift_check_launch
from vllm_heterocache.kernels.drift_check_ref import drift_check_ref
from vllm_heterocache.kernels.evicted_attention import LEAST_SPLIT, evicted_attention
from vllm_heterocache.kernels.evicted_attention_ref import evicted_attention_ref
from vllm_heterocache.kernels.exchange_pages import exchange_pages
from vllm_heterocache.kernels.exchange_pages_ref import exchange_pages_ref
from vllm_heterocache.kernels.find_pages import find_pages
from vllm_heterocache.kernels.find_pages_ref import find_pages_ref
from vllm_heterocache.kernels.flip_pages import flip_pages, flip_pages_launch
from vllm_heterocache.kernels.flip_pages_ref import flip_pages_ref
from vllm_heterocache.kernels.hybrid_step_select import hybrid_step_select
from vllm_heterocache.kernels.one_bit_step_select import one_bit_step_select
from vllm_heterocache.kernels.one_bit_step_select_ref import one_bit_step_select_ref
from vllm_heterocache.kernels.page_gather import page_gather
from vllm_heterocache.kernels.page_gather_ref import page_gather_ref
from vllm_heterocache.kernels.page_means import page_means
from vllm_heterocache.kernels.page_means_ref import page_means_ref
from vllm_heterocache.kernels.page_scores import page_scores, page_scores_workspace
from vllm_heterocache.kernels.page_scores_ref import page_scores_ref
from vllm_heterocache.kernels.page_select import BLOCK_PAGES, page_select
from vllm_heterocache.kernels.page_select_ref import page_select_ref
from vllm_heterocache.kernels.page_summaries import page_summaries
from vllm_heterocache.kernels.page_summaries_ref import page_summaries_ref
from vllm_heterocache.kernels.paged_decode import DecodeWorkspace, paged_decode, split_decode
from vllm_heterocache.kernels.quantized_keys import quantized_keys
from vllm_heterocache.kernels.quantized_keys_ref import quantized_keys_ref
from vllm_heterocache.kernels.retrieval_moves import (
    retrieval_moves,
    retrieval_moves_launches,
    retrieval_moves_workspace,
)
from vllm_heterocache.kernels.retrieval_moves_ref import retrieval_moves_ref
from vllm_heterocache.kernels.step_select import step_select
from vllm_heterocache.kernels.step_select_ref import step_select_ref
from vllm_heterocache.kernels.tables import Moves, drift_counters
from vllm_heterocache.kernels.values import DriftRule, Protected

CPU = torch.device("cpu")
LOGITS: dict[str, dict[str, Any]] = {
    "sinks": {"has_sinks": True},
    "soft cap": {"soft_cap": 1.5},
    "sinks and soft cap": {"has_sinks": True, "soft_cap": 1.5},
}
# two KV heads of a layer go on over many programs; dense, padded and listed rows in between
DECODE_ROWS = [*decode_cases.SMALL_ROWS, ((40, 7, 13, 0), 45, 45 * 16 + 201)]
NUM_PROGRAMS = 29
PROTECTED = Protected(1, 3)
SLOTS = [2, -1, 0, 1]
PAGE_COUNTS = [37, 300, 111]


def moved(value: Any, device: torch.device) -> Any:
    """A copy with every tensor on `device`; of tuples with names and of dataclasses, too."""
    if torch.is_tensor(value):
        return value.to(device, copy=True)
    if isinstance(value, list):
        return [moved(one, device) for one in value]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(field, device) for field in value))
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(
            value, **{name: moved(getattr(value, name), device) for name in names}
        )
    return value


def assert_equal(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit by bit, poison included."""
    same = torch.equal(actual.cpu().nan_to_num(7.5), expected.nan_to_num(7.5))
    assert same, f"{what} is not the reference's"


def largest_error(
    what: str, actual: torch.Tensor, expected: torch.Tensor, rtol: float, atol: float
) -> float:
    """Asserts that it is small, and that NaN stands where it has to."""
    actual = actual.cpu()
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )
    return (actual - expected).nan_to_num(0.0).abs().max().item()


DECODE_SHAPE = 2, 4, 4, 128  # L, H, G, D
LATE_HEADS = [4, 6]  # both of its last layer


def decode_case(
    stand_ins: str | None, shape: tuple[int, ...] = DECODE_SHAPE, **kind: Any
) -> decode_cases.Case:
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    return decode_cases.make_case(
        *shape, torch.bfloat16, generator, rows=DECODE_ROWS, layer=shape[0] - 1,
        stand_ins=stand_ins, **kind,
    )  # fmt: skip


def decode_workspace(case: decode_cases.Case, late_heads: Sequence[int] = ()) -> DecodeWorkspace:
    num_rows, head_dim = case.rows.seq_lens.shape[0], case.query.shape[2]
    _, num_layers, num_kv_heads = case.tables.count.shape
    sizes = num_rows + 2, num_layers, num_kv_heads, case.group, head_dim
    return DecodeWorkspace.allocate(
        *sizes, DEVICE, NUM_PROGRAMS, case.rows.max_queries, late_heads=late_heads
    )


def check_split_decode(stand_ins: str | None) -> float:
    case = decode_case(stand_ins)
    workspace = decode_workspace(case)
    split_decode(moved(case.tables, DEVICE), moved(case.rows, DEVICE), workspace)
    slots, tokens = case.rows.row_to_table_slot.long(), case.rows.seq_lens
    tail_pages = -(-(tokens - case.tables.prompt_pages[slots] * decode_cases.PAGE) // 16)
    sizes = case.tables.count[slots] + tail_pages[:, None, None]  # [rows, L, H]
    if stand_ins:
        sizes += case.tables.stand_in_pages[slots]
    sizes[tokens == 0] = 0
    ends = sizes.permute(1, 2, 0).flatten(1).cumsum(1).int()
    first_page = workspace.first_page[:, : ends.shape[1] + 1]
    assert_equal("the split", first_page, torch.nn.functional.pad(ends, (1, 0)))
    return 0.0


def check_paged_decode(
    fused_merge: bool,
    with_scores: bool,
    stand_ins: str | None,
    shape: tuple[int, ...] = DECODE_SHAPE,
    late_heads: Sequence[int] = (),
    **kind: Any,
) -> float:
    """`kind`: arguments of `decode_cases.make_case`."""
    case = decode_case(stand_ins, shape, **kind)
    results, on = moved(case.poisoned(), DEVICE), moved(case, DEVICE)
    workspace = decode_workspace(case, late_heads)
    for written in (workspace.head_lse, workspace.partial_out, workspace.partial_lse):
        written.fill_(torch.nan)
    launch = tuning.paged_decode_launch(case.query.shape[2], 1, case.group)
    launch = launch._replace(fused_merge=fused_merge)
    split_decode(on.tables, on.rows, workspace)
    paged_decode(
        on.query, on.pages, on.tables, on.rows, workspace, on.layer, on.scale, results.output,
        results.last_queries, on.pivot_of_head if with_scores else None, launch, on.kv_scales,
        on.sink_logits, on.soft_cap,
    )  # fmt: skip
    kept = case.reference(False, case.query.dtype).last_queries
    expected = case.reference(with_scores, torch.float32)
    case.check_output(results.output.cpu(), expected.output)
    assert_equal("a kept query", results.last_queries, kept)
    assert not workspace.finished.cpu().any(), "the next launch would count from here"
    largest_error("page_lse", on.tables.page_lse, expected.page_lse, 1e-5, BF16_LOG2_ERROR)
    largest_error("head_lse", workspace.head_lse, expected.head_lse, 1e-5, 1e-4)
    return (results.output.cpu().float() - expected.output).abs().max().item()


def check_drafts(max_queries: int) -> float:
    """Rows of several queries, against a row for each of them."""
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    case = with_drafts(decode_case(decode_cases.MATCHED), max_queries, generator)
    results, on = moved(case.several.poisoned(), DEVICE), moved(case.several, DEVICE)
    workspace = decode_workspace(case.several)
    workspace.head_lse.fill_(torch.nan)
    split_decode(on.tables, on.rows, workspace)
    paged_decode(
        on.query, on.pages, on.tables, on.rows, workspace, on.layer, on.scale, results.output,
        results.last_queries, on.pivot_of_head,
    )  # fmt: skip
    expected = case.joined(case.single.reference(True, torch.float32))
    output = results.output.cpu()
    case.single.check_output(output[: case.num_queries], expected.output)
    case.check_nothing_behind(results._replace(output=output))
    largest_error("page_lse", on.tables.page_lse, expected.page_lse, 1e-5, BF16_LOG2_ERROR)
    largest_error("head_lse", workspace.head_lse, expected.head_lse, 1e-5, 1e-4)
    return (output[: case.num_queries].float() - expected.output).abs().max().item()


def check_page_scores(
    page_dtype: torch.dtype | None = None,
    has_sinks: bool = False,
    soft_cap: float = 0.0,
    group: int = 4,
) -> float:
    num_tokens, num_kv_heads, head_dim = 1201, 4, 128
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    prompt = make_dense_prompt(
        num_tokens, 2, num_kv_heads, group, head_dim, torch.bfloat16, generator, page_dtype
    )
    size = page_scores_workspace(num_tokens, num_kv_heads, group)
    scores = torch.full((2, num_kv_heads, num_tokens // 16), torch.nan)
    actual, workspace = moved(scores, DEVICE), moved(torch.full((size,), torch.nan), DEVICE)
    inputs, scale = prompt[:3], head_dim**-0.5
    sinks = 5 * torch.randn(prompt.last_query.shape[:2]).bfloat16() if has_sinks else None
    page_scores_ref(*inputs, num_tokens, scale, scores, prompt.kv_scales, sinks, soft_cap)
    on = moved(prompt, DEVICE)
    page_scores(
        *on[:3], num_tokens, scale, actual, workspace, None, on.kv_scales, moved(sinks, DEVICE),
        soft_cap,
    )  # fmt: skip
    return largest_error("a score", actual, scores, 1e-4, 1e-12)


def check_page_select() -> float:
    num_pages = BLOCK_PAGES + 391
    scores = torch.rand(2, 3, num_pages) ** 8
    scores[torch.rand(scores.shape) < 0.2] = 2.0**-9  # ties
    counts = torch.randint(0, num_pages, (2, 3))
    counts[0, 0], counts[1, 1] = 0, num_pages
    case = make_selection_case(scores, counts, PROTECTED)
    expected, actual = case.filled(page_select_ref), moved(case, DEVICE).filled(page_select)
    assert_equal("source", actual.source, expected.source)
    for name in ("positions", "scores", "is_reference", "is_resident"):
        assert_equal(name, getattr(actual.tables, name), getattr(expected.tables, name))
    return 0.0


def check_page_gather(where: str) -> float:
    """Within a pool, from pinned memory, or so with a count that only the device knows."""
    pool = torch.randn(90, 16, 256).bfloat16()
    order = torch.randperm(90)
    source_ids, target_ids = order[:31], order[31:62].int()
    num_used = 31 if where == "pool" else 17
    expected = pool.clone()
    page_gather_ref(pool, source_ids[:num_used], expected, target_ids[:num_used])
    actual = moved(pool, DEVICE)
    source = actual if where == "pool" else (pool.pin_memory() if ON_GPU else pool)
    ids = moved(source_ids, DEVICE), moved(target_ids, DEVICE)
    if where == "counted":
        count = moved(torch.tensor([num_used], dtype=torch.int32), DEVICE)
        page_gather(source, ids[0], actual, ids[1], count, 3)
    else:
        page_gather(source, ids[0][:num_used], actual, ids[1][:num_used])
    assert_equal("a page", actual, expected)
    return 0.0


def check_page_means(dtype: torch.dtype = torch.bfloat16) -> float:
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    lengths = 391, [(391, 0), (40, 2), (370, 1), (7, 1), (0, 2)]
    case = make_mean_case((2, 3, 128, dtype), lengths, generator, CPU)
    on = moved(case, DEVICE)
    page_means(on.pages, on.tables, SLOT, on.dense_blocks)
    page_means_ref(case.pages, case.tables, SLOT, case.dense_blocks)
    # sums run in another order, so that a value may be rounded to its neighbour
    eps = torch.finfo(dtype).eps
    return largest_error("a mean", on.pages.float(), case.pages.float(), eps, 1e-5)


def check_evicted_attention(
    dtype: torch.dtype = torch.bfloat16, has_sinks: bool = False, soft_cap: float = 0.0
) -> float:
    """A prompt of several splits."""
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    case = make_evicted_case(generator, 2, LEAST_SPLIT + 391, 67, 128, dtype)
    keys, values, is_evicted, queries = case
    sinks = 5 * torch.randn(queries.shape[:2]) if has_sinks else None
    exact = keys.double(), values.double(), is_evicted, queries.double()
    exact_sinks = None if sinks is None else sinks.double()
    on = [moved(one, DEVICE) for one in (*case, sinks)]
    actual = evicted_attention(*on, soft_cap)
    expected = [one.float() for one in evicted_attention_ref(*exact, exact_sinks, soft_cap)]
    tolerances = (0, 2e-3), (4e-3, 1e-6), (1e-2, 1e-2), (1e-2, 1e-9)
    names = actual._fields
    return max(
        largest_error(*found, *allowed)
        for *found, allowed in zip(names, actual, expected, tolerances, strict=True)
    )


def check_bounded_least_squares() -> float:
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    problem = make_least_squares(generator, 3, 130, 301)
    actual = bounded_least_squares(*(moved(one, DEVICE) for one in problem), 0.01, 20)
    expected = bounded_least_squares_ref(*problem, 0.01, 20)
    return largest_error("a weight", actual, expected, 1e-3, 1e-4)


def check_page_summaries(dtype: torch.dtype = torch.bfloat16) -> float:
    pool = torch.randn(6 * 37, 16, 256).to(dtype)
    summaries = torch.full((6 * 37, 2, 128), torch.nan).to(dtype)
    blocks = torch.tensor([35, 2, 0, 17, 36], dtype=torch.int32)
    actual = moved(summaries, DEVICE)
    page_summaries(moved(pool, DEVICE), moved(blocks, DEVICE), 6, actual)
    page_summaries_ref(pool, blocks, 6, summaries)
    assert_equal("a summary", actual.float(), summaries.float())
    return 0.0


def check_step_select(page_dtype: torch.dtype | None = None, one_bit: bool = False) -> float:
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    rows = [StepRow(391, (40, 391, 0)), StepRow(0, (0,)), StepRow(33, (7,), 0), StepRow(111, (9,))]
    case = make_step_case(2, 3, 4, 128, torch.bfloat16, generator, rows, 1, page_dtype)
    select, reference = step_select, step_select_ref
    if one_bit:
        case, select, reference = with_bits(case), one_bit_step_select, one_bit_step_select_ref
    on = moved(case, DEVICE)
    expected, actual = case.fresh(), on.fresh()
    reference(case.query, expected, case.step, case.rows, 1, PROTECTED)
    select(on.query, actual, on.step, on.rows, 1, PROTECTED)
    for name in ("entries", "positions"):
        assert_equal(name, getattr(actual, name), getattr(expected, name))
    return 0.0


def check_hybrid_step_select(page_dtype: torch.dtype | None = None, share: float = 1.0) -> float:
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    case = make_hybrid_case(2, 3, 4, 128, torch.bfloat16, generator, layer=1, page_dtype=page_dtype)
    on = moved(case, DEVICE)
    actual = on.fresh()
    hybrid_step_select(
        on.query, actual, on.step, on.rows, 1, on.scale, PROTECTED, share, on.kv_scales
    )
    check_permuted(case, moved(actual, CPU), PROTECTED, share)
    return 0.0


def check_quantized_keys(page_dtype: torch.dtype | None = None, soft_cap: float = 0.0) -> float:
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    case = make_finder_case(4, 128, torch.bfloat16, generator, page_dtype)
    on = moved(case, DEVICE)
    quantize(quantized_keys_ref, case)
    quantize(quantized_keys, on)
    assert_equal("codes", on.finders.codes, case.finders.codes)
    rtol = 0 if ON_GPU else torch.finfo(torch.bfloat16).eps  # the interpreter cuts digits off
    largest_error("a grid", on.finders.grids, case.finders.grids, rtol, 0)
    case.finders.grids.copy_(on.finders.grids)
    inputs = [
        (one.query, one.tables, one.finders, one.rows, 1, 0.2, one.kv_scales, soft_cap)
        for one in (case, on)
    ]
    find_pages_ref(*inputs[0])
    exact = case.tables.page_lse
    by_program = searched(case.tables, case.finders, case.rows, 1)
    program_lse = moved(torch.full_like(by_program, torch.nan), DEVICE)
    find_pages(*inputs[1], program_lse=program_lse)
    largest_error("a program's log-sum-exp", program_lse, by_program, 0.05, 1e-4)
    return largest_error("a log-sum-exp", on.tables.page_lse, exact, 0.05, 1e-4)


def check_exchange_pages() -> float:
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    case = make_exchange_case(4, 128, torch.bfloat16, generator)
    on = moved(case, DEVICE)
    host_pages = case.host_pages.pin_memory() if ON_GPU else case.host_pages
    program_lse = moved(searched(case.tables, case.finders, case.rows, 1), DEVICE)
    of_kernel = partial(exchange_pages, program_lse=program_lse)
    for one, run in ((case, exchange_pages_ref), (on, of_kernel)):
        run(
            one.pages, host_pages, one.tables, one.finders, one.rows, 1, EXCHANGE_PROTECTED,
            one.counters,
        )  # fmt: skip
    assert_equal("positions", on.tables.positions, case.tables.positions)
    assert_equal("pages", on.pages, case.pages)
    return largest_error("a score", on.tables.scores, case.tables.scores, 1e-6, 1e-5)


def in_blocks(check: Callable[[], float]) -> float:
    """A check, with kernels that look at some of a prompt's pages at a time."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        retrieval_case.look_at_blocks(monkeypatch, 64)
        return check()


def random_head_lse() -> torch.Tensor:
    """Eighths, as those of the case's pages."""
    heads = retrieval_case.KV_HEADS
    shape = (retrieval_case.LAYERS, (len(SLOTS) + 2) * heads, retrieval_case.GROUP)
    return torch.randint(4, 30, shape) / 8


def check_drift_check() -> float:
    case, head_lse = retrieval_case.make_case(PAGE_COUNTS, CPU), random_head_lse()
    slots = retrieval_case.int32(SLOTS, CPU)
    waves_left, counters = case.waves_left(1), drift_counters(CPU)
    rule = DriftRule(0.7, 2)
    on = [moved(x, DEVICE) for x in (case, slots, head_lse, waves_left, counters)]
    for run, (one, rows, lse, dirt, counts) in (
        (drift_check, on), (drift_check_ref, [case, slots, head_lse, waves_left, counters]),
    ):  # fmt: skip
        run(one.tables, one.maps, rows, lse, rule, max(PAGE_COUNTS), dirt, counts)
    assert_equal("waves_left", on[3], waves_left)
    assert_equal("a counter", on[4], counters)
    actual = on[0].tables
    assert_equal("a reference set", actual.is_reference, case.tables.is_reference)
    return largest_error("a score", actual.scores, case.tables.scores, 1e-6, 0)


def check_retrieval_moves() -> float:
    case = retrieval_case.make_case(PAGE_COUNTS, CPU)
    listed = []
    for run, device in ((retrieval_moves, DEVICE), (retrieval_moves_ref, CPU)):
        on = moved(case, device)
        listed.append(retrieval_case.moves_in_use(_list_moves(run, on, device)))
        for name, before in case.tables._asdict().items():
            if torch.is_tensor(before):
                assert_equal(name, getattr(on.tables, name), before)
    assert listed[0] and listed[0] == listed[1], "the moves are not the reference's"
    return 0.0


def _list_moves(run: Callable[..., None], case: retrieval_case.Case, device: torch.device) -> Moves:
    """As `run` lists the moves of all satellites; moves that are not in use hold poison."""
    moves = Moves.allocate(300, CPU)
    for field in moves:
        field.fill_(retrieval_case.POISON)
    moves = moved(moves, device)
    size = retrieval_moves_workspace(len(SLOTS), retrieval_case.NUM_SATELLITES)
    run(
        case.tables, case.maps, retrieval_case.int32(SLOTS, device), case.waves_left(),
        case.spares(SLOTS, 5), moves, drift_counters(device), PROTECTED,
        retrieval_case.rotations(SLOTS, 2, device), max(PAGE_COUNTS),
        moved(torch.full((size,), retrieval_case.POISON, dtype=torch.int32), device),
    )  # fmt: skip
    return moves


def check_flip_pages() -> float:
    case = retrieval_case.make_case(PAGE_COUNTS, CPU)
    moves = _list_moves(retrieval_moves_ref, case, CPU)
    slots = retrieval_case.int32([2, -1, -1, 1], CPU)  # one request has left
    on = moved(case, DEVICE)
    flip_pages(on.tables, moved(moves, DEVICE), moved(slots, DEVICE))
    flip_pages_ref(case.tables, moves, slots)
    for name in ("entries", "positions", "is_resident"):
        assert_equal(name, getattr(on.tables, name), getattr(case.tables, name))
    return 0.0


def check_kept_launches() -> float:
    """Checks and their retrievals by launches that are made once. From the second time on a launch
    takes a shorter way to the GPU, and reads what its tensors hold by then."""
    case, head_lse = retrieval_case.make_case(PAGE_COUNTS, CPU), random_head_lse()
    slots, waves_left = retrieval_case.int32(SLOTS, CPU), case.waves_left(1)
    spares, rotations = case.spares(SLOTS, 5), retrieval_case.rotations(SLOTS, 2, CPU)
    moves, counters, rule = Moves.allocate(300, CPU), drift_counters(CPU), DriftRule(0.7, 4)
    of_rows = slots, waves_left, spares, rotations, head_lse
    on = [moved(x, DEVICE) for x in (case, moves, counters, *of_rows)]
    there, there_moves, there_counters, *there_of_rows = on
    there_slots, there_waves, there_spares, there_rotations, there_lse = there_of_rows
    size = retrieval_moves_workspace(len(SLOTS), retrieval_case.NUM_SATELLITES)
    workspace = moved(torch.zeros(size, dtype=torch.int32), DEVICE)
    longest = max(PAGE_COUNTS)
    check = drift_check_launch(
        there.tables, there.maps, there_slots, there_lse, rule, longest, there_waves, there_counters
    )
    list_moves = retrieval_moves_launches(
        there.tables, there.maps, there_slots, there_waves, there_spares, there_moves,
        there_counters, PROTECTED, there_rotations, longest, workspace,
    )  # fmt: skip
    flip = flip_pages_launch(there.tables, there_moves, there_slots)
    for num_rows in (len(SLOTS), len(SLOTS) - 1, len(SLOTS)):
        for one, other in zip(of_rows, there_of_rows, strict=True):
            other.copy_(one)
        rows = slots[:num_rows]
        drift_check_ref(case.tables, case.maps, rows, head_lse, rule, longest, waves_left, counters)
        check(num_rows, retrieval_case.NUM_PIVOTS)
        assert_equal("waves_left", there_waves, waves_left)
        there.tables.scores.copy_(case.tables.scores)  # those of the GPU are rounded otherwise
        retrieval_moves_ref(
            case.tables, case.maps, rows, waves_left, spares[:num_rows], moves, counters,
            PROTECTED, rotations[:num_rows], longest,
        )  # fmt: skip
        list_moves(num_rows)
        listed = [retrieval_case.moves_in_use(m) for m in (there_moves, moves)]
        assert listed[0] and listed[0] == listed[1], "the moves are not the reference's"
        flip_pages_ref(case.tables, moves, slots)
        flip()
        for name in ("entries", "positions", "is_resident", "is_reference"):
            assert_equal(name, getattr(there.tables, name), getattr(case.tables, name))
        assert_equal("a counter", there_counters, counters)
        rotations += 1
        head_lse.copy_(random_head_lse())
    return 0.0


def all_checks() -> Iterator[tuple[str, Callable[[], float]]]:
    """Names, and functions that return the largest error or raise AssertionError."""
    for stand_ins in (None, decode_cases.MEANS, decode_cases.MATCHED):
        suffix = f", {stand_ins}" if stand_ins else ""
        if stand_ins != decode_cases.MATCHED:
            yield (
                f"split_decode{suffix}",
                lambda stand_ins=stand_ins: check_split_decode(stand_ins),
            )
        for merge in ("two launches", "fused merge"):
            for scores in ("scores", "no scores"):
                variant = merge == "fused merge", scores == "scores", stand_ins
                yield (
                    f"paged_decode, {merge}, {scores}{suffix}",
                    lambda variant=variant: check_paged_decode(*variant),
                )
    for merge in ("two launches", "fused merge"):
        yield (
            f"paged_decode, {merge}, scores, matched, late heads",
            lambda fused=merge == "fused merge": check_paged_decode(
                fused, True, decode_cases.MATCHED, late_heads=LATE_HEADS
            ),
        )
    for max_queries in (2, 5, 8):
        yield (
            f"paged_decode, {max_queries} queries",
            lambda max_queries=max_queries: check_drafts(max_queries),
        )
    for logits, kind in LOGITS.items():
        for merge in ("two launches", "fused merge"):
            yield (
                f"paged_decode, {merge}, scores, matched, {logits}",
                lambda fused=merge == "fused merge", kind=kind: check_paged_decode(
                    fused, True, decode_cases.MATCHED, **kind
                ),
            )
        yield f"page_scores, {logits}", lambda kind=kind: check_page_scores(**kind)
        yield f"evicted_attention, {logits}", lambda kind=kind: check_evicted_attention(**kind)
    for group, head_dim in ((32, 64), (32, 128), (64, 64), (64, 128), (64, 256)):
        yield (
            f"paged_decode, two launches, scores, group {group} of {head_dim}",
            lambda shape=(1, 1, group, head_dim): check_paged_decode(False, True, None, shape),
        )
    for dtype in FP8_ON_DEVICE:
        name = str(dtype).removeprefix("torch.")
        yield (
            f"paged_decode, two launches, scores, means, {name}",
            lambda dtype=dtype: check_paged_decode(
                False, True, decode_cases.MEANS, page_dtype=dtype
            ),
        )
        yield f"page_scores, {name}", lambda dtype=dtype: check_page_scores(dtype)
        yield f"page_means, {name}", lambda dtype=dtype: check_page_means(dtype)
        yield f"page_summaries, {name}", lambda dtype=dtype: check_page_summaries(dtype)
        yield f"step_select, {name}", lambda dtype=dtype: check_step_select(dtype)
        yield (
            f"one_bit_step_select, {name}",
            lambda dtype=dtype: check_step_select(dtype, one_bit=True),
        )
        yield f"hybrid_step_select, {name}", lambda dtype=dtype: check_hybrid_step_select(dtype)
        yield f"evicted_attention, {name}", lambda dtype=dtype: check_evicted_attention(dtype)
        yield f"quantized_keys, {name}", lambda dtype=dtype: check_quantized_keys(dtype)
    yield "page_scores", check_page_scores
    for rows in (32, 64):
        yield f"page_scores, {rows} rows", lambda rows=rows: check_page_scores(group=rows)
    yield "page_select", check_page_select
    for where in ("pool", "pinned", "counted"):
        yield f"page_gather, {where}", lambda where=where: check_page_gather(where)
    yield "page_means", check_page_means
    yield "evicted_attention", check_evicted_attention
    yield "bounded_least_squares", check_bounded_least_squares
    yield "page_summaries", check_page_summaries
    yield "step_select", check_step_select
    yield "one_bit_step_select", lambda: check_step_select(one_bit=True)
    yield "hybrid_step_select", check_hybrid_step_select
    yield "hybrid_step_select, few channels", lambda: check_hybrid_step_select(share=0.3)
    yield "quantized_keys", check_quantized_keys
    yield "exchange_pages", check_exchange_pages
    yield "quantized_keys, soft cap", lambda: check_quantized_keys(soft_cap=1.5)
    yield "drift_check", check_drift_check
    yield "drift_check, in blocks", lambda: in_blocks(check_drift_check)
    yield "retrieval_moves", check_retrieval_moves
    yield "retrieval_moves, in blocks", lambda: in_blocks(check_retrieval_moves)
    yield "flip_pages", check_flip_pages
    yield "kept_launch", check_kept_launches
