"""Decode batches for the tests of `paged_decode` and of its reference, poisoned all over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common.tables import tables_for
from vllm_heterocache.kernels.kv_scales import KVScales
from vllm_heterocache.kernels.paged_decode_ref import paged_decode_ref
from vllm_heterocache.kernels.tables import DecodeRows, PageTables

PAGE = 16
OUT_OF_RANGE = 10**9  # an id or a row far outside its tensor: reading it is a fault
PIVOT_WIDTH = 2
MEANS, MATCHED = "means", "matched"  # kinds of stand-in pages

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


def shape_id(shape: tuple) -> str:
    """Of a test with these arguments of `make_case`."""
    num_layers, num_kv_heads, group, head_dim, dtype = shape
    return f"L{num_layers}-H{num_kv_heads}-G{group}-D{head_dim}-{str(dtype)[6:]}"


class Results(NamedTuple):
    """Everything a call writes, NaN where it wrote nothing."""

    output: torch.Tensor
    last_queries: torch.Tensor
    page_lse: torch.Tensor
    head_lse: torch.Tensor


@dataclass
class Case:
    """A decode batch whose pool holds NaN in every token that no row may read."""

    query: torch.Tensor
    pages: torch.Tensor
    tables: PageTables
    rows: DecodeRows
    pivot_of_head: torch.Tensor
    layer: int
    kv_scales: KVScales | None = None
    sink_logits: torch.Tensor | None = None
    soft_cap: float = 0.0

    @property
    def scale(self) -> float:
        return self.query.shape[2] ** -0.5

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.tables.count.shape[2]

    def live_rows(self) -> list[int]:
        return self.rows.seq_lens.nonzero().flatten().tolist()

    def poisoned(self, dtype: torch.dtype | None = None) -> Results:
        """Room for the results; the case's own `page_lse` is it."""
        _, num_q_heads, head_dim = self.query.shape
        num_rows = self.rows.seq_lens.shape[0]
        _, num_layers, num_kv_heads = self.tables.count.shape
        self.tables.page_lse.fill_(torch.nan)
        output = torch.full_like(self.query, torch.nan, dtype=dtype)
        num_places = max(int(self.rows.query_place.max()) + 1, 1)
        last = output.new_full((num_places, num_layers, num_q_heads, head_dim), torch.nan)
        shape = (num_layers, (num_rows + 2) * num_kv_heads, self.group)
        head_lse = torch.full(shape, torch.nan, device=output.device)
        return Results(output, last, self.tables.page_lse, head_lse)

    def reference(self, with_scores: bool = True, dtype: torch.dtype | None = None) -> Results:
        """What `paged_decode_ref` writes for the query in `dtype`."""
        results = self.poisoned(dtype)
        by_products = (self.pivot_of_head, results.head_lse) if with_scores else ()
        paged_decode_ref(
            self.query.to(results.output.dtype), self.pages, self.tables, self.rows, self.layer,
            self.scale, results.output, results.last_queries, *by_products,
            kv_scales=self.kv_scales, sink_logits=self.sink_logits, soft_cap=self.soft_cap,
        )  # fmt: skip
        return results._replace(page_lse=results.page_lse.clone())

    def kv(self, row: int, head: int) -> torch.Tensor:
        """[num_tokens, 2 * D], the elements that the head reads."""
        _, num_layers, num_kv_heads = self.tables.count.shape
        slot, num_tokens = int(self.rows.row_to_table_slot[row]), int(self.rows.seq_lens[row])
        start = int(self.tables.start[slot, self.layer, head])
        num_own = sum(self.own_pages(slot, head))
        tail = int(self.tables.prompt_pages[slot])
        blocks = self.rows.block_table[row, tail : -(-num_tokens // PAGE)]
        ids = (blocks * num_layers + self.layer) * num_kv_heads + head
        ids = torch.cat([self.tables.entries[start : start + num_own], ids]).long()
        return self.pages[ids].flatten(0, 1)[: num_tokens + (num_own - tail) * PAGE]

    def head_scales(self, head: int) -> tuple[float, float]:
        """What the head's elements of K and of V are multiplied with."""
        if self.kv_scales is None:
            return 1.0, 1.0
        key, value = (one[self.layer, head].item() for one in self.kv_scales[:2])
        return key, value

    def own_pages(self, slot: int, head: int) -> tuple[int, int]:
        """Pages that the head lists, and its stand-in pages."""
        count = int(self.tables.count[slot, self.layer, head])
        if not self.tables.has_stand_ins:
            return count, 0
        return count, int(self.tables.stand_in_pages[slot, self.layer, head])

    def bias(self, row: int, head: int) -> torch.Tensor:
        """[num_tokens] float64, what is added to the logits: of a mean, the logarithm of the
        tokens that it stands for on average; of a matched token, its own bias."""
        slot = int(self.rows.row_to_table_slot[row])
        count, stand_ins = self.own_pages(slot, head)
        bias = self.query.new_zeros(self.kv(row, head).shape[0], dtype=torch.float64)
        of_stand_ins = bias[count * PAGE :][: stand_ins * PAGE]
        if stand_ins and self.tables.token_bias is not None:
            first = int(self.tables.bias_start[slot, self.layer, head])
            biases = self.tables.token_bias[first : first + stand_ins].double()
            of_stand_ins.copy_(biases.flatten() * math.log(2))
        elif stand_ins:
            evicted = int(self.tables.prompt_pages[slot]) - count
            of_stand_ins.fill_(math.log(evicted * PAGE / (stand_ins * PAGE)))
        return bias

    def logits(self, row: int, head: int) -> torch.Tensor:
        """[G, num_tokens] float64."""
        heads = slice(head * self.group, (head + 1) * self.group)
        keys = self.kv(row, head)[:, : self.query.shape[2]].double()
        scale = self.scale * self.head_scales(head)[0]
        return self.capped(self.query[row, heads].double() @ keys.T * scale) + self.bias(row, head)

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits / self.soft_cap).tanh() * self.soft_cap if self.soft_cap else logits

    def sinks(self, head: int) -> torch.Tensor:
        """[G, 1] float64, or [G, 0] where heads have none."""
        if self.sink_logits is None:
            return torch.empty(self.group, 0, dtype=torch.float64, device=self.query.device)
        return self.sink_logits[self.layer].double().view(-1, self.group, 1)[head]

    def exact(self) -> Results:
        """The specification in float64, head by head and page by page; no kernel's way of it."""
        results = self.poisoned(torch.float64)
        results.output.zero_()
        page_lse = results.page_lse.double()
        head_lse = results.head_lse.double()
        num_kv_heads, group = self.tables.count.shape[2], self.group
        for row in self.live_rows():
            slot, place = int(self.rows.row_to_table_slot[row]), int(self.rows.query_place[row])
            if place >= 0:
                results.last_queries[place, self.layer] = self.query[row].double()
            for head in range(num_kv_heads):
                logits = self.logits(row, head)
                values = self.kv(row, head)[:, self.query.shape[2] :].double()
                heads = slice(head * group, (head + 1) * group)
                with_sink = torch.cat([logits, self.sinks(head)], -1)
                weights = with_sink.softmax(-1)[:, : logits.shape[1]]
                results.output[row, heads] = weights @ values * self.head_scales(head)[1]
                pivot = int(self.pivot_of_head[self.layer, head])
                if pivot < 0 or not self.rows.is_due[row]:
                    continue
                log2_sum = torch.logsumexp(with_sink, -1) / math.log(2)
                head_lse[self.layer, row * num_kv_heads + head] = log2_sum
                first = int(self.tables.first_stripe[slot]) * self.tables.pivot_width
                first += pivot * int(self.tables.prompt_pages[slot])
                for page in range(int(self.tables.count[slot, self.layer, head])):
                    of_page = logits[:, page * PAGE : (page + 1) * PAGE]
                    page_lse[first + page] = torch.logsumexp(of_page, -1) / math.log(2)
        return results._replace(page_lse=page_lse, head_lse=head_lse)

    def same_dtype(self) -> torch.Tensor:
        """The output as torch makes it in the query's dtype."""
        output = torch.zeros_like(self.query)
        group, head_dim = self.group, self.query.shape[2]
        for row in self.live_rows():
            for head in range(self.tables.count.shape[2]):
                kv = self.kv(row, head).to(output.dtype)
                of_keys, of_values = self.head_scales(head)
                heads = slice(head * group, (head + 1) * group)
                logits = self.query[row, heads] @ kv[:, :head_dim].T * (self.scale * of_keys)
                logits = self.capped(logits) + self.bias(row, head).to(logits.dtype)
                with_sink = torch.cat([logits, self.sinks(head).to(logits.dtype)], -1)
                weights = F.softmax(with_sink, dim=-1)[:, : logits.shape[1]]
                output[row, heads] = weights @ kv[:, head_dim:] * of_values
        return output

    def check_output(self, actual: torch.Tensor, exact: torch.Tensor) -> None:
        """The largest error is at most twice what torch makes of the same inputs."""
        assert not actual.isnan().any(), "an output was not written, or a poisoned page was read"
        error = (actual.double() - exact).abs().max().item()
        allowed = 2 * (self.same_dtype().double() - exact).abs().max().item()
        # one rounding of the largest value: torch may be exact by luck where there is one token
        allowed += exact.abs().max().item() * torch.finfo(actual.dtype).eps
        assert error <= allowed, (error, allowed)


def make_case(
    num_layers,
    num_kv_heads,
    group,
    head_dim,
    dtype,
    generator,
    rows=None,
    layer=None,
    stand_ins=None,
    page_dtype=None,
    has_sinks=False,
    soft_cap=0.0,
) -> Case:
    """A case of the last layer (or `layer`); every second head is a pivot, two of three rows due.

    With `stand_ins` MEANS or MATCHED, up to two of the listed pages of each head are stand-in
    pages of that kind. Pages have the query's dtype, or an fp8 `page_dtype` and scales at random.
    Sinks have the query's dtype, as weights have, and some of them outweigh all tokens.
    """
    device, rows = generator.device, rows or SMALL_ROWS
    layer = num_layers - 1 if layer is None else layer
    per_block = num_layers * num_kv_heads
    page_dtype = page_dtype or dtype

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device)

    def permutation(n):
        return torch.randperm(n, generator=generator, device=device).int()

    num_live = [max(-(-tokens // PAGE) - tail, 0) for _, tail, tokens in rows]
    counts = torch.tensor(
        [[0 if c is None else c[h % len(c)] for h in range(num_kv_heads)] for c, _, _ in rows]
    )
    num_listed = int(counts.sum())
    num_blocks = sum(num_live) + -(-num_listed // per_block) + 3
    assert num_blocks * per_block < OUT_OF_RANGE // 4
    pages = torch.full((num_blocks * per_block, PAGE, 2 * head_dim), torch.nan, device=device).to(
        page_dtype
    )
    blocks = permutation(num_blocks)
    width = max(tail + n for (_, tail, _), n in zip(rows, num_live, strict=True)) + 3
    block_table = torch.full((len(rows), width), OUT_OF_RANGE, dtype=torch.int32, device=device)
    for row, ((_, tail, tokens), n) in enumerate(zip(rows, num_live, strict=True)):
        mine, blocks = blocks[:n], blocks[n:]
        block_table[row, tail : tail + n] = mine
        left = torch.arange(PAGE, device=device) + torch.arange(n, device=device)[:, None] * PAGE
        m_valid = left < tokens - tail * PAGE
        for head in range(num_kv_heads):
            ids = (mine.long() * num_layers + layer) * num_kv_heads + head
            filled = randn(n, PAGE, 2 * head_dim)
            pages[ids] = filled.masked_fill(~m_valid[..., None], torch.nan).to(page_dtype)
    free = (blocks[:, None] * per_block + torch.arange(per_block, device=device)).flatten()
    free = free[permutation(free.numel()).long()].int()
    listed = free[:num_listed]
    pages[listed.long()] = randn(num_listed, PAGE, 2 * head_dim).to(page_dtype)

    pivot_of_head, num_pivots = _pivots(num_layers, num_kv_heads, layer, permutation)
    row_to_table_slot = permutation(len(rows) + 2)[: len(rows)]
    tables = _tables(
        rows, counts, row_to_table_slot, listed, num_layers, layer, num_pivots, group, stand_ins
    )
    if stand_ins == MATCHED:
        tables = _with_biases(tables, generator)
    query_place = permutation(len(rows) + 3)[: len(rows)]
    query_place[::3] = -1
    seq_lens = torch.tensor([n for _, _, n in rows], dtype=torch.int32, device=device)
    is_due = (torch.arange(len(rows), device=device) % 3 != 1).int()
    return Case(
        randn(len(rows), num_kv_heads * group, head_dim).to(dtype), pages, tables,
        DecodeRows(row_to_table_slot, block_table, seq_lens, query_place, is_due),
        pivot_of_head, layer,
        None if page_dtype == dtype else random_scales(num_layers, num_kv_heads, generator),
        5 * randn(num_layers, num_kv_heads * group).to(dtype) if has_sinks else None, soft_cap,
    )  # fmt: skip


def random_scales(num_layers, num_kv_heads, generator) -> KVScales:
    """Scales of an fp8 pool, from 1/4 to 2."""
    shape = (3, num_layers, num_kv_heads)
    exponents = 3 * torch.rand(shape, generator=generator, device=generator.device) - 2
    return KVScales(*exponents.exp2())


def _pivots(num_layers, num_kv_heads, layer, permutation) -> tuple[torch.Tensor, int]:
    """Every second head of the layer is a pivot; in the other layers the others are."""
    head = torch.arange(num_kv_heads)
    is_pivot = (head % 2 == 0) == (torch.arange(num_layers) == layer)[:, None]
    pivot_of_head = torch.full((num_layers, num_kv_heads), -1, dtype=torch.int32)
    num_pivots = int(is_pivot.sum()) + 1
    pivots = permutation(num_pivots)
    pivot_of_head[is_pivot] = pivots[1:].cpu()
    return pivot_of_head.to(pivots.device), num_pivots


def _tables(
    rows, counts, row_to_table_slot, listed, num_layers, layer, num_pivots, group, stand_ins
) -> PageTables:
    """Tables in which only the layer's lists are true, of slots in no order.

    Dense rows get the last slot. The first and the last entries belong to nobody, and so do
    the first rows of the arenas.
    """
    device, num_kv_heads, num_slots = listed.device, counts.shape[1], len(rows) + 2
    nobody = torch.full((3,), OUT_OF_RANGE, dtype=torch.int32, device=device)
    start = torch.full((num_slots + 1, num_layers, num_kv_heads), OUT_OF_RANGE, dtype=torch.int64)
    count = torch.full_like(start, 7, dtype=torch.int32)
    stand_in_pages = torch.full_like(count, 5)
    prompt_pages = torch.full((num_slots + 1,), 7, dtype=torch.int32)
    first_stripe = torch.full((num_slots + 1,), OUT_OF_RANGE, dtype=torch.int64)
    count[num_slots], stand_in_pages[num_slots], prompt_pages[num_slots] = 0, 0, 0
    offset, next_row = 3, 2
    for row, (lists, tail, _) in enumerate(rows):
        if lists is None:
            row_to_table_slot[row] = num_slots
            continue
        slot = int(row_to_table_slot[row])
        prompt_pages[slot], first_stripe[slot] = tail, next_row
        next_row += -(-num_pivots * tail // PIVOT_WIDTH)
        ends = counts[row].cumsum(0)
        start[slot, layer] = offset + ends - counts[row]
        of_heads = torch.arange(1, num_kv_heads + 1) % 3 * bool(stand_ins)
        stand_in_pages[slot, layer] = torch.minimum(of_heads, counts[row]).int()
        count[slot, layer] = counts[row] - stand_in_pages[slot, layer]
        offset += int(ends[-1])
    return tables_for(
        tuple(count.shape), device, num_rows=next_row, group=group, widths=(PIVOT_WIDTH, 0, 0),
        entries=torch.cat([nobody, listed, nobody]), start=start, count=count,
        stand_in_pages=stand_in_pages if stand_ins else torch.empty(0), prompt_pages=prompt_pages,
        first_stripe=first_stripe, has_stand_ins=bool(stand_ins),
    )  # fmt: skip


def _with_biases(tables: PageTables, generator) -> PageTables:
    """Biases at random for the true lists, in no order and amid poison; those of other lists lie
    far outside."""
    num_pages = torch.where(tables.start < OUT_OF_RANGE, tables.stand_in_pages, 0)
    size = int(num_pages.sum())
    first = 3 + num_pages.flatten().cumsum(0).view(num_pages.shape) - num_pages
    token_bias = torch.full((size + 7, PAGE), torch.nan, device=generator.device)
    token_bias[3 : 3 + size] = 3 * torch.randn(
        size, PAGE, generator=generator, device=generator.device
    )
    return tables._replace(
        bias_start=torch.where(num_pages > 0, first, OUT_OF_RANGE), token_bias=token_bias
    )
