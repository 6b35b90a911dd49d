from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_heterocache.compaction import fill_page_lists, prompt_page_scores, satellite_pages
from vllm_heterocache.page_table import PageTable
from vllm_heterocache.request_state import Capture, CompactionOrder
from vllm_heterocache.roles import all_full

PAGE = 16


class Prompt:
    """A dense prompt in a pool that holds NaN elsewhere, and the table it is compacted into."""

    def __init__(self, num_tokens: int, num_layers: int, num_kv_heads: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape = num_layers, num_kv_heads
        self.head_dim, self.group, self.num_blocks = 8, 3, 61
        pool = torch.full((self.num_blocks, *self.shape, PAGE, 2 * self.head_dim), torch.nan)
        blocks = torch.randperm(self.num_blocks, generator=generator).int()
        used = -(-num_tokens // PAGE)
        self.kv = torch.randn(*self.shape, num_tokens, 2 * self.head_dim, generator=generator)
        for token in range(num_tokens):
            pool[blocks[token // PAGE], :, :, token % PAGE] = self.kv[:, :, token]
        self.pool, self.free = pool, blocks[used:].tolist()
        self.num_pages = num_tokens // PAGE
        query = torch.randn(num_layers, num_kv_heads * self.group, self.head_dim)
        order = CompactionOrder(0, "a", num_tokens, [])
        self.capture = Capture(order, query, blocks[:used])
        self.table = PageTable(4, self.num_blocks, *self.shape, torch.device("cpu"))

    @property
    def pages(self) -> torch.Tensor:
        return self.pool.view(-1, PAGE, 2 * self.head_dim)


def slow_scores(prompt: Prompt, layer: int, scale: float) -> np.ndarray:
    scores = np.zeros((prompt.shape[1], prompt.num_pages))
    for head in range(prompt.shape[1]):
        keys = prompt.kv[layer, head, :, : prompt.head_dim].double().numpy()
        for g in range(prompt.group):
            query = prompt.capture.last_query[layer, head * prompt.group + g].double().numpy()
            powers = np.exp(keys @ query * scale)
            for page in range(prompt.num_pages):
                mass = powers[page * PAGE : (page + 1) * PAGE].sum() / powers.sum()
                scores[head, page] = max(scores[head, page], mass)
    return scores


@pytest.mark.parametrize("num_tokens", [16, 63, 111, 128])
def test_prompt_pages_are_scored_by_the_last_query_of_each_layer(num_tokens):
    prompt = Prompt(num_tokens, 3, 2, seed=num_tokens)
    for layer in range(3):
        scores = prompt_page_scores(
            prompt.capture, layer, prompt.pool[:, layer], prompt.num_pages, 0.3
        )
        np.testing.assert_allclose(scores.numpy(), slow_scores(prompt, layer, 0.3), rtol=1e-5)


@pytest.mark.parametrize(
    "num_tokens, layers, heads, sinks, recent",
    [(16 * 11, 2, 3, 1, 3), (16 * 9 + 7, 1, 1, 0, 0), (16 * 23 + 15, 3, 2, 2, 0)],
)
def test_each_head_holds_its_protected_and_best_pages_in_prompt_order(
    num_tokens, layers, heads, sinks, recent
):
    prompt = Prompt(num_tokens, layers, heads, seed=7)
    num_pages, table = prompt.num_pages, prompt.table
    rng = np.random.default_rng(0)
    budgets = rng.integers(sinks + recent + 1, num_pages + 1, (layers, heads))
    budgets[0, 0] = num_pages  # a full head
    num_blocks = -(-int(budgets.sum()) // (layers * heads)) + 1
    slot = table.allocate(prompt.free[:num_blocks], budgets, num_pages)
    scores = torch.tensor(rng.random((layers, heads, num_pages)), dtype=torch.float32)
    before = prompt.pool.clone()
    fill_page_lists(table, slot, prompt.pages, prompt.capture, scores, sinks, recent)
    table.check_integrity({slot: prompt.free[:num_blocks]})
    written = []
    for layer in range(layers):
        for head in range(heads):
            ranked = sorted(range(num_pages), key=lambda p: -scores[layer, head, p])
            protected = [p for p in ranked if p < sinks or p >= num_pages - recent]
            others = [p for p in ranked if p not in protected]
            budget = int(budgets[layer, head])
            expected = sorted((protected + others)[:budget])
            entries = table.head_entries(slot, layer, head)
            assert table.positions[entries].tolist() == expected
            for page, position in zip(table.entries[entries].tolist(), expected, strict=True):
                dense = prompt.kv[layer, head, position * PAGE : (position + 1) * PAGE]
                assert torch.equal(prompt.pages[page], dense)
                written.append(page)
    untouched = torch.ones(len(prompt.pages), dtype=torch.bool)
    untouched[written] = False
    torch.testing.assert_close(
        prompt.pages[untouched], before.view_as(prompt.pages)[untouched], equal_nan=True
    )


def test_satellite_pages_name_the_dense_page_of_every_block_for_each_satellite():
    num_layers, num_kv_heads = 3, 4
    pages = satellite_pages(
        all_full(num_layers, num_kv_heads), np.array([2, 5, 11]), torch.tensor([9, 0, 4]).int()
    )
    expected = [
        [(block * num_layers + layer) * num_kv_heads + head for block in (9, 0, 4)]
        for layer, head in ((0, 2), (1, 1), (2, 3))
    ]
    assert pages.tolist() == expected and pages.dtype == torch.int64
