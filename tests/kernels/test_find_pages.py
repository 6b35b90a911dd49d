from __future__ import annotations

import pytest
import torch
from finder_case import DUE, FINDERS, PIVOTS, SIZES, TOKENS, make_finder_case, places, quantize

from vllm_heterocache.kernels.find_pages_ref import find_pages_ref
from vllm_heterocache.kernels.quantized_keys_ref import keys_of_codes_ref, quantized_keys_ref


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
