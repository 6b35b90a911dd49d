from __future__ import annotations

import pytest
import torch
from step_case import make_step_case
from test_step_select import check_lists, grouped, slow_signed_key

from vllm_heterocache.kernels.one_bit_step_select_ref import (
    one_bit_keys_ref,
    one_bit_step_select_ref,
    page_bits_ref,
)
from vllm_heterocache.kernels.tables import StepTables
from vllm_heterocache.kernels.values import Protected


def with_bits(pages: torch.Tensor, summaries: torch.Tensor, blocks, per_block: int) -> StepTables:
    size = pages.shape[0], pages.shape[2]
    bits = torch.zeros(size, dtype=torch.uint8)
    step = StepTables(summaries, torch.empty(0, dtype=torch.int32), 0, bits)
    page_bits_ref(pages, torch.tensor(blocks), per_block, step)
    return step


def slow_keys(page: torch.Tensor) -> list[list[float]]:
    """One-bit keys of a page [PAGE, D]."""
    channels = []
    for channel in page.T.tolist():
        least, largest = min(channel), max(channel)
        channels.append([largest if 2 * k > least + largest else least for k in channel])
    return [list(token) for token in zip(*channels, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_keys_are_rounded_to_the_nearer_bound_of_their_page(dtype, generator):
    pages = torch.randn(12, 16, 10, generator=generator).to(dtype)
    keys = pages[..., :5].float()
    summaries = torch.stack((keys.amin(1), keys.amax(1)), dim=1).to(dtype)
    step = with_bits(pages, summaries, [3, 0], 3)
    for page in (9, 10, 11, 0, 1, 2):
        found = one_bit_keys_ref(step, torch.tensor([[page]]))[0, 0]
        assert found.tolist() == slow_keys(keys[page])
    assert not step.bits[3:9].any(), "of other blocks"


@pytest.mark.parametrize("protected", [(0, 0), (1, 3), (0, 200)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 2)], ids=str)
def test_lists_name_the_pages_of_the_largest_one_bit_logits(shape, protected, generator):
    case = make_step_case(*shape, 8, torch.float32, generator, layer=shape[0] - 1)
    per_block = shape[0] * shape[1]
    pages = case.pages.nan_to_num(0.0)
    summaries = case.step.summaries.nan_to_num(0.0)
    step = with_bits(pages, summaries, list(range(len(pages) // per_block)), per_block)
    tables = case.fresh()
    args = (step, case.rows, case.layer, Protected(*protected))
    one_bit_step_select_ref(case.query, tables, *args)

    def keys_of(row: int, head: int) -> list:
        queries, ids = grouped(case, row, head).double(), case.page_ids(row, head)
        keys = [torch.tensor(slow_keys(page[:, :8])).double() for page in pages[ids]]
        return [slow_signed_key((queries @ one.T).max().item()) for one in keys]

    check_lists(case, tables, keys_of, *protected)


def test_a_token_that_has_all_channels_wins_where_a_bound_takes_the_page_that_has_them_apart():
    """Quest's box joins the channels of different tokens; one bit a token tells them apart."""
    apart, together = torch.zeros(16, 4), torch.zeros(16, 4)
    apart[0, 0], apart[1, 1] = 3.0, 3.0
    together[0, :2] = 2.0
    pages = torch.cat((torch.stack((apart, together)), torch.zeros(2, 16, 4)), dim=2)
    keys = pages[..., :4]
    step = with_bits(pages, torch.stack((keys.amin(1), keys.amax(1)), dim=1), [0, 1], 1)
    query = torch.tensor([1.0, 1.0, 0.0, 0.0])
    bounds = (query.clamp(min=0) * step.summaries[:, 1]).sum(1)
    assert bounds.argmax() == 0
    logits = one_bit_keys_ref(step, torch.arange(2)) @ query
    assert logits.amax(1).argmax() == 1
