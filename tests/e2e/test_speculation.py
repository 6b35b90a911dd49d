"""Drafts that are verified several at a time: the tokens are those without drafts, whatever was
rejected, and a rejected draft leaves nothing behind."""

from __future__ import annotations

from typing import Any, NamedTuple

import churn
import drafters
import gpu_scenarios
import numpy as np
import parallel
import pytest
from engines import NGRAM, assert_same_completions

NUM_TOKENS = 40
PERIOD = 70


def prompts() -> list[list[int]]:
    """A short one that stays dense, one whose drafts are wrong, and two of a repeated passage. The
    last chunk of the last prompt is as short as a row of drafts."""
    rng = np.random.default_rng(5)
    passage = rng.integers(0, 499, PERIOD).tolist()
    wrong = rng.integers(0, 99, 600).tolist()
    return [passage[:40], wrong, (passage * 12)[:800], (passage[::-1] * 12)[: 2 * 256 + 3]]


def generate(
    model: str,
    options: dict[str, Any] | None,
    speculation: dict[str, Any] | None,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """All prompts at once, twice: the second time from the prefix cache."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False, logprobs=2
    )
    settings = {"tensor_parallel_size": 1, "speculative_config": speculation, **(more or {})}
    with parallel.start(model, options, **settings) as engine:
        total = engine.num_free
        found: dict[str, Any] = {"outputs": []}
        for _ in range(2):
            outputs = engine.run(prompts(), sampling)
            found["outputs"] += [outputs[str(i)].outputs[0] for i in range(len(prompts()))]
        found["is_free"] = engine.num_free == total
        found["metrics"] = {} if options is None else engine.metrics()
        found["drafts"] = {
            metric.name.removeprefix("vllm:spec_decode_num_"): metric.value
            for metric in engine.llm.get_metrics()
            if metric.name.startswith("vllm:spec_decode_num_") and hasattr(metric, "value")
        }
    return found


def assert_drafts_are_alike(ours: dict[str, Any], stock: dict[str, Any]) -> None:
    """Near ties may decide some drafts otherwise, and steps of prefills may fall otherwise."""
    assert ours.keys() == stock.keys()
    for name, count in stock.items():
        assert abs(ours[name] - count) <= 0.2 * stock["draft_tokens"]


def run(*args: Any) -> dict[str, Any]:
    """In a process of its own: vLLM 0.32 starts no second engine on the CPU once it has drafted."""
    return gpu_scenarios.alone(generate, *args)


def check_drafts(found: dict[str, Any]) -> None:
    """Some were accepted and some rejected, and nothing stays behind."""
    accepted, proposed = found["drafts"]["accepted_tokens"], found["drafts"]["draft_tokens"]
    assert 0 < accepted < proposed
    assert found["is_free"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return parallel.write_model(tmp_path_factory.mktemp("drafts"), "float32")


@pytest.mark.feature("n-gram drafts")
def test_full_budget_gives_the_tokens_of_stock_with_the_same_drafts(model):
    stock = run(model, None, NGRAM)
    ours = run(model, parallel.options(model, 1.0), NGRAM)
    assert_same_completions(ours["outputs"], stock["outputs"])
    check_drafts(ours)
    assert ours["metrics"]["requests_compacted{}"] == 2 * 3


@pytest.mark.feature("n-gram drafts")
def test_less_budget_gives_the_tokens_of_the_same_engine_without_drafts(model):
    options = parallel.options(model, parallel.BUDGET, drift_threshold=0.0)
    without = run(model, options, None)
    ours = run(model, options, NGRAM)
    assert_same_completions(ours["outputs"], without["outputs"])
    check_drafts(ours)
    rows, rows_without = (run["metrics"][churn.COMPACT] for run in (ours, without))
    assert 0 < rows < rows_without, "a row of accepted drafts is one row"


class Drafter(NamedTuple):
    """A model, its drafter, and what its engine without drafts says at less budget."""

    model: str
    speculation: dict[str, Any]
    engine: dict[str, Any]  # arguments

    def run(self, options: dict[str, Any] | None, with_drafts: bool = True) -> dict[str, Any]:
        return run(self.model, options, self.speculation if with_drafts else None, self.engine)

    def check(self, found: dict[str, Any]) -> None:
        """vLLM counts the drafts, and nothing stays behind. Random weights are never right."""
        accepted, proposed = found["drafts"]["accepted_tokens"], found["drafts"]["draft_tokens"]
        assert proposed > 0
        assert (accepted > 0) == (self.speculation["method"] == "draft_model")
        assert accepted < proposed
        assert found["is_free"]


METHODS = [
    pytest.param("draft_model", marks=pytest.mark.feature("Draft models")),
    pytest.param("eagle", marks=pytest.mark.feature("EAGLE")),
    pytest.param("eagle3", marks=pytest.mark.feature("EAGLE")),
    pytest.param("mtp", marks=pytest.mark.feature("MTP")),
]


@pytest.fixture(scope="module", params=METHODS)
def drafter(request, tmp_path_factory) -> Drafter:
    folder = tmp_path_factory.mktemp(request.param)
    model = parallel.write_model(folder / "model", "float32")
    if request.param == "mtp":
        drafters.write_mimo(model)
        speculation, engine = {"method": "mtp"}, {"trust_remote_code": True}
    else:
        write = getattr(drafters, f"write_{request.param}")
        speculation, engine = write(model, folder / "drafter"), {}
    speculation["num_speculative_tokens"] = drafters.NUM_DRAFTS
    return Drafter(model, speculation, engine)


def test_with_a_drafter_full_budget_gives_the_tokens_of_stock_with_the_same_drafter(drafter):
    stock = drafter.run(None)
    ours = drafter.run(parallel.options(drafter.model, 1.0))
    assert_same_completions(ours["outputs"], stock["outputs"])
    drafter.check(ours)
    assert ours["metrics"]["requests_compacted{}"] == 2 * 3
    assert_drafts_are_alike(ours["drafts"], stock["drafts"])


def test_with_a_drafter_less_budget_gives_the_tokens_of_the_same_engine_without_drafts(drafter):
    options = parallel.options(drafter.model, parallel.BUDGET, drift_threshold=0.0)
    without = drafter.run(options, with_drafts=False)
    ours = drafter.run({**options, "debug_poison": True})
    assert_same_completions(ours["outputs"], without["outputs"])
    drafter.check(ours)
    rows, rows_without = (run["metrics"][churn.COMPACT] for run in (ours, without))
    assert 0 < rows <= rows_without, "a row of accepted drafts is one row"
