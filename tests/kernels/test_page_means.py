"""`page_means`: the reference against plain means, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from triton_mode import DEVICE, HAS_E4M3, ON_GPU

# isort: split
from mean_case import SLOT, N, make_mean_case

from vllm_heterocache.kernels.page_means import page_means
from vllm_heterocache.kernels.page_means_ref import page_means_ref

SHAPES = [  # L, H, D, dtype
    (2, 3, 64, torch.bfloat16),
    (3, 1, 128, torch.float16),
    (1, 2, 256, torch.float16),
    (2, 2, 64, torch.float8_e5m2),
    (2, 3, 128, torch.float8_e4m3fn),
]
ON_DEVICE = SHAPES if HAS_E4M3 else SHAPES[:-1]
# P, then (listed pages, mean pages) of heads in turn: no means, runs of one page, uneven runs,
# nothing listed, two mean pages
SMALL = 67, [(67, 0), (51, 1), (20, 1), (0, 1), (5, 2), (3, 0)]
LARGE = 3001, [(3001, 0), (2900, 6), (211, 11), (0, 12), (1499, 1), (5, 2)]


def bits(pages: torch.Tensor) -> torch.Tensor:
    """The bytes of pages, so that NaN equals itself."""
    return pages.view(torch.uint8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_mean_is_that_of_its_run_and_nothing_else_is_written(shape, generator):
    case = make_mean_case(shape, SMALL, generator, torch.device("cpu"))
    before = case.pages.clone()
    page_means_ref(case.pages, case.tables, SLOT, case.dense_blocks)
    written = torch.cat(case.mean_ids)
    assert len(written)
    untouched = torch.ones(len(before), dtype=torch.bool)
    untouched[written] = False
    assert torch.equal(bits(case.pages[untouched]), bits(before[untouched]))
    for ids, evicted in zip(case.mean_ids, case.evicted, strict=True):
        num_runs, seen = len(ids) * N, []
        for run in range(num_runs):
            bounds = [len(evicted) * i // num_runs for i in (run, run + 1)]
            pages = evicted[slice(*bounds)]
            assert len(pages) in (len(evicted) // num_runs, len(evicted) // num_runs + 1)
            mean = torch.stack([before[page].double() for page in pages]).flatten(0, 1).mean(0)
            actual = case.pages[ids[run // N], run % N]
            near = torch.finfo(actual.dtype)
            # fp8 has coarse numbers around 0
            least = max(1e-5, near.tiny * near.eps)
            torch.testing.assert_close(actual.double(), mean, rtol=near.eps, atol=least)
            seen += pages
        assert not num_runs or seen == evicted


@pytest.mark.parametrize("lengths", [SMALL, LARGE] if ON_GPU else [SMALL], ids=lambda n: str(n[0]))
@pytest.mark.parametrize("shape", ON_DEVICE, ids=str)
def test_the_kernel_writes_what_the_reference_does(shape, lengths, generator):
    case = make_mean_case(shape, lengths, generator, DEVICE)
    expected = case.pages.clone()
    page_means_ref(expected, case.tables, SLOT, case.dense_blocks)
    page_means(case.pages, case.tables, SLOT, case.dense_blocks)
    # sums run in another order, so that a value may be rounded to its neighbour
    eps = torch.finfo(case.pages.dtype).eps
    actual = case.pages.float()  # torch compares no fp8 elements
    torch.testing.assert_close(actual, expected.float(), rtol=eps, atol=1e-5, equal_nan=True)
    assert not torch.cat([actual[ids] for ids in case.mean_ids]).isnan().any()


def test_more_runs_than_evicted_pages_are_a_mistake(generator):
    case = make_mean_case(SHAPES[0], (20, [(5, 1)]), generator, torch.device("cpu"))
    with pytest.raises(AssertionError, match="more runs"):
        page_means_ref(case.pages, case.tables, SLOT, case.dense_blocks)
