"""kernel_times.py and its parts on tiny cells: wrong results are refused, rows say what was
measured. FlashAttention 3 needs a GPU and is left out."""

from __future__ import annotations

import json

import kernel_times
import pytest
import torch
from bench_scripts import ROW_KEYS
from triton_mode import ON_GPU

from common import cells, matched_tokens, page_gather, page_means, page_scores, paged_decode


@pytest.fixture
def cell():
    return cells.make_cell(1, 1024, "2full", num_layers=1)


@pytest.mark.slow
def test_a_cell_is_timed_with_and_without_scores_and_means(cell):
    us, _ = paged_decode.time_ours(cell, cell.reference(0), "scored", None, cell.pivot_of_head)
    assert us > 0
    cell.tables.count[0, 0, 0] += 13  # enough pages for a mean page
    means = cell.with_means()
    assert (
        means.tables.stand_in_pages.any()
        and not means.tables.stand_in_pages[:, means.is_pivot].any()
    )
    assert torch.equal(means.tables.count + means.tables.stand_in_pages, cell.tables.count)
    assert paged_decode.time_with_means(cell) > 0


@pytest.mark.slow
def test_a_cell_of_rows_that_verify_drafts_is_timed(cell):
    drafts = cell.with_queries(3)
    exact = drafts.reference(0)
    assert exact.output.shape[0] == 3 and not torch.equal(exact.output[0], exact.output[2])
    us, _ = paged_decode.time_ours(drafts, exact, "of drafts", None, drafts.pivot_of_head)
    assert us > 0


@pytest.mark.slow
def test_a_wrong_output_is_refused(cell):
    exact = cell.reference(0)
    wrong = exact._replace(output=exact.output + 1)
    with pytest.raises(SystemExit, match="paged_decode plain before timing is wrong"):
        paged_decode.time_ours(cell, wrong, "plain")


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="the real size is for the GPU")
def test_the_row_of_page_means(monkeypatch, tmp_path):
    real = page_means.page_means

    def page_means_of_int32(pages, tables, *args) -> None:
        """The interpreter takes wider integers too, Triton's compiler does not."""
        assert tables.count.dtype == tables.stand_in_pages.dtype == torch.int32
        real(pages, tables, *args)

    monkeypatch.setattr(page_means, "page_means", page_means_of_int32)
    kernel_times.main(["--tiny", "--kernels", "page_means", "--out", str(tmp_path)])
    (line,) = (tmp_path / "kernels.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row.keys() >= ROW_KEYS and row["benchmark"] == "page_means"
    assert row["read_bytes"] == (48 - 5) * 8 * 16 * 256 * 2 and row["ms"][0] > 0
    assert row["config"] == {"budget_pages": 6, "mean_pages": 1}
    monkeypatch.setattr(page_means, "page_means", lambda *args: None)
    with pytest.raises(AssertionError, match="page_means is wrong"):
        page_means.means_row(1, 48)


@pytest.mark.skipif(ON_GPU, reason="the real size is for the GPU")
def test_the_row_of_page_gather(monkeypatch):
    row = page_gather.gather_row(4096, 1 << 14)
    assert row["config"] == {
        "page_bytes": 4096,
        "moved_bytes": 1 << 14,
        "fetch_programs": page_gather.FETCH_PROGRAMS,
    }
    rates = [row[f"{name}_gb_per_s"] for name in ("pinned", "fetch", "one_copy")]
    assert all(len(rate) == 3 and min(rate) > 0 for rate in rates)
    monkeypatch.setattr(page_gather, "page_gather", lambda *args: None)
    with pytest.raises(SystemExit, match="page_gather is wrong"):
        page_gather.gather_row(4096, 1 << 14)


def test_cells_go_to_the_kernels_that_they_are_of(monkeypatch):
    args = kernel_times.parse_args("--cells 1x32K-10 8x32K-full 1x1K-dense 1x32K-2finder".split())
    rows = {
        kernel_times.step_kernels: "step_row",
        kernel_times.one_bit_kernels: "one_bit_row",
        kernel_times.hybrid_kernels: "hybrid_row",
        kernel_times.finder_kernels: "find_row",
        kernel_times.exchange_kernels: "exchange_row",
    }
    for module, row in rows.items():
        monkeypatch.setattr(module, row, lambda name, _: {"cell": name})
    monkeypatch.setattr(kernel_times, "measure", lambda name, *_: {"cell": name})
    monkeypatch.setattr(kernel_times, "fa3_dense_columns", lambda *_: {})
    expected = {
        "step_select": ["1x32K-10"],
        "one_bit_step_select": ["1x32K-10"],
        "hybrid_step_select": ["1x32K-10"],
        "find_pages": ["1x32K-2finder"],
        "exchange_pages": ["1x32K-2finder"],
        "paged_decode": ["8x32K-full", "1x1K-dense"],
    }
    for kernel, names in expected.items():
        assert [row["cell"] for row in kernel_times.ROWS[kernel](args)] == names


@pytest.mark.parametrize("cell", ["1x32K-some", "32K-10", "1x32K", "1x32K-0", "1x32K-101"])
def test_what_is_no_cell_is_refused(cell, capsys):
    with pytest.raises(SystemExit):
        kernel_times.parse_args(["--cells", cell])
    assert f"--cells: {cell} is no cell" in capsys.readouterr().err


def test_the_row_of_page_scores(monkeypatch, tmp_path):
    kernel_times.main(["--tiny", "--kernels", "page_scores", "--out", str(tmp_path)])
    row = json.loads((tmp_path / "kernels.jsonl").read_text())
    assert row.keys() >= ROW_KEYS and row["benchmark"] == "page_scores"
    assert all(row[f"{part}_ms"][0] > 0 for part in ("one", "several", "copy"))
    monkeypatch.setattr(page_scores, "page_scores", lambda *args: args[5].fill_(0.1))
    with pytest.raises(SystemExit, match="page_scores"):
        page_scores.scores_row(*page_scores.TINY)


def test_the_row_of_matched_tokens(monkeypatch, tmp_path):
    kernel_times.main(["--tiny", "--kernels", "matched_tokens", "--out", str(tmp_path)])
    row = json.loads((tmp_path / "kernels.jsonl").read_text())
    assert row.keys() >= ROW_KEYS and row["benchmark"] == "matched_tokens"
    assert all(row[f"{part}_ms"][0] > 0 for part in ("candidates", "match", "whole"))
    match = matched_tokens.match_candidates

    def unweighted(*args, **kwargs):
        return match(*args, **kwargs)._replace(bias=torch.zeros(1))

    monkeypatch.setattr(matched_tokens, "match_candidates", unweighted)
    with pytest.raises(SystemExit, match="match_tokens"):
        matched_tokens.matched_row(*matched_tokens.TINY)
