"""Kernels of policy `quest` in kernel_times.py: wrong results are refused, rows are whole."""

from __future__ import annotations

import json

import kernel_times
import pytest
import torch
from bench_scripts import ROW_KEYS
from triton_mode import DEVICE, ON_GPU

from common import step_kernels


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(step_kernels, "TABLE_WIDTH", 256)
    if not ON_GPU:  # each program costs time in the interpreter
        monkeypatch.setattr(step_kernels.module, "MAX_PROGRAMS", 16)


@pytest.mark.slow
def test_rows_of_tiny_cells(tmp_path):
    arguments = "--tiny --kernels page_summaries step_select --cells 2x256-50 --commit abc"
    kernel_times.main([*arguments.split(), "--out", str(tmp_path)])
    lines = (tmp_path / "kernels.jsonl").read_text().splitlines()
    summaries, select = map(json.loads, lines)
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
