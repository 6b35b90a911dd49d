from __future__ import annotations

import math

import pytest
import torch
from finder_case import FINDERS, make_finder_case, places, quantize

from vllm_heterocache.kernels.quantized_keys_ref import keys_of_codes_ref, quantized_keys_ref


def slow_key(keys: list[float], token: int) -> float:
    """Of one channel of a page, to two bits."""
    least, step = min(keys), (max(keys) - min(keys)) / 3
    return least if step == 0 else least + step * math.floor((keys[token] - least) / step + 0.5)


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
