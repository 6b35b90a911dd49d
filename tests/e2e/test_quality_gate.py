"""Answers on trial: what each policy keeps of stock vLLM's, against recorded bounds.

tests/quality_thresholds.json has the bounds, what was measured, and how. Each configuration gets
one engine, which answers a chain and continues a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from engines import DTYPE, GIB, spare_collections

from vllm_heterocache.evaluation.engine import runner, worker
from vllm_heterocache.evaluation.report import report
from vllm_heterocache.evaluation.run_folder import Run, RunFolder, configuration
from vllm_heterocache.evaluation.sample import Sample, SuiteSettings
from vllm_heterocache.evaluation.suites.quick import QuickSuite

RECORD = json.loads((Path(__file__).parents[1] / "quality_thresholds.json").read_text())
LENGTHS, BOUNDS = RECORD["lengths"], RECORD["bounds"]
SHORT, LONG = LENGTHS
# What each configuration is asked: the smallest budget alone needs the longer texts. Policy snapkv
# shows that the gate tells bad answers.
ASKED = {
    ("heterocache", 0.2): [SHORT],
    ("heterocache", 0.1): [SHORT],
    ("heterocache", 0.05): [LONG],
    ("snapkv", 0.2): [SHORT],
}
CONFIGURATIONS = [
    configuration({"policy": policy, "gpu_budget": budget}) for policy, budget in ASKED
]
LENGTHS_OF = {one.name: asked for one, asked in zip(CONFIGURATIONS, ASKED.values(), strict=True)}
SMALL_ENGINE = {
    "dtype": DTYPE,
    "kv_cache_memory_bytes": 2 * GIB,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 8,
}
# Far beyond what one answer of eight more or less, or another machine's rounding, can do.
GAP = 0.2
MOST_OUTPUT = 200  # tokens of a chain's questions and answers, which stay dense


class SuiteOfLengths(QuickSuite):
    """The run's samples of these lengths alone."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__()
        self._lengths = tuple(lengths)

    def samples(self, tokenizer, settings: SuiteSettings) -> Iterator[Sample]:
        return super().samples(tokenizer, replace(settings, lengths=self._lengths))


@pytest.fixture(scope="module")
def cells(long_model: str, tmp_path_factory) -> dict[tuple[str, str, int], report.ScoreCell]:
    """(configuration, task, length) -> its cell, those of stock too."""
    settings = SuiteSettings(
        lengths=tuple(LENGTHS), num_samples=RECORD["samples"], extra=RECORD["extra"]
    )
    run = Run(long_model, "quick", settings, SMALL_ENGINE, batch=8)
    folder = RunFolder(tmp_path_factory.mktemp("gate") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        failures = runner.evaluate(folder, run, CONFIGURATIONS, False, run_here(run))
    found = report.write(folder, CONFIGURATIONS, failures)
    print((folder.path / "report.md").read_text())
    assert not failures
    return {(cell.configuration.name, cell.task, cell.length): cell for cell in found}


def run_here(run: Run) -> runner.RunEngine:
    """Engines one after the other in this process, which saves all but one start of Python."""
    from vllm.distributed import cleanup_dist_env_and_memory

    tokenizer = worker.load_tokenizer(run.model, run.llm)

    def run_engine(folder, one, stop) -> None:
        suite = SuiteOfLengths(LENGTHS_OF.get(one.name, LENGTHS))
        spare_collections()
        worker.run_configuration(folder, one, tokenizer, worker.open_vllm, suite)
        cleanup_dist_env_and_memory()

    return run_engine


def is_within(limits: dict[str, float], value: float) -> bool:
    return limits.get("at_least", 0.0) <= value <= limits.get("at_most", float("inf"))


def name_of(bound: dict) -> str:
    return f"{bound['configuration']}-{bound['task']}-{bound['length']}".replace(" ", "-")


@pytest.mark.parametrize("length", LENGTHS)
def test_stock_answers_what_the_gate_asks(cells, length):
    """Else the bounds below would say nothing."""
    assert cells["stock", "prose", length].score >= 0.875
    assert cells["stock", "fidelity", length].metrics["kl"] == 0


@pytest.mark.parametrize("bound", BOUNDS, ids=name_of)
def test_answers_are_within_the_recorded_bounds(cells, bound, record_property):
    cell = cells[bound["configuration"], bound["task"], bound["length"]]
    for metric, limits in bound["metrics"].items():
        value = cell.score if metric == "score" else cell.metrics[metric]
        record_property(metric, value)
        assert is_within(limits, value), (metric, value, limits)


def test_heterocache_answers_more_with_half_the_memory_of_a_policy_that_evicts(cells):
    ours, theirs = (cells[name, "prose", SHORT].score for name in ("heterocache 0.1", "snapkv 0.2"))
    assert ours >= theirs + GAP, (ours, theirs)


@pytest.mark.parametrize("tried", CONFIGURATIONS, ids=lambda one: one.name)
def test_budgets_are_what_was_held_and_read(cells, tried):
    """A policy that kept everything in silence would pass all bounds from below."""
    budget = tried.options["gpu_budget"]
    for length in LENGTHS_OF[tried.name]:
        cell = cells[tried.name, "prose", length]
        tail = (MOST_OUTPUT + 32) / length
        assert budget < cell.resident_share < 1.05 * budget + tail
        assert 0.9 * budget < cell.read_share < budget + tail
        assert (cell.reads["fetched"] > 0) == (tried.options["policy"] == "heterocache")


def test_every_configuration_has_bounds_at_each_of_its_lengths():
    there = {(b["configuration"], b["task"], b["length"]) for b in BOUNDS}
    assert there == {
        (one.name, task, length)
        for one in CONFIGURATIONS
        for task in ("prose", "fidelity")
        for length in LENGTHS_OF[one.name]
    }


def test_recorded_values_are_within_their_own_bounds():
    for bound in BOUNDS:
        for limits in bound["metrics"].values():
            assert is_within(limits, limits["measured"]), bound
            assert {"at_least", "at_most"} & limits.keys(), bound
