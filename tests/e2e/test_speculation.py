"""Drafts that are verified several at a time: the tokens are those without drafts, whatever was
rejected, and a rejected draft leaves nothing behind."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import churn
import drafters
import engines
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


def note_given_back(noted: set[str], engine: engines.Engine, step: int) -> None:
    """Whose block tables have holes after this step: classes of KV-cache specs."""
    for manager in engine.managers:
        if any(block.is_null for table in manager.req_to_blocks.values() for block in table):
            noted.add(type(manager.kv_cache_spec).__name__)


def generate(
    model: str,
    options: dict[str, Any] | None,
    speculation: dict[str, Any] | None,
    **kwargs: Any,
) -> dict[str, Any]:
    """All prompts at once, twice: the second time from the prefix cache."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False, logprobs=2
    )
    settings = {"tensor_parallel_size": 1, "speculative_config": speculation, **kwargs}
    with parallel.start(model, options, **settings) as engine:
        total = engine.num_free
        found: dict[str, Any] = {"outputs": [], "cached": [], "given_back": set()}
        for _ in range(2):
            outputs = engine.run(prompts(), sampling, partial(note_given_back, found["given_back"]))
            by_prompt = [outputs[str(i)] for i in range(len(prompts()))]
            found["outputs"] += [output.outputs[0] for output in by_prompt]
            found["cached"] += [output.num_cached_tokens for output in by_prompt]
        found["is_free"] = engine.num_free == total
        found["metrics"] = {} if options is None else engine.metrics()
        found["drafts"] = engine.drafts()
    return found


def run(*args: Any) -> dict[str, Any]:
    """In a process of its own: vLLM 0.32 starts no second engine on the CPU once it has looked for
    n-grams."""
    return gpu_scenarios.alone(generate, *args)


def check_drafts(found: dict[str, Any]) -> None:
    """Some were accepted and some rejected, and nothing stays behind."""
    accepted, proposed = found["drafts"]["accepted_tokens"], found["drafts"]["draft_tokens"]
    assert 0 < accepted < proposed
    assert found["is_free"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return parallel.write_model(tmp_path_factory.mktemp("drafts"), "float32")


@pytest.fixture(scope="module")
def without_drafts(model) -> dict[str, Any]:
    """At less budget."""
    return generate(model, parallel.options(model, parallel.BUDGET, drift_threshold=0.0), None)


@pytest.mark.feature("n-gram drafts")
def test_full_budget_gives_the_tokens_of_stock(model):
    """Of stock without drafts, which change no greedy token, and which take a process."""
    stock = generate(model, None, None)
    ours = run(model, parallel.options(model, 1.0), NGRAM)
    assert_same_completions(ours["outputs"], stock["outputs"])
    check_drafts(ours)
    assert ours["metrics"]["requests_compacted{}"] == 2 * 3


@pytest.mark.feature("n-gram drafts")
def test_less_budget_gives_the_tokens_of_the_same_engine_without_drafts(model, without_drafts):
    options = parallel.options(model, parallel.BUDGET, drift_threshold=0.0)
    ours = run(model, options, NGRAM)
    assert_same_completions(ours["outputs"], without_drafts["outputs"])
    check_drafts(ours)
    rows, rows_without = (run["metrics"][churn.COMPACT] for run in (ours, without_drafts))
    assert 0 < rows < rows_without, "a row of accepted drafts is one row"


def with_drafter(method: str, model: str, folder: Path) -> dict[str, Any]:
    """Drafts for the model, as vLLM takes them."""
    write = getattr(drafters, f"write_{method}")
    return write(model, folder / method) | {"num_speculative_tokens": drafters.NUM_DRAFTS}


def check_drafters_drafts(found: dict[str, Any], method: str) -> None:
    """A model's own first layers are sometimes right, and random weights never are. The model's
    blocks were given back while the request ran, and the drafter's were not."""
    accepted, proposed = found["drafts"]["accepted_tokens"], found["drafts"]["draft_tokens"]
    assert proposed > 0 and accepted < proposed
    assert (accepted > 0) == (method in ("draft_model", "mtp"))
    assert found["given_back"] == {"HeteroSpec"}
    assert found["is_free"]


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("draft_model", marks=pytest.mark.feature("Draft models")),
        pytest.param("eagle3", marks=pytest.mark.feature("EAGLE")),
    ],
)
def test_full_budget_gives_the_tokens_of_stock_with_the_same_drafter(model, method, tmp_path):
    speculation = with_drafter(method, model, tmp_path)
    full = parallel.options(model, 1.0, debug_poison=True)
    stock, ours = (generate(model, options, speculation) for options in (None, full))
    assert_same_completions(ours["outputs"], stock["outputs"])
    check_drafters_drafts(ours, method)
    assert ours["metrics"]["requests_compacted{}"] == 2 * 3
    assert ours["drafts"] == stock["drafts"], "the drafter reads the same KV, and vLLM counts it"


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("draft_model", marks=pytest.mark.feature("Draft models")),
        pytest.param("eagle", marks=pytest.mark.feature("EAGLE")),
    ],
)
def test_less_budget_gives_the_tokens_of_the_same_engine_without_a_drafter(
    model, method, without_drafts, tmp_path
):
    speculation = with_drafter(method, model, tmp_path)
    options = parallel.options(model, parallel.BUDGET, drift_threshold=0.0, debug_poison=True)
    ours = generate(model, options, speculation)
    assert_same_completions(ours["outputs"], without_drafts["outputs"])
    check_drafters_drafts(ours, method)
    rows, rows_without = (run["metrics"][churn.COMPACT] for run in (ours, without_drafts))
    assert 0 < rows <= rows_without, "a row of accepted drafts is one row"


@pytest.mark.feature("Draft models")
def test_finders_fetch_in_steps_that_verify_drafts(model, tmp_path):
    """By the first query of each row. The tokens are not those without drafts, which ask more
    often, but those of the prompt from the prefix cache."""
    options = parallel.options(model, parallel.BUDGET, debug_poison=True)
    found = generate(model, options, with_drafter("draft_model", model, tmp_path))
    check_drafters_drafts(found, "draft_model")
    assert found["metrics"]["pages_fetched{}"] > 0 and found["metrics"]["drift_checks{}"] == 0
    first, again = found["outputs"][: len(prompts())], found["outputs"][len(prompts()) :]
    assert_same_completions(again, first)
    logprobs = [position for one in found["outputs"] for position in one.logprobs]
    assert all(math.isfinite(e.logprob) for position in logprobs for e in position.values())


@pytest.mark.feature("MTP")
def test_mtp_gives_the_tokens_of_stock_and_those_without_drafts(tmp_path):
    model = drafters.write_mimo(tmp_path)
    full = parallel.options(model, 1.0, debug_poison=True)
    budget = parallel.options(model, parallel.BUDGET, drift_threshold=0.0, debug_poison=True)
    stock, ours = (generate(model, options, drafters.MTP) for options in (None, full))
    without_drafts, less = (generate(model, budget, drafts) for drafts in (None, drafters.MTP))
    assert_same_completions(ours["outputs"], stock["outputs"])
    assert ours["drafts"] == stock["drafts"], "the drafter reads the same KV, and vLLM counts it"
    assert_same_completions(less["outputs"], without_drafts["outputs"])
    for found in (ours, less):
        check_drafters_drafts(found, "mtp")
        assert found["metrics"]["requests_compacted{}"] == 2 * 3
