"""`page_select` against its reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from selection_case import SLOT, SelectionCase, make_selection_case
from triton_mode import DEVICE, ON_GPU

from vllm_heterocache.kernels import page_select as module
from vllm_heterocache.kernels.page_select import page_select
from vllm_heterocache.kernels.page_select_ref import page_select_ref
from vllm_heterocache.kernels.values import Protected

SHAPES = [(1, 1, 1), (2, 3, 9), (3, 4, 255), (1, 4, 256), (1, 4, 257), (1, 3, 1025), (1, 3, 5003)]
LARGE_SHAPES = [(32, 8, 14000), (7, 3, 16384), (2, 3, 16385), (2, 2, 131071)]


def random_scores(shape, generator) -> torch.Tensor:
    """fp32 over many orders of magnitude, as masses are; some are zero, some equal."""
    exponents = torch.randint(-40, 1, shape, generator=generator, device=DEVICE)
    scores = torch.rand(shape, generator=generator, device=DEVICE) * 2.0**exponents
    repeated = torch.rand(shape, generator=generator, device=DEVICE) < 0.2
    zero = torch.rand(shape, generator=generator, device=DEVICE) < 0.1
    return scores.masked_fill(repeated, 2.0**-15).masked_fill(zero, 0.0)


def random_counts(shape, generator) -> torch.Tensor:
    """List lengths; some heads keep everything, some keep nothing, some less than is protected."""
    num_layers, num_kv_heads, num_pages = shape
    counts = torch.randint(
        0, num_pages + 1, (num_layers, num_kv_heads), generator=generator, device=DEVICE
    ).cpu()
    special = torch.tensor([num_pages, 0, min(2, num_pages)])
    special = special[torch.randint(0, 3, counts.shape)]
    return torch.where(torch.rand(counts.shape) < 0.4, special, counts)


def check(case: SelectionCase) -> None:
    """Everything that either may write is the same, poison included."""
    expected, actual = case.filled(page_select_ref), case.filled(page_select)
    assert torch.equal(actual.tables.positions, expected.tables.positions)
    assert torch.equal(actual.source, expected.source)
    assert torch.equal(actual.tables.is_resident, expected.tables.is_resident)
    assert torch.equal(actual.tables.is_reference, expected.tables.is_reference)
    scores = (actual.tables.scores, expected.tables.scores)
    torch.testing.assert_close(*scores, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES + LARGE_SHAPES if ON_GPU else SHAPES, ids=str)
def test_lists_and_arenas_are_those_of_the_reference(shape, generator):
    counts = random_counts(shape, generator)
    check(make_selection_case(random_scores(shape, generator), counts, Protected(1, 3)))


def test_two_million_tokens(monkeypatch, generator):
    if not ON_GPU:
        monkeypatch.setattr(module, "BLOCK_PAGES", 16384)
    scores = random_scores((1, 2, 131071), generator)
    check(make_selection_case(scores, torch.tensor([[65537, 6554]]), Protected(1, 3)))


@pytest.mark.parametrize("protected", [(0, 0), (0, 5), (4, 0), (7, 9), (300, 300)], ids=str)
@pytest.mark.parametrize("num_pages", [5, 111])
def test_protected_pages_come_first(num_pages, protected, generator):
    shape = (2, 3, num_pages)
    counts = random_counts(shape, generator)
    check(make_selection_case(random_scores(shape, generator), counts, Protected(*protected)))


@pytest.mark.parametrize("value", [0.0, 1e-30, 1.0, torch.inf])
def test_of_equal_scores_the_earlier_pages_are_kept(value, generator):
    scores = torch.full((1, 3, 90), value, device=DEVICE)
    case = make_selection_case(scores, torch.tensor([[7, 8, 90]]), Protected(0, 0))
    check(case)
    start = int(case.tables.start[SLOT, 0, 0])
    kept = case.filled(page_select).tables.positions[start : start + 7]
    assert kept.tolist() == list(range(7))


@pytest.mark.gpu
def test_prompts_of_all_lengths_share_one_compiled_kernel(generator):
    def num_compiled() -> int:
        return len(module._page_select_kernel.device_caches[torch.cuda.current_device()][0])

    for num_pages in [1, 16, 17, 100, 256, 5003]:
        shape = (2, 3, num_pages)
        counts = random_counts(shape, generator)
        protected = Protected(num_pages % 3, 1)
        check(make_selection_case(random_scores(shape, generator), counts, protected))
        if num_pages == 1:
            before = num_compiled()
    assert num_compiled() == before
