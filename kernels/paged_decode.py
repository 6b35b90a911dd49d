"""Decode attention over per-head page lists (specification: README.md and paged_decode_ref.py).

A *segment* is all that one (KV head, row) reads: its listed pages, its stand-in pages if it has
any, then the live tail of the row's block table. The segments of a layer, laid end to end, head
after head, make one flat list of pages. It is cut into equal shares, one for each program, wherever
the segments begin and end, so that heads of very unequal lengths keep every SM equally busy:

    segment      0            1    2       3
    pages   |............|....|.|..........|
    program |  0   |   1   |   2   |   3   |      `share` pages each

A program that holds a whole segment writes its output. Otherwise it leaves a partial softmax in
the workspace. A second launch merges the partials, or the last program of the segment does
(`tuning.paged_decode_launch` says which). A program has at most two partials: one of a segment that
began before its share and one of a segment that goes on behind it. The kernels themselves are in
paged_decode_kernels.py and paged_merge_kernels.py.

`exchange_pages` changes pages of a layer's late heads (`tables.HeadOrder`). A launch for such a
layer begins before that kernel ends, and has two phases: programs share the segments of the other
heads, then wait for `exchange_pages`, then share those of the late heads. A phase has partials of
its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from vllm_heterocache.kernels import tuning
from vllm_heterocache.kernels.dependent_launch import has_dependent_launch
from vllm_heterocache.kernels.dot_types import DOT_TYPES, decode_dot_type
from vllm_heterocache.kernels.kv_scales import KVScales, check_scales
from vllm_heterocache.kernels.paged_decode_kernels import decode_kernel, split_kernel
from vllm_heterocache.kernels.paged_decode_ref import LOG2_E
from vllm_heterocache.kernels.paged_merge_kernels import merge_kernel
from vllm_heterocache.kernels.tables import DecodeRows, HeadOrder, PageTables
from vllm_heterocache.kernels.values import PAGE_SIZE

MIN_DOT = 8  # query vectors of a segment are padded to at least these many rows of a tile
SPLIT_SEGMENTS = 1024  # a block of the prefix sum
FIND_SEGMENTS = 256  # a block of the search for a program's first segment
MERGE_PARTIALS = 64
MERGE_DIM = 32


@dataclass(frozen=True)
class DecodeWorkspace:
    """Everything the launches need besides inputs and outputs, at addresses that never change."""

    num_programs: int
    first_page: torch.Tensor  # [num_layers, max_rows * H + 1] int32, prefix sum of segment pages
    partial_out: torch.Tensor  # [phases, 2 * num_programs, Q * G, D] fp32
    partial_lse: torch.Tensor  # [phases, 2 * num_programs, Q * G] fp32, base 2
    finished: torch.Tensor  # [max_rows * H] int32, partials of a segment; 0 between launches
    head_lse: torch.Tensor  # [num_layers, max_rows * H, G] fp32, base 2, of heads that were due
    order: HeadOrder | None = None  # None: no head is late

    @classmethod
    def allocate(
        cls,
        max_rows: int,
        num_layers: int,
        num_kv_heads: int,
        group: int,
        head_dim: int,
        device: torch.device,
        num_programs: int | None = None,
        max_queries: int = 1,
        is_fp8: bool = False,
        late_heads: Sequence[int] = (),
    ) -> DecodeWorkspace:
        """Take the memory for batches of up to `max_rows` rows of up to `max_queries` queries.

        Args:
            num_programs: programs of the launch; by default as many as the tuned launch keeps
                resident on the device.
            is_fp8: whether the pages are.
            late_heads: flat heads l * H + h whose pages come while their layer is decoded.
        """
        phases = 2 if late_heads else 1
        segments = max_rows * num_kv_heads
        if num_programs is None:
            sms = torch.cuda.get_device_properties(device).multi_processor_count
            launch = tuning.paged_decode_launch(head_dim, segments, group, max_queries, is_fp8)
            num_programs = sms * launch.programs_per_sm

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            num_programs,
            zeros(num_layers, segments + 1, dtype=torch.int32),
            zeros(phases, 2 * num_programs, max_queries * group, head_dim, dtype=torch.float32),
            zeros(phases, 2 * num_programs, max_queries * group, dtype=torch.float32),
            zeros(segments, dtype=torch.int32),
            zeros(num_layers, segments, group, dtype=torch.float32),
            HeadOrder.of(late_heads, num_layers, num_kv_heads, device) if late_heads else None,
        )

    @property
    def head_order(self) -> torch.Tensor | None:
        """[num_layers, H] int32; None where heads come as they are numbered."""
        return None if self.order is None else self.order.heads

    def num_late(self, layer: int) -> int:
        """Heads of the layer that come last."""
        return 0 if self.order is None else self.order.num_late[layer]


def split_decode(tables: PageTables, rows: DecodeRows, workspace: DecodeWorkspace) -> None:
    """Lay out the work of all layers: once a step, before the first `paged_decode` of the step."""
    num_rows = rows.seq_lens.shape[0]
    _, num_layers, num_kv_heads = tables.count.shape
    num_segments = num_rows * num_kv_heads
    assert tables.start.shape == tables.count.shape and tables.count.is_contiguous()
    if tables.has_stand_ins:
        assert tables.stand_in_pages.shape == tables.count.shape
        assert tables.stand_in_pages.is_contiguous()
    assert rows.row_to_table_slot.shape == rows.seq_lens.shape
    assert num_segments < workspace.first_page.shape[1]
    assert workspace.first_page.shape[0] == num_layers
    split_kernel[(num_layers,)](
        tables.count,
        tables.stand_in_pages,
        tables.prompt_pages,
        rows.row_to_table_slot,
        rows.seq_lens,
        workspace.head_order,
        workspace.first_page,
        workspace.first_page.stride(0),
        num_rows,
        NUM_LAYERS=num_layers,
        NUM_KV_HEADS=num_kv_heads,
        PAGE_SIZE=PAGE_SIZE,
        BLOCK_SEGMENTS=SPLIT_SEGMENTS,
        WITH_STAND_INS=tables.has_stand_ins,
        num_warps=4,
    )


def paged_decode(
    query: torch.Tensor,
    pages: torch.Tensor,
    tables: PageTables,
    rows: DecodeRows,
    workspace: DecodeWorkspace,
    layer: int,
    scale: float,
    output: torch.Tensor,
    last_queries: torch.Tensor,
    pivot_of_head: torch.Tensor | None = None,
    launch: tuning.PagedDecodeLaunch | None = None,
    kv_scales: KVScales | None = None,
    sink_logits: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> None:
    """Decode attention in which each KV head reads only its own pages and the live tail.

    `split_decode` must have run for these tables and rows. Nothing is allocated and nothing waits
    for the device; shapes alone decide the grid. Head geometry, dtypes, whether `pivot_of_head` is
    given, whether the tables have stand-in pages and biases, whether there are sinks or a soft cap,
    most queries of a row, and whether the merge is fused decide which variant is compiled. The
    layer does not but for its late heads, nor does the batch size but for
    `tuning.paged_decode_launch`.

    The launch of a layer with late heads must be the next one after that of `exchange_pages`.

    By-products, base 2, of scaled logits, for the leading pivots of rows that are due: the
    log-sum-exp of every listed page at the page's place in `tables.page_lse`, and that of all the
    head read at `workspace.head_lse[layer, row * H + head]`. Nothing else in these is written.

    Args:
        query: [at least the rows' queries, num_q_heads, head_dim], row after row.
        pages: [num_pages, page_size, 2 * head_dim], K then V.
        layer: index of this layer, 0 <= layer < num_layers.
        scale: softmax scale.
        output: as `query`, written; rows of one query that have no tokens become zeros, and what
            lies behind the rows' queries stays.
        last_queries: [num_places, num_layers, num_q_heads, head_dim]; a query of a row with
            tokens whose `query_place` is >= 0 is stored at [query_place, layer].
        pivot_of_head: [num_layers, H] int32 on the device, index of the leading pivot, -1 for
            other heads. None: no head of this layer leads.
        launch: launch settings other than those of `tuning.paged_decode_launch`.
        kv_scales: of fp8 pages. Queries and weights have 16 bits all the same, which is more exact
            than stock vLLM's fp8 queries.
        sink_logits: [num_layers, num_q_heads], any float dtype, contiguous: one more logit of each
            head, which takes weight and has no value. It counts in `head_lse`.
        soft_cap: of the logits (soft_cap_ref.py); 0: none.
    """
    num_rows, max_queries = rows.seq_lens.shape[0], rows.max_queries
    _, num_q_heads, head_dim = query.shape
    _, num_layers, num_kv_heads = tables.count.shape
    group = num_q_heads // num_kv_heads
    num_vectors = max_queries * group
    num_segments = num_rows * num_kv_heads
    launch = launch or tuning.paged_decode_launch(
        head_dim, num_segments, group, max_queries, kv_scales is not None
    )
    assert output.shape == query.shape and output.dtype == query.dtype
    assert kv_scales is not None or query.dtype == pages.dtype
    check_scales(pages, kv_scales, tables.count.shape[1:])
    assert pages.shape[1:] == (PAGE_SIZE, 2 * head_dim) and pages.is_contiguous()
    assert num_q_heads % num_kv_heads == 0 and num_vectors <= tuning.MAX_VECTORS
    assert query.stride()[1:] == output.stride()[1:] == (head_dim, 1)
    assert rows.block_table.stride(1) == 1 and rows.block_table.shape[0] == num_rows
    assert rows.row_to_table_slot.shape == rows.seq_lens.shape == rows.is_due.shape
    if rows.query_start is None:
        assert max_queries == 1 and query.shape[0] == rows.query_place.shape[0] == num_rows
    else:
        assert 1 < max_queries <= tuning.MAX_QUERIES and not launch.fused_merge
        assert rows.query_start.shape == (num_rows + 1,)
        assert rows.query_place.shape[0] >= query.shape[0]
    assert tables.start.is_contiguous() and tables.count.is_contiguous()
    if tables.token_bias is not None:
        assert tables.has_stand_ins and tables.bias_start is not None
        assert tables.bias_start.shape == tables.count.shape and tables.bias_start.is_contiguous()
        assert tables.token_bias.shape[1:] == (PAGE_SIZE,) and tables.token_bias.is_contiguous()
    assert last_queries.shape[1:] == (num_layers, num_q_heads, head_dim)
    assert last_queries.is_contiguous()
    if sink_logits is not None:
        assert sink_logits.shape == (num_layers, num_q_heads) and sink_logits.is_contiguous()
    num_late = workspace.num_late(layer)
    num_phases = 2 if num_late else 1
    assert workspace.partial_out.shape[1:] == (2 * workspace.num_programs, num_vectors, head_dim)
    assert num_phases <= workspace.partial_out.shape[0]
    assert num_segments < workspace.first_page.shape[1] and 0 <= layer < num_layers
    assert launch.tile_tokens % PAGE_SIZE == 0
    if pivot_of_head is not None:
        assert pivot_of_head.shape == (num_layers, num_kv_heads) and pivot_of_head.is_contiguous()
        assert tables.page_lse.shape[1:] == (group,) and tables.page_lse.is_contiguous()
    block_heads = triton.next_power_of_2(group)
    is_dependent = num_late > 0 and has_dependent_launch()
    decode_kernel[(workspace.num_programs,)](
        query,
        pages,
        None if kv_scales is None else kv_scales.key,
        None if kv_scales is None else kv_scales.value,
        sink_logits,
        tables.entries,
        tables.start,
        tables.count,
        tables.stand_in_pages,
        tables.bias_start,
        tables.token_bias,
        tables.prompt_pages,
        tables.first_stripe,
        rows.row_to_table_slot,
        rows.block_table,
        rows.seq_lens,
        rows.query_start,
        rows.query_place,
        rows.is_due,
        rows.query_place if pivot_of_head is None else pivot_of_head,
        workspace.head_order,
        workspace.first_page,
        workspace.partial_out,
        workspace.partial_lse,
        workspace.finished,
        workspace.head_lse,
        tables.page_lse,
        last_queries,
        output,
        workspace.first_page.stride(0),
        workspace.head_lse.stride(0),
        query.stride(0),
        output.stride(0),
        rows.block_table.stride(0),
        tables.pivot_width,
        layer,
        num_rows,
        num_late,
        scale * LOG2_E,
        soft_cap * LOG2_E if soft_cap else None,
        NUM_LAYERS=num_layers,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=PAGE_SIZE,
        QUERIES=max_queries,
        BLOCK_SEGMENTS=FIND_SEGMENTS,
        BLOCK_VECTORS=max(MIN_DOT, triton.next_power_of_2(num_vectors)),
        BLOCK_TOKENS=launch.tile_tokens,
        BLOCK_HEADS=block_heads,
        BLOCK_PARTIALS=max(1, tuning.FUSED_ELEMENTS // (block_heads * head_dim)),
        WITH_SCORES=pivot_of_head is not None,
        WITH_STAND_INS=tables.has_stand_ins,
        FUSED_MERGE=launch.fused_merge,
        NUM_PHASES=num_phases,
        IS_DEPENDENT=is_dependent,
        DOT_TYPE=decode_dot_type(query.dtype, pages.dtype),
        SCORE_TYPE=DOT_TYPES[torch.bfloat16],
        launch_pdl=is_dependent,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    if launch.fused_merge:
        return
    merge_kernel[(num_segments * num_vectors, head_dim // MERGE_DIM)](
        workspace.first_page,
        rows.query_start,
        rows.is_due,
        rows.query_place if pivot_of_head is None else pivot_of_head,
        workspace.head_order,
        workspace.partial_out,
        workspace.partial_lse,
        workspace.head_lse,
        output,
        workspace.first_page.stride(0),
        workspace.head_lse.stride(0),
        output.stride(0),
        layer,
        num_rows,
        num_late,
        workspace.num_programs,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        QUERIES=max_queries,
        TILE_PAGES=launch.tile_tokens // PAGE_SIZE,
        BLOCK_PARTIALS=MERGE_PARTIALS,
        BLOCK_DIM=MERGE_DIM,
        WITH_SCORES=pivot_of_head is not None,
        num_warps=4,
    )
