"""What the compiler made of each Triton kernel at the serving shape (see check.py).

The kernels are launched as they are when serving Llama-3.1-8B, but with nothing to do: shapes,
dtypes and launch settings choose the compiled variant, not the numbers in the tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from common.rows import print_table
from common.tables import tables_for
from vllm_heterocache.kernels import (
    bounded_least_squares,
    drift_check,
    evicted_attention,
    exchange_pages,
    find_pages,
    flip_pages,
    hybrid_step_select,
    one_bit_step_select,
    page_gather,
    page_means,
    page_scores,
    page_select,
    page_summaries,
    paged_decode_kernels,
    paged_merge_kernels,
    quantized_keys,
    retrieval_moves_kernels,
    step_select,
    tuning,
)
from vllm_heterocache.kernels.kv_scales import KVScales
from vllm_heterocache.kernels.paged_decode import DecodeWorkspace, paged_decode, split_decode
from vllm_heterocache.kernels.retrieval_moves import retrieval_moves, retrieval_moves_workspace
from vllm_heterocache.kernels.tables import (
    DecodeRows,
    FinderTables,
    HeadMaps,
    Moves,
    PageTables,
    StepTables,
    drift_counters,
    first_finders,
)
from vllm_heterocache.kernels.values import DriftRule, Protected

L, H, G, D, PAGE = 32, 8, 4, 128, 16
NUM_PIVOTS = 33
E4M3_CAPABILITY = (8, 9)  # Triton converts fp8 pages from it on
PROMPT_PAGES = [4096, 16384, 131072]  # prompts of up to 64K, 256K and 2M tokens
KERNELS = [
    paged_decode_kernels.split_kernel,
    paged_decode_kernels.decode_kernel,
    paged_merge_kernels.merge_kernel,
    page_scores._page_lse_kernel,
    page_scores._share_kernel,
    page_select._page_select_kernel,
    page_gather._page_gather_kernel,
    page_means._page_means_kernel,
    evicted_attention._attention_kernel,
    evicted_attention._importance_kernel,
    bounded_least_squares._bounded_least_squares_kernel,
    page_summaries._page_summaries_kernel,
    step_select._keys_kernel,
    step_select._choose_kernel,
    one_bit_step_select._one_bit_keys_kernel,
    hybrid_step_select._approximate_attention_kernel,
    hybrid_step_select._permute_kernel,
    drift_check._drift_check_kernel,
    retrieval_moves_kernels.count_kernel,
    retrieval_moves_kernels.share_kernel,
    retrieval_moves_kernels.choose_kernel,
    flip_pages._flip_pages_kernel,
    quantized_keys._quantized_keys_kernel,
    find_pages._find_pages_kernel,
    exchange_pages._exchange_pages_kernel,
]


class Row(NamedTuple):
    """A compiled kernel."""

    name: str
    variant: str
    num_warps: int
    registers: int  # of a thread
    local_bytes: int  # of a thread: spilled registers
    shared_bytes: int  # of a program
    programs_per_sm: int
    occupancy: float  # resident warps, of those that an SM can hold


HEADS = ["kernel", "variant", "warps", "registers", "spilled B", "shared B", "programs/SM"]
HEADS += ["occupancy"]


def print_profile() -> None:
    print_table(HEADS, [[*fields, f"{occupancy:.0%}"] for *fields, occupancy in rows()])


def rows() -> Iterator[Row]:
    """Every kernel that a call compiles and no earlier one did."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.set_default_device(device)
    has_e4m3 = torch.cuda.get_device_capability(device) >= E4M3_CAPABILITY
    for name, variant, kernel in new_kernels(launches(device, None, has_e4m3), device.index):
        torch.cuda.synchronize()
        yield describe(name, variant, kernel, device)


def new_kernels(
    calls: Iterable[tuple[str, Callable[[], None]]], device_index: int
) -> Iterator[tuple[str, str, Any]]:
    """Name, variant and compiled kernel, where a call compiles what no earlier one did."""
    seen: set[int] = set()
    for variant, call in calls:
        call()
        for function in KERNELS:
            for kernel in function.device_caches[device_index][0].values():
                if id(kernel) not in seen:
                    seen.add(id(kernel))
                    yield function.__name__.strip("_"), variant, kernel


def describe(name: str, variant: str, kernel: Any, device: torch.device) -> Row:
    num_warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    num_programs = resident_programs(kernel.function, 32 * num_warps, shared)
    max_warps = torch.cuda.get_device_properties(device).max_threads_per_multi_processor // 32
    # Triton calls the words of local memory spills
    return Row(
        name, variant, num_warps, kernel.n_regs, 4 * kernel.n_spills, shared, num_programs,
        num_programs * num_warps / max_warps,
    )  # fmt: skip


def resident_programs(function: int, num_threads: int, shared_bytes: int) -> int:
    """Programs of a loaded CUDA function that one SM holds at a time, as the driver says."""
    number = ctypes.c_int()
    status = ctypes.CDLL("libcuda.so.1").cuOccupancyMaxActiveBlocksPerMultiprocessor(
        ctypes.byref(number),
        ctypes.c_void_p(function),
        ctypes.c_int(num_threads),
        ctypes.c_size_t(shared_bytes),
    )
    if status:
        raise RuntimeError(f"cuOccupancyMaxActiveBlocksPerMultiprocessor failed with {status}")
    return number.value


def launches(
    device: torch.device, num_programs: int | None = None, has_e4m3: bool = True
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Variants, and calls that compile what is new in each.

    Args:
        has_e4m3: whether Triton converts fp8 pages on this GPU.
    """
    tables, maps = idle_tables(), idle_maps()
    pages = torch.zeros(2 * L * H, PAGE, 2 * D, dtype=torch.bfloat16)
    workspace = DecodeWorkspace.allocate(1, L, H, G, D, device, num_programs)
    yield from decode_launches(tables, pages, workspace)
    yield from decode_launches(tables._replace(has_stand_ins=True), pages, workspace)
    yield from decode_launches(with_biases(tables), pages, workspace)
    yield from late_launches(with_biases(tables), pages, num_programs)
    yield from logit_launches(with_biases(tables), pages)
    yield from wide_launches(tables, num_programs)
    yield from draft_launches(tables._replace(has_stand_ins=True), pages, num_programs)
    yield from prompt_launches(tables, maps, pages)
    yield from match_launches(pages)
    yield from retrieval_launches(tables, maps, workspace.head_lse)
    yield from step_launches(tables, pages)
    if has_e4m3:
        yield from fp8_launches(tables, pages.to(torch.float8_e4m3fn), workspace)


def fp8_launches(
    tables: PageTables, pages: torch.Tensor, workspace: DecodeWorkspace
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Of the kernels that look into pages."""
    scales = KVScales(torch.ones(L, H), torch.ones(L, H), torch.ones(L, H))
    with_means = tables._replace(has_stand_ins=True)
    yield from decode_launches(with_means, pages, workspace, scales)
    yield "fp8", score_launch(pages, scales)
    yield "fp8", partial(page_means.page_means, pages, tables, 0, ints(0))
    for _, launch in step_launches(tables, pages, scales):
        yield "fp8", launch


def step_launches(
    tables: PageTables, pages: torch.Tensor, kv_scales: KVScales | None = None
) -> Iterator[tuple[str, Callable[[], None]]]:
    query = torch.zeros(1, H * G, D, dtype=torch.bfloat16)
    bits = torch.zeros(2 * L * H, PAGE // 8 * D, dtype=torch.uint8)
    step = StepTables(pages.new_zeros(2 * L * H, 2, D), ints(*[0] * 4 * H), 2 * H, bits)
    rows = DecodeRows(ints(0), ints(0).view(1, 1), ints(0), ints(-1), ints(0))
    yield "", partial(page_summaries.page_summaries, pages, ints(0), L * H, step.summaries)
    chosen = query, tables, step, rows, 0, Protected(1, 3)
    yield "", partial(step_select.step_select, *chosen)
    yield "", partial(one_bit_step_select.one_bit_step_select, *chosen)
    idle = tables._replace(idle_pages=torch.zeros_like(tables.count))
    for share, variant in ((1.0, ""), (0.5, "few channels")):
        yield variant, partial(
            hybrid_step_select.hybrid_step_select, query, idle, step, rows, 0, 1.0,
            Protected(1, 3), share, kv_scales,
        )  # fmt: skip
    grids = torch.zeros(2, 2, D, dtype=torch.bfloat16)
    codes = torch.zeros(2, 2, D, dtype=torch.int16)
    finders = FinderTables(codes, grids, 1, ints(0), ints(0), first_finders([0], L, H))
    yield "", partial(quantized_keys.quantized_keys, pages, tables, finders, 0, ints(0))
    counters = drift_counters("cpu")
    program_lse = torch.zeros(find_pages.find_pages_workspace(1, finders, G))
    yield "", partial(
        exchange_pages.exchange_pages, pages, pages, tables, finders, rows, 0, Protected(1, 3),
        counters, program_lse=program_lse,
    )  # fmt: skip
    for soft_cap, variant in ((0.0, ""), (30.0, "cap")):
        search = partial(find_pages.find_pages, query, tables, finders, rows, 0, 1.0)
        yield variant, partial(search, kv_scales, soft_cap, program_lse=program_lse)


def decode_launches(
    tables: PageTables,
    pages: torch.Tensor,
    workspace: DecodeWorkspace,
    kv_scales: KVScales | None = None,
) -> Iterator[tuple[str, Callable[[], None]]]:
    query = torch.zeros(1, H * G, D, dtype=torch.bfloat16)
    last_queries = torch.zeros(1, L, H * G, D, dtype=torch.bfloat16)
    rows = DecodeRows(ints(0), ints(0).view(1, 1), ints(0), ints(-1), ints(0))
    kind = ", means" if tables.has_stand_ins else ""
    kind = kind if tables.token_bias is None else ", matched"
    kind += "" if kv_scales is None else ", fp8"
    if tables.token_bias is None:
        yield kind.strip(", "), partial(split_decode, tables, rows, workspace)
    decode = partial(
        paged_decode, query, pages, tables, rows, workspace, 0, 1.0, query.clone(), last_queries,
        kv_scales=kv_scales,
    )  # fmt: skip
    nobody = torch.full((L, H), -1, dtype=torch.int32)
    tuned = tuning.paged_decode_launch(D, 1, G, is_fp8=kv_scales is not None)
    for fused in (False, True):
        launch = tuned._replace(fused_merge=fused)
        merge = "fused merge" if fused else "two launches"
        yield f"{merge}, no scores{kind}", partial(decode, None, launch)
        yield f"{merge}, scores{kind}", partial(decode, nobody, launch)


def late_launches(
    tables: PageTables, pages: torch.Tensor, num_programs: int | None
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Of a layer with a finder."""
    workspace = DecodeWorkspace.allocate(1, L, H, G, D, pages.device, num_programs, late_heads=[0])
    for variant, launch in decode_launches(tables, pages, workspace):
        yield f"{variant}, late heads", launch


def logit_launches(
    tables: PageTables, pages: torch.Tensor
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Of a model whose heads have sinks and whose logits have a soft cap."""
    device = pages.device
    workspace = DecodeWorkspace.allocate(1, L, H, G, D, device, num_programs=1)
    query = torch.zeros(1, H * G, D, dtype=torch.bfloat16)
    last_queries = torch.zeros(1, L, H * G, D, dtype=torch.bfloat16)
    rows = DecodeRows(ints(0), ints(0).view(1, 1), ints(0), ints(-1), ints(0))
    nobody = torch.full((L, H), -1, dtype=torch.int32)
    logits = {"sink_logits": torch.zeros(L, H * G, dtype=torch.bfloat16), "soft_cap": 50.0}
    decode = partial(
        paged_decode, query, pages, tables, rows, workspace, 0, 1.0, query.clone(), last_queries,
        nobody, **logits,
    )  # fmt: skip
    yield "two launches, scores, matched, sinks, cap", decode
    yield "sinks, cap", score_launch(pages, **logits)


def wide_launches(
    tables: PageTables, num_programs: int | None
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Of heads of all sizes, each with as many query heads as the tile has rows."""
    device, group = torch.get_default_device(), tuning.MAX_VECTORS
    rows = DecodeRows(ints(0), ints(0).view(1, 1), ints(0), ints(-1), ints(0))
    nobody = torch.full((L, H), -1, dtype=torch.int32)
    tables = tables._replace(page_lse=torch.zeros(1, group))
    for head_dim in tuning.PAGED_DECODE:
        workspace = DecodeWorkspace.allocate(1, L, H, group, head_dim, device, num_programs)
        pages = torch.zeros(2 * L * H, PAGE, 2 * head_dim, dtype=torch.bfloat16)
        query = torch.zeros(1, H * group, head_dim, dtype=torch.bfloat16)
        last_queries = torch.zeros(1, L, H * group, head_dim, dtype=torch.bfloat16)
        yield (
            f"group {group} of {head_dim}",
            partial(
                paged_decode, query, pages, tables, rows, workspace, 0, 1.0, query.clone(),
                last_queries, nobody,
            ),
        )  # fmt: skip


def draft_launches(
    tables: PageTables, pages: torch.Tensor, num_programs: int | None
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Rows that verify drafts."""
    last_queries = torch.zeros(1, L, H * G, D, dtype=torch.bfloat16)
    for max_queries in (2, 5, tuning.MAX_QUERIES):
        workspace = DecodeWorkspace.allocate(
            1, L, H, G, D, pages.device, num_programs, max_queries=max_queries
        )
        rows = DecodeRows(
            ints(0), ints(0).view(1, 1), ints(0), ints(*[-1] * max_queries), ints(0), ints(0, 0),
            max_queries,
        )  # fmt: skip
        query = torch.zeros(max_queries, H * G, D, dtype=torch.bfloat16)
        decode = partial(
            paged_decode, query, pages, tables, rows, workspace, 0, 1.0, query.clone(), last_queries
        )
        nobody = torch.full((L, H), -1, dtype=torch.int32)
        yield f"{max_queries} queries, no scores, means", partial(decode, None)
        yield f"{max_queries} queries, scores, means", partial(decode, nobody)


def prompt_launches(
    tables: PageTables, maps: HeadMaps, pages: torch.Tensor
) -> Iterator[tuple[str, Callable[[], None]]]:
    scores = torch.zeros(L, H, 1)
    yield "", score_launch(pages)
    yield "8 queries", score_launch(pages, count=8)
    pages_of = scores, tables, maps, 0, ints(0)
    yield "", partial(page_select.page_select, *pages_of, Protected(1, 3), ints(0))
    yield "", partial(page_means.page_means, pages, tables, 0, ints(0))
    gather = partial(page_gather.page_gather, pages, ints(0), pages, ints(1))
    yield "all", gather
    yield "counted", partial(gather, ints(0), 8)


def match_launches(pages: torch.Tensor) -> Iterator[tuple[str, Callable[[], None]]]:
    """What fits matched tokens: a head with 4 queries of a group and 4096 matched tokens."""
    keys, values = pages[:1].split(D, dim=2)
    nobody, queries = torch.zeros(1, PAGE, dtype=torch.bool), torch.zeros(1, G, D)
    yield "", partial(evicted_attention.evicted_attention, keys, values, nobody, queries)
    width = 4096
    of_columns = [torch.zeros(1, width) for _ in range(3)]
    problem = torch.zeros(1, G, width), torch.zeros(1, G), *of_columns, torch.zeros(1)
    yield f"{width} columns", partial(bounded_least_squares.bounded_least_squares, *problem, 0.0, 0)


def score_launch(
    pages: torch.Tensor, kv_scales: KVScales | None = None, count: int = 1, **logits: Any
) -> Callable[[], None]:
    """`count`: tokens whose queries score."""
    query = torch.zeros(L, H * count * G, D, dtype=torch.bfloat16)
    scores = torch.zeros(L, H, 1)
    space = torch.zeros(page_scores.page_scores_workspace(PAGE, H, count * G))
    inputs = query, pages, ints(0), PAGE, 1.0, scores, space
    return partial(page_scores.page_scores, *inputs, kv_scales=kv_scales, **logits)


def retrieval_launches(
    tables: PageTables, maps: HeadMaps, head_lse: torch.Tensor
) -> Iterator[tuple[str, Callable[[], None]]]:
    slots = ints(-1)
    waves_left, counters = ints(*[0] * 2 * NUM_PIVOTS).view(2, -1), drift_counters(slots.device)
    moves, spares = Moves.allocate(256, slots.device), ints(0, 0).view(1, 2)
    space = ints(*[0] * retrieval_moves_workspace(1, maps.satellite_heads.shape[0]))
    for num_pages in PROMPT_PAGES:
        check = partial(drift_check.drift_check, tables, maps, slots, head_lse)
        yield (
            f"{num_pages} pages",
            partial(check, DriftRule(0.7, 1), num_pages, waves_left, counters),
        )
        listed = partial(retrieval_moves, tables, maps, slots, waves_left, spares, moves, counters)
        yield f"{num_pages} pages", partial(listed, Protected(1, 3), ints(0), num_pages, space)
    yield "", partial(flip_pages.flip_pages, tables, moves, slots)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def idle_tables() -> PageTables:
    """Of one slot, whose lists are empty, and the dense one."""
    widths = (NUM_PIVOTS, L * H - NUM_PIVOTS, 4)
    device = torch.get_default_device()
    return tables_for(
        (2, L, H), device, num_rows=2, group=G, widths=widths,
        stand_in_pages=torch.zeros(2, L, H, dtype=torch.int32),
    )  # fmt: skip


def with_biases(tables: PageTables) -> PageTables:
    """The same for slots whose stand-in pages hold matched tokens."""
    biases = torch.zeros_like(tables.start), torch.zeros(L * H, PAGE)
    return tables._replace(
        has_stand_ins=True, bias_start=biases[0], token_bias=biases[1], bias_width=L * H
    )


def idle_maps() -> HeadMaps:
    """The first heads lead, and the first of them leads all others."""
    heads = torch.arange(L * H, dtype=torch.int32)
    is_pivot = heads < NUM_PIVOTS
    return HeadMaps(
        pivot_of_head=heads.where(is_pivot, -1).int().view(L, H),
        satellite_of_head=(heads - NUM_PIVOTS).where(~is_pivot, -1).int().view(L, H),
        pivot_heads=heads[:NUM_PIVOTS].clone(),
        satellite_heads=heads[NUM_PIVOTS:].clone(),
        leaders=torch.zeros(L * H - NUM_PIVOTS, dtype=torch.int32),
    )
