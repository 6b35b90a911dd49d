"""bench_kernels.py and its parts on tiny cells: wrong results are refused, rows say what was
measured. FlashAttention 3 needs a GPU and is left out."""

from __future__ import annotations

import json

import pytest
import torch
from bench_scripts import ROW_KEYS, decode_cells, decode_timing, mean_timing
from triton_mode import ON_GPU

pytestmark = pytest.mark.slow


@pytest.fixture
def cell(monkeypatch):
    monkeypatch.setattr(decode_cells, "COLD_BYTES", 1)
    return decode_cells.make_cell(1, 1024, "2full", least_layers=1)


def test_a_cell_is_timed_with_and_without_scores_and_means(cell):
    us, _ = decode_timing.time_ours(cell, cell.reference(0), "scored", None, cell.due_pivot)
    assert us > 0
    cell.tables.count[0, 0, 0] += 13  # enough pages for a mean page
    means = cell.with_means()
    assert means.tables.mean_pages.any() and not means.tables.mean_pages[:, means.is_pivot].any()
    assert torch.equal(means.tables.count + means.tables.mean_pages, cell.tables.count)
    assert decode_timing.time_with_means(cell) > 0


def test_a_wrong_output_is_refused(cell):
    exact = cell.reference(0)
    wrong = exact._replace(output=exact.output + 1)
    with pytest.raises(SystemExit, match="paged_decode plain before timing is wrong"):
        decode_timing.time_ours(cell, wrong, "plain")


@pytest.mark.skipif(ON_GPU, reason="the real size is for the GPU")
def test_the_row_of_page_means(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(mean_timing, "NUM_LAYERS", 1)
    page_means = mean_timing.page_means

    def page_means_of_int32(pages, tables, *args) -> None:
        """The interpreter takes wider integers too, Triton's compiler does not."""
        assert tables.count.dtype == tables.mean_pages.dtype == torch.int32
        page_means(pages, tables, *args)

    monkeypatch.setattr(mean_timing, "page_means", page_means_of_int32)
    mean_timing.report_means(str(tmp_path), "abc", prompt_pages=48)
    (line,) = (tmp_path / "kernels.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row.keys() >= ROW_KEYS and row["benchmark"] == "page_means"
    assert row["read_bytes"] == (48 - 5) * 8 * 16 * 256 * 2 and row["ms"][0] > 0
    assert row["config"] == {"budget_pages": 6, "mean_pages": 1}
    monkeypatch.setattr(mean_timing, "page_means", lambda *args: None)
    with pytest.raises(AssertionError, match="page_means is wrong"):
        mean_timing.report_means(None, "abc", prompt_pages=48)
