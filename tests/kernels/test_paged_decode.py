from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vllm_heterocache.kernels.paged_decode_ref import PageLists, paged_decode_ref

PAGE = 16
OUT_OF_RANGE = 10**6  # a page or block id that makes indexing fail


@dataclass
class Case:
    """A decode batch whose pool holds NaN in every token that no row may read."""

    query: torch.Tensor
    pages: torch.Tensor
    lists: PageLists
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    layer: int
    num_layers: int
    tokens: list[list[torch.Tensor]]  # [row][head]: [num_tokens, 2 * D], what the head reads
    counts: list[list[int]]

    @property
    def scale(self) -> float:
        return self.query.shape[2] ** -0.5

    def run(self, page_scores=None) -> torch.Tensor:
        return paged_decode_ref(
            self.query,
            self.pages,
            self.lists,
            self.block_table,
            self.seq_lens,
            self.layer,
            self.num_layers,
            self.scale,
            page_scores,
        )


# (listed pages of each head in turn, first live block, tokens): None lists make a dense row.
# 48 tokens: the current token fills a block; 49: it opens one; 1: the first token ever.
ROWS = [
    (None, 0, 1),
    ((3, 1, 5), 5, 81),
    (None, 0, 48),
    ((2, 7), 7, 7 * PAGE + 35),
    (None, 0, 49),
    ((1,), 1, 32),
    ((6, 0, 4), 6, 6 * PAGE + 13),  # a head may have no listed page at all
]


def make_case(num_layers, num_kv_heads, group, head_dim, dtype, generator, rows=ROWS) -> Case:
    layer = num_layers - 1
    per_block = num_layers * num_kv_heads
    num_live = [-(-tokens // PAGE) - tail for _, tail, tokens in rows]
    counts = [
        [0 if c is None else c[head % len(c)] for head in range(num_kv_heads)] for c, _, _ in rows
    ]
    num_listed = sum(map(sum, counts))
    num_blocks = sum(num_live) + -(-num_listed // per_block) + 3
    pages = torch.full((num_blocks * per_block, PAGE, 2 * head_dim), torch.nan, dtype=dtype)
    blocks = torch.randperm(num_blocks, generator=generator).tolist()
    live = [[blocks.pop() for _ in range(n)] for n in num_live]
    free = torch.tensor(blocks)[:, None] * per_block + torch.arange(per_block)
    free = free.flatten()[torch.randperm(free.numel(), generator=generator)].tolist()

    def filled(page: int, num_tokens: int) -> torch.Tensor:
        kv = torch.randn(num_tokens, 2 * head_dim, generator=generator).to(dtype)
        pages[page, :num_tokens] = kv
        return kv

    # the first entries belong to nobody
    entries, start, tokens = [OUT_OF_RANGE] * 3, [], []
    for row, (_, tail, num_tokens) in enumerate(rows):
        start.append([])
        tokens.append([])
        for head in range(num_kv_heads):
            mine = [free.pop() for _ in range(counts[row][head])]
            start[row].append(len(entries) if mine else 1)
            entries += mine
            kv = [filled(page, PAGE) for page in mine]
            left = num_tokens - tail * PAGE
            for block in live[row]:
                kv.append(filled((block * num_layers + layer) * num_kv_heads + head, min(left, 16)))
                left -= PAGE
            tokens[row].append(torch.cat(kv))
    width = max(tail + n for (_, tail, _), n in zip(rows, num_live, strict=True)) + 1
    block_table = torch.full((len(rows), width), OUT_OF_RANGE, dtype=torch.int32)
    for row, (_, tail, _) in enumerate(rows):
        block_table[row, tail : tail + num_live[row]] = torch.tensor(live[row])
    lists = PageLists(
        torch.tensor(entries + [OUT_OF_RANGE], dtype=torch.int32),
        torch.tensor(start, dtype=torch.int64),
        torch.tensor(counts, dtype=torch.int32),
        torch.tensor([tail for _, tail, _ in rows], dtype=torch.int32),
    )
    query = torch.randn(len(rows), num_kv_heads * group, head_dim, generator=generator).to(dtype)
    seq_lens = torch.tensor([n for _, _, n in rows], dtype=torch.int32)
    return Case(
        query, pages, lists, block_table, seq_lens, layer, num_layers, tokens, counts
    )  # fmt: skip


def exact_output(case: Case, weights_of) -> np.ndarray:
    num_rows, num_q_heads, head_dim = case.query.shape
    group = num_q_heads // len(case.tokens[0])
    output = np.empty((num_rows, num_q_heads, head_dim))
    for row in range(num_rows):
        for q_head in range(num_q_heads):
            kv = case.tokens[row][q_head // group]
            weights = weights_of(case.query[row, q_head], kv[:, :head_dim], case.scale)
            values = kv[:, head_dim:].double().numpy()
            output[row, q_head] = sum(w * v for w, v in zip(weights, values, strict=True))
    return output


def same_dtype_output(case: Case) -> torch.Tensor:
    num_rows, num_q_heads, head_dim = case.query.shape
    output = torch.empty_like(case.query)
    group = num_q_heads // len(case.tokens[0])
    for row in range(num_rows):
        for head, kv in enumerate(case.tokens[row]):
            heads = slice(head * group, (head + 1) * group)
            logits = case.query[row, heads] @ kv[:, :head_dim].T * case.scale
            output[row, heads] = F.softmax(logits, dim=-1) @ kv[:, head_dim:]
    return output


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


def shape_id(shape) -> str:
    num_layers, num_kv_heads, group, head_dim, dtype = shape
    return f"L{num_layers}-H{num_kv_heads}-G{group}-D{head_dim}-{str(dtype)[6:]}"


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_each_head_attends_to_its_own_pages_and_the_live_tail_and_to_nothing_else(
    shape, generator, exact_weights, assert_close_to_exact
):
    case = make_case(*shape, generator)
    exact = exact_output(case, exact_weights)
    assert_close_to_exact(case.run(), exact, same_dtype_output(case))


@pytest.mark.parametrize("shape", SHAPES[1:4], ids=shape_id)
def test_page_scores_are_the_largest_mass_of_the_group_over_all_the_row_reads(
    shape, generator, exact_weights
):
    case = make_case(*shape, generator)
    group, head_dim = shape[2], shape[3]
    heads = [(row, head) for row, of in enumerate(case.counts) for head, n in enumerate(of) if n]
    buffers = [{} for _ in case.tokens]
    for row, head in heads[::2]:
        buffers[row][head] = torch.full((case.counts[row][head],), torch.nan)
    plain = case.run()
    assert torch.equal(case.run(buffers), plain)  # scoring changes no output
    for row, head in heads[::2]:
        keys = case.tokens[row][head][:, :head_dim]
        mass = [
            exact_weights(case.query[row, head * group + g], keys, case.scale)[
                : case.counts[row][head] * PAGE
            ].reshape(-1, PAGE).sum(1)
            for g in range(group)
        ]  # fmt: skip
        np.testing.assert_allclose(buffers[row][head].numpy(), np.max(mass, axis=0), rtol=2e-5)


def test_every_page_of_a_head_can_be_listed_in_any_order(generator):
    case = make_case(2, 2, 3, 64, torch.float32, generator)
    before = case.run()
    row, head = 3, 1
    start, count = int(case.lists.start[row, head]), case.counts[row][head]
    assert count == 7
    case.lists.entries[start : start + count] = case.lists.entries[start : start + count].flip(0)
    torch.testing.assert_close(case.run(), before, rtol=1e-5, atol=1e-6)


def test_a_row_does_not_depend_on_the_rest_of_the_batch(generator):
    case = make_case(2, 3, 2, 64, torch.bfloat16, generator)
    whole = case.run()
    for row in range(len(ROWS)):
        alone = slice(row, row + 1)
        case_of_one = Case(
            case.query[alone],
            case.pages,
            PageLists(case.lists.entries, *(t[alone] for t in case.lists[1:])),
            case.block_table[alone],
            case.seq_lens[alone],
            case.layer,
            case.num_layers,
            case.tokens[alone],
            case.counts[alone],
        )
        assert torch.equal(case_of_one.run(), whole[alone])


def test_one_token_is_attended_to_alone(generator):
    case = make_case(2, 2, 2, 64, torch.float32, generator, rows=[(None, 0, 1)])
    values = torch.stack([kv[0, 64:] for kv in case.tokens[0]]).repeat_interleave(2, dim=0)
    assert torch.equal(case.run()[0], values)
