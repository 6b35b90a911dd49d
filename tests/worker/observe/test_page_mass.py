"""Blockwise page masses against a softmax written out token by token."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_heterocache.kernels.tables import layer_page_ids
from vllm_heterocache.worker.observe import page_mass
from vllm_heterocache.worker.observe.page_mass import (
    add_page_masses,
    by_kv_head,
    page_masses,
)

PAGE = 16
LAYERS, HEADS, GROUP, DIM = 3, 2, 3, 8
SCALE = DIM**-0.5


class Prompt:
    """A prompt in a pool whose other pages, and whatever lies behind the last token, are NaN."""

    def __init__(self, num_tokens: int, dtype=torch.float32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        num_blocks = -(-num_tokens // PAGE)
        self.keys = random(LAYERS, HEADS, num_tokens, DIM)
        self.queries = 2 * random(num_tokens, LAYERS, HEADS * GROUP, DIM)
        self.blocks = torch.randperm(num_blocks + 3, generator=generator)[:num_blocks].int()
        shape = (num_blocks + 3, LAYERS, HEADS, PAGE, 2 * DIM)
        pool = torch.full(shape, torch.nan, dtype=dtype)
        for token in range(num_tokens):
            block = self.blocks[token // PAGE]
            pool[block, :, :, token % PAGE, :DIM] = self.keys[:, :, token]
        self.pages = pool.view(-1, PAGE, 2 * DIM)

    def ids(self, layer: int) -> torch.Tensor:
        return layer_page_ids(self.blocks, layer, LAYERS, HEADS)

    def slow_mass(self, layer: int, q_head: int, position: int) -> list[float]:
        """Attention mass of one query on each page; Python floats."""
        query = self.queries[position, layer, q_head].double().tolist()
        powers = []
        for key in self.keys[layer, q_head // GROUP, : position + 1].double().tolist():
            dot = sum(a * b for a, b in zip(query, key, strict=True))
            powers.append(math.exp(dot * SCALE))
        num_pages = len(self.blocks)
        mass = [0.0] * num_pages
        for token, power in enumerate(powers):
            mass[token // PAGE] += power / sum(powers)
        return mass


# pages full, one token into a page, one token short of one; fewer tokens than the window
@pytest.mark.parametrize(("num_tokens", "window"), [(96, 5), (97, 33), (111, 20), (7, 7), (49, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_masses_are_those_of_a_softmax_up_to_the_query_itself(num_tokens, window, dtype, tiny):
    prompt = Prompt(num_tokens, dtype)
    positions = torch.arange(num_tokens - window, num_tokens)
    for layer in range(LAYERS):
        rows = by_kv_head(prompt.queries[positions, layer], HEADS)
        masses = page_masses(rows, positions.repeat(GROUP), prompt.pages, prompt.ids(layer), SCALE)
        assert masses.dtype == torch.float32 and masses.shape[1] == GROUP * window
        by_query = masses.view(HEADS, GROUP, window, -1)
        for q_head in range(HEADS * GROUP):
            for i in (0, window // 2, window - 1):
                expected = prompt.slow_mass(layer, q_head, int(positions[i]))
                actual = by_query[q_head // GROUP, q_head % GROUP, i]
                torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-4, atol=1e-6)


@pytest.fixture(params=[False, True], ids=["one block", "many blocks"])
def tiny(request, monkeypatch):
    """Blocks of a page of keys, and of a few queries."""
    if request.param:
        monkeypatch.setattr(page_mass, "BLOCK_ELEMENTS", 200)


@pytest.mark.parametrize("chunks", [(100,), (31, 1, 52, 16), (1, 98, 1)], ids=str)
def test_sums_over_all_queries_do_not_depend_on_the_chunks(chunks, tiny):
    prompt = Prompt(100)
    for layer in (0, 2):
        total = torch.zeros(HEADS, 100 // PAGE)
        first = 0
        for size in chunks:
            seen = prompt.ids(layer)[:, : -(-(first + size) // PAGE)]
            part = prompt.queries[first : first + size, layer]
            add_page_masses(total, part, first, prompt.pages, seen, SCALE)
            first += size
        expected = torch.zeros(HEADS, 100 // PAGE)
        for q_head in range(HEADS * GROUP):
            for position in range(100):
                mass = torch.tensor(prompt.slow_mass(layer, q_head, position))
                expected[q_head // GROUP] += mass[: 100 // PAGE]
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


def test_sinks_take_mass_and_logits_are_capped():
    """Rows of a KV head are those of its query heads, one behind another."""
    generator = torch.Generator().manual_seed(5)
    pages = torch.randn(4, PAGE, 2 * DIM, generator=generator)
    page_ids, positions = torch.tensor([[2, 0], [1, 3]]), [22, 26]
    query = torch.randn(2, HEADS * GROUP, DIM, generator=generator)
    sinks = torch.linspace(-2, 3, HEADS * GROUP)
    rows, where = by_kv_head(query, HEADS), torch.tensor(positions * GROUP)
    masses = page_masses(rows, where, pages, page_ids, 1.0, sinks, 1.5)
    for head, g, token in ((h, g, t) for h in range(HEADS) for g in range(GROUP) for t in (0, 1)):
        keys = pages[page_ids[head], :, :DIM].flatten(0, 1)[: positions[token] + 1]
        logits = 1.5 * torch.tanh(keys @ query[token, head * GROUP + g] / 1.5)
        weights = torch.cat([logits, sinks[None, head * GROUP + g]]).softmax(0)[:-1]
        expected = torch.stack([weights[:PAGE].sum(), weights[PAGE:].sum()])
        torch.testing.assert_close(masses[head, g * 2 + token], expected)
