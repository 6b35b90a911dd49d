"""`paged_decode` against its reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from triton_mode import DEVICE, ON_GPU

from vllm_heterocache.kernels import tuning
from vllm_heterocache.kernels.paged_decode import (
    DecodeRows,
    DecodeWorkspace,
    PageTables,
    paged_decode,
    plan_decode,
)
from vllm_heterocache.kernels.paged_decode_ref import PageLists, paged_decode_ref

PAGE = 16
OUT_OF_RANGE = 10**9  # a page or block id far outside the pool: reading it is a fault
PROGRAMS = None if ON_GPU else 5


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(torch.seed() % 2**31)


@dataclass
class Case:
    """A decode batch whose pool holds NaN in every token that no row may read."""

    query: torch.Tensor
    pages: torch.Tensor
    tables: PageTables
    rows: DecodeRows
    layer: int

    @property
    def scale(self) -> float:
        return self.query.shape[2] ** -0.5

    def workspace(self, num_programs: int | None = PROGRAMS) -> DecodeWorkspace:
        num_rows, num_q_heads, head_dim = self.query.shape
        _, num_layers, num_kv_heads = self.tables.count.shape
        scored = int(self.tables.count.amax()) * num_rows * num_kv_heads
        group = num_q_heads // num_kv_heads
        return DecodeWorkspace.allocate(
            num_rows, num_layers, num_kv_heads, group, head_dim, scored, DEVICE, num_programs
        )

    def run(self, workspace=None, is_scored=None, scores=None, launch=None) -> torch.Tensor:
        workspace = workspace or self.workspace()
        if is_scored is None:
            is_scored = torch.zeros_like(self.tables.count[0], dtype=torch.bool)
        output = torch.full_like(self.query, torch.nan)
        plan_decode(self.tables, self.rows, is_scored, workspace)
        paged_decode(
            self.query,
            self.pages,
            self.tables,
            self.rows,
            workspace,
            self.layer,
            self.scale,
            output,
            scores,
            launch,
        )
        return output

    def live_rows(self) -> list[int]:
        return self.rows.seq_lens.nonzero().flatten().tolist()

    def lists(self, rows: list[int]) -> PageLists:
        slots = self.rows.row_to_slot[rows].long()
        tables = self.tables
        start, count = tables.start[slots, self.layer], tables.count[slots, self.layer]
        return PageLists(tables.entries, start, count, tables.prompt_pages[slots])

    def reference(self, page_scores=None) -> torch.Tensor:
        """fp32, zeros for rows without tokens."""
        live = self.live_rows()
        num_layers = self.tables.count.shape[1]
        output = torch.zeros_like(self.query, dtype=torch.float32)
        if live:
            output[live] = paged_decode_ref(
                self.query[live].float(),
                self.pages,
                self.lists(live),
                self.rows.block_table[live],
                self.rows.seq_lens[live],
                self.layer,
                num_layers,
                self.scale,
                page_scores,
            )
        return output

    def kv(self, row: int, head: int) -> torch.Tensor:
        """[num_tokens, 2 * D], what the head reads."""
        _, num_layers, num_kv_heads = self.tables.count.shape
        slot, num_tokens = int(self.rows.row_to_slot[row]), int(self.rows.seq_lens[row])
        start = int(self.tables.start[slot, self.layer, head])
        count = int(self.tables.count[slot, self.layer, head])
        tail = int(self.tables.prompt_pages[slot])
        blocks = self.rows.block_table[row, tail : -(-num_tokens // PAGE)]
        ids = (blocks * num_layers + self.layer) * num_kv_heads + head
        ids = torch.cat([self.tables.entries[start : start + count], ids]).long()
        return self.pages[ids].flatten(0, 1)[: num_tokens + (count - tail) * PAGE]

    def same_dtype(self) -> torch.Tensor:
        output = torch.zeros_like(self.query)
        num_kv_heads = self.tables.count.shape[2]
        group, head_dim = self.query.shape[1] // num_kv_heads, self.query.shape[2]
        for row in self.live_rows():
            for head in range(num_kv_heads):
                kv = self.kv(row, head)
                heads = slice(head * group, (head + 1) * group)
                logits = self.query[row, heads] @ kv[:, :head_dim].T * self.scale
                output[row, heads] = F.softmax(logits, dim=-1) @ kv[:, head_dim:]
        return output

    def check(self, actual: torch.Tensor) -> None:
        """The largest error is at most twice what torch makes of the same inputs."""
        exact = self.reference()
        assert not actual.isnan().any(), "an output was not written, or a poisoned page was read"
        error = (actual.float() - exact).abs().max().item()
        allowed = 2 * (self.same_dtype().float() - exact).abs().max().item()
        allowed += exact.abs().max().item() * torch.finfo(actual.dtype).eps
        assert error <= allowed, (error, allowed)


# (listed pages of each head in turn, first live block, tokens); None lists: a dense row;
# 0 tokens: a padded row. 48 tokens fill a block, 49 open one; heads may have empty lists.
SMALL_ROWS = [
    (None, 0, 1),
    ((3, 1, 5), 5, 81),
    (None, 0, 0),
    (None, 0, 48),
    ((2, 7), 7, 7 * PAGE + 35),
    (None, 0, 49),
    ((1,), 1, 32),
    ((4, 2), 6, 0),
    ((6, 0, 4), 6, 6 * PAGE + 13),
    (None, 0, 0),
]
LARGE_ROWS = SMALL_ROWS + [
    (None, 0, 20011),
    ((1250, 63, 111), 1250, 20031),
    ((7, 401, 129, 0), 2000, 32001),
    (None, 0, 63 * PAGE),
    ((313,), 3000, 48111),
]
ROWS = LARGE_ROWS if ON_GPU else SMALL_ROWS


def make_case(num_layers, num_kv_heads, group, head_dim, dtype, generator, rows=None) -> Case:
    rows = rows or ROWS
    layer = num_layers - 1
    per_block = num_layers * num_kv_heads

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)

    def permutation(n):
        return torch.randperm(n, generator=generator, device=DEVICE).int()

    num_live = [max(-(-tokens // PAGE) - tail, 0) for _, tail, tokens in rows]
    counts = torch.tensor(
        [[0 if c is None else c[h % len(c)] for h in range(num_kv_heads)] for c, _, _ in rows]
    )
    num_listed = int(counts.sum())
    num_blocks = sum(num_live) + -(-num_listed // per_block) + 3
    assert num_blocks * per_block < OUT_OF_RANGE // 4
    pages = torch.full(
        (num_blocks * per_block, PAGE, 2 * head_dim), torch.nan, dtype=dtype, device=DEVICE
    )
    blocks = permutation(num_blocks)
    width = max(tail + n for (_, tail, _), n in zip(rows, num_live, strict=True)) + 3
    block_table = torch.full((len(rows), width), OUT_OF_RANGE, dtype=torch.int32, device=DEVICE)
    for row, ((_, tail, tokens), n) in enumerate(zip(rows, num_live, strict=True)):
        mine, blocks = blocks[:n], blocks[n:]
        block_table[row, tail : tail + n] = mine
        left = torch.arange(PAGE, device=DEVICE) + torch.arange(n, device=DEVICE)[:, None] * PAGE
        m_valid = left < tokens - tail * PAGE
        for head in range(num_kv_heads):
            ids = (mine.long() * num_layers + layer) * num_kv_heads + head
            filled = randn(n, PAGE, 2 * head_dim)
            pages[ids] = filled.masked_fill(~m_valid[..., None], torch.nan)
    free = (blocks[:, None] * per_block + torch.arange(per_block, device=DEVICE)).flatten()
    free = free[permutation(free.numel()).long()].int()
    listed = free[:num_listed]
    pages[listed.long()] = randn(num_listed, PAGE, 2 * head_dim)

    # the first and the last entries belong to nobody; slots are in no order, the last one is dense
    nobody = torch.full((3,), OUT_OF_RANGE, dtype=torch.int32, device=DEVICE)
    entries = torch.cat([nobody, listed, nobody])
    num_slots = len(rows) + 2
    start = torch.full((num_slots + 1, num_layers, num_kv_heads), OUT_OF_RANGE, dtype=torch.int64)
    count = torch.full_like(start, 7, dtype=torch.int32)
    prompt_pages = torch.full((num_slots + 1,), 7, dtype=torch.int32)
    count[num_slots], prompt_pages[num_slots] = 0, 0
    row_to_slot = permutation(num_slots)[: len(rows)].cpu()
    offset = 3
    for row, (lists, tail, _) in enumerate(rows):
        if lists is None:
            row_to_slot[row] = num_slots
            continue
        slot = int(row_to_slot[row])
        prompt_pages[slot] = tail
        ends = counts[row].cumsum(0)
        start[slot, layer] = offset + ends - counts[row]
        count[slot, layer] = counts[row]
        offset += int(ends[-1])
    tables = PageTables(entries, start.to(DEVICE), count.to(DEVICE), prompt_pages.to(DEVICE))
    seq_lens = torch.tensor([n for _, _, n in rows], dtype=torch.int32, device=DEVICE)
    rows_ = DecodeRows(row_to_slot.to(DEVICE), block_table, seq_lens)
    query = randn(len(rows), num_kv_heads * group, head_dim)
    return Case(query, pages, tables, rows_, layer)


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


def shape_id(shape) -> str:
    num_layers, num_kv_heads, group, head_dim, dtype = shape
    return f"L{num_layers}-H{num_kv_heads}-G{group}-D{head_dim}-{str(dtype)[6:]}"


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_each_head_attends_to_its_own_pages_and_the_live_tail_and_to_nothing_else(shape, generator):
    case = make_case(*shape, generator)
    case.check(case.run())


@pytest.mark.parametrize("num_programs", [1, 2, 3, 7, 63])
def test_work_may_be_cut_anywhere(num_programs, generator):
    case = make_case(2, 3, 4, 64, torch.float16, generator)
    workspace = case.workspace(num_programs)
    case.check(case.run(workspace))


@pytest.mark.parametrize("tile_tokens", [16, 32, 128])
def test_tiles_of_every_size_give_the_same(tile_tokens, generator):
    case = make_case(2, 2, 3, 64, torch.bfloat16, generator)
    launch = tuning.PAGED_DECODE[64]._replace(tile_tokens=tile_tokens)
    case.check(case.run(launch=launch))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[6]], ids=shape_id)
def test_page_scores_are_the_largest_mass_of_the_group_over_all_the_row_reads(shape, generator):
    case = make_case(*shape, generator)
    num_kv_heads = shape[1]
    is_scored = torch.zeros_like(case.tables.count[0], dtype=torch.bool)
    is_scored[case.layer, ::2] = True
    scores = torch.full(case.tables.entries.shape, torch.nan, device=DEVICE)
    output = case.run(is_scored=is_scored, scores=scores)
    case.check(output)
    live = case.live_rows()
    lists = case.lists(live)
    buffers = [
        {h: torch.empty(int(lists.count[i, h]), device=DEVICE) for h in range(0, num_kv_heads, 2)}
        for i in range(len(live))
    ]
    case.reference(buffers)
    written = torch.zeros_like(scores, dtype=torch.bool)
    bound = 2**-7  # the page's weights are rounded to bfloat16 before they are added
    for i, of_row in enumerate(buffers):
        for head, expected in of_row.items():
            begin = int(lists.start[i, head])
            written[begin : begin + expected.shape[0]] = expected.shape[0] > 0
            mine = scores[begin : begin + expected.shape[0]]
            torch.testing.assert_close(mine, expected, rtol=bound, atol=1e-12)
    assert scores[~written].isnan().all(), "a score of a head that is not scored was written"


def test_a_batch_without_any_token_gives_zeros(generator):
    case = make_case(2, 2, 2, 64, torch.float16, generator, rows=[(None, 0, 0), ((2,), 2, 0)])
    assert torch.equal(case.run(), torch.zeros_like(case.query))


def test_one_token_is_attended_to_alone(generator):
    case = make_case(2, 2, 2, 64, torch.float16, generator, rows=[(None, 0, 1)])
    values = torch.stack([case.kv(0, head)[0, 64:] for head in range(2)])
    assert torch.equal(case.run()[0], values.repeat_interleave(2, dim=0))


@pytest.mark.gpu
def test_a_captured_graph_follows_its_tables(generator):
    """Replays after every input changed in place, with partials left by others."""
    rows = LARGE_ROWS
    case = make_case(2, 8, 4, 128, torch.bfloat16, generator, rows=rows)
    workspace = case.workspace()
    is_scored = torch.zeros_like(case.tables.count[0], dtype=torch.bool)
    output = torch.empty_like(case.query)

    def step():
        plan_decode(case.tables, case.rows, is_scored, workspace)
        paged_decode(
            case.query, case.pages, case.tables, case.rows, workspace, case.layer, case.scale,
            output,
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
        for mine, theirs in zip(case.tables, other.tables, strict=True):
            mine.copy_(theirs)
        for mine, theirs in zip(case.rows, other.rows, strict=True):
            mine.copy_(theirs[order])
        output.fill_(torch.nan)
        graph.replay()
        case.check(output)


@pytest.mark.gpu
def test_merging_gives_the_same_every_time(generator):
    """The work is cut by shapes and lengths alone, so sums run in one order."""
    case = make_case(1, 8, 4, 128, torch.bfloat16, generator, rows=[((2001, 211), 2001, 32100)])
    workspace = case.workspace()
    first = case.run(workspace)
    for _ in range(200):
        assert torch.equal(case.run(workspace), first)
