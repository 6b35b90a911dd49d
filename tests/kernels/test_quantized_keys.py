from __future__ import annotations

import math

import pytest
import torch
from finder_case import DUE, FINDERS, PIVOTS, SIZES, TOKENS, make_finder_case, quantize

from vllm_heterocache.kernels.quantized_keys_ref import (
    find_pages_ref,
    keys_of_codes_ref,
    quantized_keys_ref,
)


def slow_key(keys: list[float], token: int) -> float:
    """Of one channel of a page, to two bits."""
    least, step = min(keys), (max(keys) - min(keys)) / 3
    return least if step == 0 else least + step * math.floor((keys[token] - least) / step + 0.5)


def places(case, row: int, finder: int) -> slice:
    slot = int(case.rows.row_to_table_slot[row])
    first = int(case.tables.first_stripe[slot]) * case.finders.width + finder * SIZES[row]
    return slice(first, first + SIZES[row])


@pytest.mark.parametrize("page_dtype", [None, torch.float8_e4m3fn], ids=str)
def test_codes_stand_for_the_nearest_of_four_numbers_between_the_bounds(page_dtype, generator):
    case = make_finder_case(1, 4, torch.float32, generator, page_dtype)
    before = case.finders.codes.clone()
    quantize(quantized_keys_ref, case)
    is_written = torch.zeros(len(before), dtype=torch.bool)
    for row in (0, 3, 4):
        for finder, flat in enumerate(FINDERS):
            is_written[places(case, row, finder)] = True
            found = keys_of_codes_ref(case.finders, places(case, row, finder))
            ids = case.blocks[row].long() * 6 + flat
            for page, keys in zip(found, case.pages[ids, :, :4].float(), strict=True):
                for d, channel in enumerate(keys.T.tolist()):
                    expected = [slow_key(channel, token) for token in range(16)]
                    assert page[:, d].tolist() == pytest.approx(expected, rel=1e-5, abs=4e-6)
    for finder in range(3):
        is_written[places(case, 2, finder)] = True
    assert torch.equal(case.finders.codes[~is_written], before[~is_written])


@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
def test_pages_get_the_log_sum_exps_of_their_quantised_keys(soft_cap, generator):
    case = make_finder_case(2, 8, torch.float32, generator)
    quantize(quantized_keys_ref, case)
    for layer in range(2):
        before = case.tables.page_lse.clone()
        find_pages_ref(
            case.query, case.tables, case.finders, case.rows, layer, 0.3, soft_cap=soft_cap
        )
        is_written = torch.zeros(len(before), dtype=torch.bool)
        for row, size in enumerate(SIZES):
            for finder, flat in enumerate(FINDERS):
                if flat // 3 != layer or not (DUE[row] and TOKENS[row] and size):
                    continue
                slot = int(case.rows.row_to_table_slot[row])
                first = int(case.tables.first_stripe[slot]) * 5 + PIVOTS[finder] * size
                is_written[first : first + size] = True
                keys = keys_of_codes_ref(case.finders, places(case, row, finder)).double()
                queries = case.query[row].view(3, 2, 8)[flat % 3].double() * 0.3
                logits = keys @ queries.T  # [P, PAGE, G]
                if soft_cap:
                    logits = soft_cap * (logits / soft_cap).tanh()
                expected = logits.exp().sum(1).log2().float()
                found = case.tables.page_lse[first : first + size]
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        rest = case.tables.page_lse[~is_written]
        torch.testing.assert_close(rest, before[~is_written], rtol=0, atol=0, equal_nan=True)
