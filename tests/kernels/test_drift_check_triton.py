"""`drift_check` against its reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import random

import pytest
import torch
from retrieval_case import (
    GROUP,
    KV_HEADS,
    LAYERS,
    NUM_PIVOTS,
    Case,
    assert_same_tables,
    int32,
    look_at_blocks,
    make_case,
)
from triton_mode import DEVICE

from vllm_heterocache.kernels.drift_check import drift_check, page_launch
from vllm_heterocache.kernels.drift_check_ref import drift_check_ref
from vllm_heterocache.kernels.tables import drift_counters
from vllm_heterocache.kernels.values import DriftCounter, DriftRule

ALL_PIVOTS = list(range(NUM_PIVOTS))


def random_head_lse(num_rows: int) -> torch.Tensor:
    """Above every page's, in eighths like theirs."""
    shape = (LAYERS, (num_rows + 2) * KV_HEADS, GROUP)
    return torch.randint(4, 30, shape, device=DEVICE) / 8


def step_attention(case: Case, slots: list[int]) -> None:
    """Some pages of each pivot become its best ones."""
    for slot in set(slots) - {-1}:
        for pivot in ALL_PIVOTS:
            places = case.pivot_places(slot, pivot)
            pages = places.stop - places.start
            risen = torch.rand(pages, device=DEVICE) < random.choice([0, 0.01, 0.05])
            case.tables.page_lse[places][risen] = torch.randint(0, 9, (1,), device=DEVICE) / 8


class Twin:
    """A case twice, for the kernel and for the reference."""

    def __init__(self, page_counts: list[int]) -> None:
        self.ref = make_case(page_counts, DEVICE)
        self.waves_left = [self.ref.waves_left(0), self.ref.waves_left(0)]
        self.counters = [drift_counters(DEVICE) for _ in range(2)]
        self.max_pages = max(page_counts)

    def check(self, slots: list[int], threshold=0.7, waves=1) -> None:
        kernel = self.ref.copy()
        head_lse = random_head_lse(len(slots))
        for check, case, waves_left, counters in zip(
            (drift_check, drift_check_ref), (kernel, self.ref), self.waves_left, self.counters,
            strict=True,
        ):  # fmt: skip
            check(
                case.tables, case.maps, int32(slots, DEVICE), head_lse, DriftRule(threshold, waves),
                self.max_pages, waves_left, counters,
            )  # fmt: skip
        torch.testing.assert_close(
            kernel.tables.scores, self.ref.tables.scores, rtol=1e-6, atol=0, equal_nan=True
        )
        exact = kernel.tables._replace(scores=self.ref.tables.scores)
        assert_same_tables(exact, self.ref.tables)
        assert torch.equal(*self.waves_left) and torch.equal(*self.counters)


@pytest.mark.parametrize("threshold", [0.3, 0.7, 1.0])
@pytest.mark.parametrize(
    ("page_counts", "slots"),
    [
        ([63], [0]),
        ([37, 5, 111], [2, -1, 0, 1]),
        ([4, 1, 256, 85], [1, 3, 2, 0]),
        ([257, 700], [-1, 1]),
    ],
    ids=str,
)
def test_checks_are_those_of_the_reference(page_counts, slots, threshold):
    twin = Twin(page_counts)
    for step in range(5):
        step_attention(twin.ref, slots)
        twin.check(slots, threshold, waves=1 + step % 3)
    checks, drifts, fetched = twin.counters[0].tolist()
    assert checks > 0 and drifts > 0 and fetched == 0


def test_the_same_attention_twice_is_no_drift():
    twin = Twin([300])
    step_attention(twin.ref, [0])
    head_lse = torch.full((LAYERS, 3 * KV_HEADS, GROUP), 4.0, device=DEVICE)
    rows = int32([-1, 0], DEVICE)
    counters, waves_left = twin.counters[0], twin.waves_left[0]
    for drifts, waves in [(3, 2), (3, 1), (3, 0), (3, 0)]:
        tables, maps = twin.ref.tables, twin.ref.maps
        drift_check(tables, maps, rows, head_lse, DriftRule(1.0, 2), 300, waves_left, counters)
        assert (
            int(counters[DriftCounter.TRIGGERS]) == drifts and waves_left[0].tolist() == [waves] * 3
        )
    assert int(counters[DriftCounter.CHECKS]) == 12


def test_long_prompts_take_larger_blocks():
    lengths = (1, 256, 257, 16384, 65536)
    launches = [page_launch(n) for n in lengths]
    assert [launch.block for launch in launches] == [256, 256, 1024, 16384, 65536]
    assert not any(launch.looped for launch in launches)
    twin = Twin([4097])
    twin.check([0])


def test_prompts_with_more_pages_than_registers_share_one_looped_launch():
    assert page_launch(65537) == page_launch(131072) and page_launch(65537).looped
    with pytest.raises(AssertionError, match="131073"):
        page_launch(131073)


@pytest.mark.parametrize("page_counts", [[65537], [131072], [37, 131071]], ids=str)
def test_checks_of_prompts_with_more_pages_than_registers(page_counts):
    twin = Twin(page_counts)
    slots = [-1, *range(len(page_counts))]
    step_attention(twin.ref, slots)
    twin.check(slots)
    assert twin.counters[0][DriftCounter.TRIGGERS] > 0


def test_checks_in_blocks_are_those_of_the_reference(monkeypatch):
    look_at_blocks(monkeypatch, 64)
    twin = Twin([63, 64, 1, 150])
    for step in range(3):
        step_attention(twin.ref, [2, -1, 3, 0, 1])
        twin.check([2, -1, 3, 0, 1], [0.7, 1.0, 0.3][step], waves=1 + step)
    checks, drifts, fetched = twin.counters[0].tolist()
    assert checks == 36 and drifts > 0 and fetched == 0


def test_in_blocks_the_same_attention_twice_is_no_drift(monkeypatch):
    look_at_blocks(monkeypatch, 256)
    test_the_same_attention_twice_is_no_drift()


def test_no_row_is_no_launch():
    twin = Twin([37])
    twin.check([])
    assert not twin.counters[0].any()
