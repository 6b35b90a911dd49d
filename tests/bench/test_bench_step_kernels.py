"""Kernels that choose pages, in kernel_times.py: wrong results are refused, rows are whole."""

from __future__ import annotations

import json

import kernel_times
import pytest
import torch
from bench_scripts import ROW_KEYS
from triton_mode import DEVICE, ON_GPU

from common import (
    exchange_kernels,
    finder_kernels,
    hybrid_kernels,
    one_bit_kernels,
    step_kernels,
)
from vllm_heterocache.kernels.values import Protected


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(step_kernels, "TABLE_WIDTH", 256)
    if not ON_GPU:  # each program costs time in the interpreter
        monkeypatch.setattr(step_kernels.module, "MAX_PROGRAMS", 16)
        monkeypatch.setattr(finder_kernels.module, "MAX_PROGRAMS", 16)


def rows_of(arguments: str, folder) -> list[dict]:
    kernel_times.main(["--tiny", *arguments.split(), "--out", str(folder)])
    return [json.loads(line) for line in (folder / "kernels.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_rows_of_tiny_cells(tmp_path):
    arguments = "--kernels page_summaries step_select --cells 2x256-50 --commit abc"
    summaries, select = rows_of(arguments, tmp_path)
    assert summaries["benchmark"] == "page_summaries" and select["benchmark"] == "step_select"
    assert all(row.keys() >= ROW_KEYS and row["median_us"] > 0 for row in (summaries, select))
    assert summaries["config"]["moved_bytes"] == 60 * 8 * 18 * 128 * 2
    assert select["summary_bytes"] == 2 * 12 * 8 * 2 * 128 * 2


def test_wrong_lists_and_summaries_are_refused(monkeypatch):
    cell = step_kernels.make_cell(1, 512, 0.25, 1)
    monkeypatch.setattr(cell, "summarize", lambda: None)
    with pytest.raises(SystemExit, match="page_summaries is wrong"):
        step_kernels.check_summaries(cell)
    cell.step.summaries.zero_()
    with pytest.raises(SystemExit, match="a choice is wrong"):
        step_kernels.check_lists(cell, lambda layer: None, "a choice")
    assert cell.pages.device.type == DEVICE.type and torch.equal(cell.pages * 4 % 1, cell.pages * 0)


@pytest.fixture
def pages_read(monkeypatch):
    """In place of the time of decode attention, the pages that it would read in a layer."""

    def count(cell, exact, what: str) -> tuple[float, float]:
        slots = cell.rows.row_to_table_slot.long()
        own = cell.rows.seq_lens // 16 - cell.tables.prompt_pages[slots]
        return float(cell.lists(0)[1].sum() + own.sum() * 8), 0.0

    for module in (step_kernels, hybrid_kernels):
        monkeypatch.setattr(module, "time_ours", count)


@pytest.mark.slow
def test_rows_of_one_bit_keys_and_of_kept_pages(pages_read, tmp_path):
    arguments = "--kernels one_bit_step_select hybrid_step_select --cells 1x256-50"
    one_bit, hybrid = rows_of(arguments, tmp_path)
    assert all(row.keys() >= ROW_KEYS and row["median_us"] > 0 for row in (one_bit, hybrid))
    assert one_bit["benchmark"] == "one_bit_step_select"
    assert one_bit["summary_bytes"] == 12 * 8 * 512 and one_bit["bit_bytes"] == 12 * 8 * 256
    assert one_bit["keys_us"] > 0 and one_bit["choose_us"] > 0
    assert one_bit["decode_us"] == (6 + 4) * 8 and one_bit["whole_decode_us"] == 16 * 8
    assert hybrid["benchmark"] == "hybrid_step_select"
    assert hybrid["config"] == {"share": 0.5, "kept_pages": 6, "read_pages": 5, "num_layers": 1}
    assert hybrid["decode_us"] == (5 + 4) * 8 and hybrid["kept_decode_us"] == (6 + 4) * 8


@pytest.mark.slow
def test_rows_of_finders(pages_read, monkeypatch, tmp_path):
    monkeypatch.setattr(exchange_kernels, "PROTECTED", Protected(0, 0))  # the list has one page
    kernels = "quantized_keys find_pages exchange_pages"
    rows = rows_of(f"--kernels {kernels} --cells 1x256-2finder", tmp_path)
    one, two, find, exchange = rows
    assert all(row.keys() >= ROW_KEYS and row["median_us"] > 0 for row in rows)
    assert [row["config"]["finders"] for row in (one, two, find)] == [1, 2, 2]
    assert one["config"]["moved_bytes"] == 60 * (16 * 256 + 512 + 512)
    assert two["config"]["moved_bytes"] == 2 * one["config"]["moved_bytes"]
    assert find["code_bytes"] == find["grid_bytes"] == 2 * 12 * 512
    assert find["no_row_due_us"] > 0
    moved = exchange["moved_pages"]
    assert 0 < moved <= 1 and exchange["moved_bytes"] == moved * 2 * 16 * 256 * 2
    times = ("nothing_better_us", "no_row_due_us", "with_search_us")
    assert all(exchange[time] > 0 for time in times)
    for row in (find, exchange):
        assert row["decode_us"] == (1 + 4) * 8 and row["whole_decode_us"] == 16 * 8


def test_wrong_one_bit_keys_are_refused():
    cell = one_bit_kernels.cell_of("1x256-50", 1)
    cell.summarize()
    step_kernels.check_lists(cell, cell.select, "a choice")
    by_summaries = super(one_bit_kernels.OneBitCell, cell).select
    with pytest.raises(SystemExit, match="a choice is wrong"):
        step_kernels.check_lists(cell, by_summaries, "a choice")


def test_wrong_orders_of_kept_pages_are_refused():
    cell = hybrid_kernels.make_cell(1, 256, "50", 2)
    hybrid_kernels.check_permuted(cell, cell.select, "a choice")
    positions = cell.by_head(cell.tables.positions)

    def swap(layer: int, *pages: int) -> None:
        cell.select(0)
        positions[:, layer, 0, list(pages)] = positions[:, layer, 0, list(reversed(pages))]

    wrong = {
        "a choice, in its order, is wrong": lambda _: swap(0, 0, 1),
        "a choice, in another layer, is wrong": lambda _: swap(1, 0, 1),
    }
    for message, select in wrong.items():
        with pytest.raises(SystemExit, match=message):
            hybrid_kernels.check_permuted(cell, select, "a choice")

    def lose_pages(_: int) -> None:
        cell.select(0)
        cell.by_head(cell.tables.entries)[:, 0] += 1

    with pytest.raises(SystemExit, match="a choice, in its pages, is wrong"):
        hybrid_kernels.check_permuted(cell, lose_pages, "a choice")


def exchange_nearest(cell: hybrid_kernels.HybridCell) -> list[int]:
    """Let the first head list the best of its idle pages in place of the worst of its list; their
    entries, of which the one that was listed is the first."""
    scores, size = hybrid_kernels.page_scores(cell)[0, 0], cell.num_read
    pair = [int(scores[:size].argmin()), size + int(scores[size:].argmax())]
    entries, positions = (
        cell.by_head(arena)[0, 0, 0] for arena in (cell.tables.entries, cell.tables.positions)
    )
    exchanged = entries[pair].tolist()
    for arena in (entries, positions):
        arena[pair] = arena[pair[::-1]]
    order = torch.cat((positions[:size].argsort(), size + positions[size:].argsort()))
    for arena in (entries, positions):
        arena.copy_(arena[order])
    return exchanged


def test_a_single_wrong_page_is_refused_and_one_of_the_same_score_is_not():
    cell = hybrid_kernels.make_cell(1, 512, "50", 1)
    with pytest.raises(SystemExit, match=r"a choice, in a score \S+ below one that is not listed"):
        hybrid_kernels.check_permuted(cell, lambda _: None, "a choice")
    chosen: list[int] = []

    def choose_wrong(layer: int) -> None:
        cell.select(layer)
        chosen[:] = exchange_nearest(cell)

    with pytest.raises(SystemExit, match="a choice, in a score"):
        hybrid_kernels.check_permuted(cell, choose_wrong, "a choice")
    summaries, pair = cell.step.summaries, set(chosen)
    summaries[chosen[1]] = summaries[chosen[0]]
    hybrid_kernels.check_permuted(cell, choose_wrong, "a choice")
    assert set(chosen) == pair


def test_wrong_codes_and_scores_of_finders_are_refused():
    cell = finder_kernels.make_cell(2, 256, 1, 1)
    with pytest.raises(SystemExit, match="quantized_keys, codes, is wrong"):
        finder_kernels.check_quantized(cell, lambda row: None, "quantized_keys")
    for row in range(2):
        cell.quantize(row)
    finder_kernels.check_found(cell, cell.find, "find_pages")
    with pytest.raises(SystemExit, match="find_pages is wrong"):
        finder_kernels.check_found(cell, cell.none_due().find, "find_pages")

    def off(layer: int) -> None:
        cell.find(layer)
        cell.tables.page_lse[-1] += 0.1

    with pytest.raises(SystemExit, match="find_pages is wrong"):
        finder_kernels.check_found(cell, off, "find_pages")

    def off_in_sum(layer: int) -> None:
        cell.find(layer)
        cell.program_lse[layer] += 0.1

    with pytest.raises(SystemExit, match="find_pages, a sum, is wrong"):
        finder_kernels.check_found(cell, off_in_sum, "find_pages")


def test_wrong_exchanges_are_refused(monkeypatch):
    monkeypatch.setattr(exchange_kernels, "PROTECTED", Protected(0, 0))  # the list has one page
    cell = exchange_kernels.make_cell("1x256-2finder", 1)
    negated = cell.negated()
    for one in (cell, negated):
        one.find_all()
    cell.hold_best()
    assert exchange_kernels.pages_moved(cell, cell.exchange, 1) == 0
    exchange_kernels.check_exchanged(negated, lambda one: one.exchange(0), "an exchange")
    wrong = {
        "positions": lambda one: None,
        "is_resident": lambda one: one.tables.is_resident.fill_(1),
        "scores": lambda one: one.tables.scores.mul_(1.1),
        "pages": lambda one: one.pages[0].add_(1),
        "counters": lambda one: one.counters.zero_(),
    }
    for what, spoil in wrong.items():

        def exchange(one, what=what, spoil=spoil) -> None:
            if what != "positions":
                one.exchange(0)
            spoil(one)

        with pytest.raises(SystemExit, match=f"an exchange, {what}, is wrong"):
            exchange_kernels.check_exchanged(negated, exchange, "an exchange")
    assert exchange_kernels.pages_moved(negated, negated.exchange, 1) > 0
    with pytest.raises(SystemExit, match=r"moved 0\.00 pages a finder, is wrong"):
        exchange_kernels.time_moving(negated, negated.exchange, 1, moves=True)
