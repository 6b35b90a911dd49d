"""The reference of `exchange_pages` on lists whose exchanges are worked out by hand."""

from __future__ import annotations

import torch
from exchange_case import WORKED, make_worked_case, worked_lists

from vllm_heterocache.kernels.exchange_pages_ref import exchange_pages_ref
from vllm_heterocache.kernels.values import DriftCounter, Protected


def test_each_part_exchanges_its_worst_page_for_its_best():
    case = make_worked_case(torch.Generator().manual_seed(7))
    before = case.pages.clone()
    exchange_pages_ref(
        case.pages, case.host_pages, case.tables, case.finders, case.rows, 0, Protected(1, 1),
        case.counters,
    )  # fmt: skip
    assert worked_lists(case) == [one.after for one in WORKED]
    first, came = 0, 0
    for row, one in enumerate(WORKED):
        for held, now in zip(one.before, one.after, strict=True):
            page = int(case.tables.entries[first])
            host = int(case.tables.host_blocks[case.tables.first_stripe[row] + now])
            expected = before[page] if held == now else case.host_pages[host]
            assert torch.equal(case.pages[page], expected)
            first, came = first + 1, came + (held != now)
        place = int(case.tables.first_stripe[row])
        resident = case.tables.is_resident[place : place + len(one.lse)].nonzero().flatten()
        assert resident.tolist() == sorted(one.after)
        scores = case.tables.scores[place : place + len(one.lse)]
        if one.is_due:
            lse = torch.tensor(one.lse, dtype=torch.float64)
            torch.testing.assert_close(scores.double(), lse.exp2() / lse.exp2().sum())
        else:
            assert scores.isnan().all()
    assert case.counters[DriftCounter.PAGES_FETCHED] == came
