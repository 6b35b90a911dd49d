from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Callable

import pytest
import torch
from step_case import SMALL_ROWS, UNSET, StepCase, StepRow, make_step_case

from vllm_heterocache.kernels.step_select_ref import exact_step_select_ref, step_select_ref
from vllm_heterocache.kernels.top_pages_ref import MAX_KEY, signed_keys_ref
from vllm_heterocache.kernels.values import Protected


def slow_bound(queries: list[list[float]], keys: list[list[float]]) -> float:
    """The most that any key in the box around `keys` has with any query."""
    bounds = []
    for query in queries:
        bound = 0.0
        for channel, q in enumerate(query):
            values = [key[channel] for key in keys]
            bound += max(q * min(values), q * max(values))
        bounds.append(bound)
    return max(bounds)


def slow_signed_key(score: float) -> tuple[int, int]:
    """Sign, exponent and the upper 11 bits of the fraction, so that tuples are in order."""
    bits = struct.unpack("<I", struct.pack("<f", score))[0]
    size = bits & 0x7FFFFFFF
    return (1, size >> 12) if bits < 1 << 31 else (0, -((size + 0xFFF) >> 12))


def slow_choice(keys: list, count: int, sinks: int, recent: int) -> list[int]:
    """Protected pages in order, then the best others; of equal ones the first."""
    protected = [p for p in range(len(keys)) if p < sinks or p >= len(keys) - recent]
    others = sorted(set(range(len(keys))) - set(protected), key=lambda p: (keys[p], -p))
    return sorted((protected + others[::-1])[:count])


def check_lists(
    case: StepCase, tables, keys_of: Callable[[int, int], list], sinks: int, recent: int
) -> None:
    """Every list of the layer names its best pages; nothing else is written."""
    entries, positions = [UNSET] * len(tables.entries), [UNSET] * len(tables.positions)
    for row, shape in enumerate(case.shapes):
        for head in range(tables.count.shape[2]):
            start = int(tables.start[row, case.layer, head])
            count = int(tables.count[row, case.layer, head])
            if not shape.num_tokens or count == shape.num_pages:
                continue
            chosen = slow_choice(keys_of(row, head), count, sinks, recent)
            positions[start : start + count] = chosen
            entries[start : start + count] = case.page_ids(row, head)[chosen].tolist()
    assert tables.positions.tolist() == positions
    assert tables.entries.tolist() == entries


def grouped(case: StepCase, row: int, head: int) -> torch.Tensor:
    """[G, D]"""
    return case.query[row].view(case.tables.count.shape[2], -1, case.query.shape[2])[head]


@pytest.mark.parametrize("protected", [(0, 0), (1, 3), (5, 0), (0, 200)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 2), (3, 2, 5)], ids=str)
def test_lists_name_the_pages_of_the_largest_bounds(shape, protected, generator):
    case = make_step_case(*shape, 8, torch.float32, generator, layer=shape[0] - 1)
    tables = case.fresh()
    step_select_ref(case.query, tables, case.step, case.rows, case.layer, Protected(*protected))

    def keys_of(row: int, head: int) -> list:
        queries = grouped(case, row, head).tolist()
        pages = case.pages[case.page_ids(row, head), :, :8].tolist()
        return [slow_signed_key(slow_bound(queries, keys)) for keys in pages]

    check_lists(case, tables, keys_of, *protected)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 2)], ids=str)
def test_lists_name_the_pages_of_the_largest_attention(shape, generator, exact_weights):
    # few pages, whose masses differ by more than a rounding
    rows = [StepRow(9, (4, 9, 0)), StepRow(0, (0,)), StepRow(7, (3,)), StepRow(5, (2,), 0)]
    case = make_step_case(*shape, 8, torch.float32, generator, rows)
    case.query += torch.randn(case.query.shape, generator=generator)
    tables = case.fresh()
    inputs = case.query, case.pages, tables, case.rows, case.layer, case.scale
    exact_step_select_ref(*inputs, Protected(1, 2))

    def keys_of(row: int, head: int) -> list:
        keys = case.pages[case.page_ids(row, head), :, :8].flatten(0, 1)
        masses = [
            exact_weights(query, keys, case.scale).reshape(-1, 16).sum(axis=1)
            for query in grouped(case, row, head)
        ]
        best = [max(of_page) for of_page in zip(*masses, strict=True)]
        return [struct.unpack("<i", struct.pack("<f", mass))[0] >> 11 for mass in best]

    check_lists(case, tables, keys_of, 1, 2)


def test_bounds_are_above_every_logit(generator):
    case = make_step_case(1, 2, 3, 16, torch.float32, generator, SMALL_ROWS[:1])
    case.query.copy_(torch.randn(case.query.shape, generator=generator))
    for head in range(2):
        keys = case.pages[case.page_ids(0, head), :, :16]  # [P, PAGE, D]
        queries = grouped(case, 0, head)
        largest = (keys @ queries.T).amax(dim=(1, 2))
        for page, bound in enumerate(largest.tolist()):
            assert slow_bound(queries.tolist(), keys[page].tolist()) >= bound


def test_signed_keys_are_in_the_order_of_the_scores():
    rng = random.Random(4)
    scores = [rng.choice([-1, 1]) * rng.random() * 2.0 ** rng.randint(-60, 60) for _ in range(3000)]
    scores += [0.0, 1e-45, -1e-45, torch.inf, -torch.inf, 3.4e38, -3.4e38]
    keys = signed_keys_ref(torch.tensor(scores)).tolist()
    assert min(keys) >= 0 and max(keys) < MAX_KEY
    exact = [slow_signed_key(score) for score in scores]
    order = sorted(range(len(scores)), key=lambda i: exact[i])
    for before, after in itertools.pairwise(order):
        assert (keys[before] < keys[after]) == (exact[before] < exact[after])
        assert keys[before] <= keys[after]
    close = signed_keys_ref(torch.tensor([100.0, 100.2, -100.0, -100.2]))
    assert close[1] > close[0] and close[3] < close[2]
