"""One engine prefills and another one goes on, over vLLM's NixlConnector. NIXL must be installed
(`pip install nixl`)."""

from __future__ import annotations

import functools
import os

import numpy as np
import parallel
import prefill_engine
import pytest
import torch
from engines import DTYPE, assert_same_completions
from gpu_scenarios import alone
from test_offloading import OFFLOADING

from vllm_heterocache.heads.matched_tokens import REFERENCE_POSITIONS

PAGE, LENGTHS = 16, (900, 901, 500, 40)
NUM_COMPACTED = 3


def received(gpu_budget: float) -> int:
    """Tokens that come from the other engine: all of a prompt that stays dense, and the others up
    to the last query, or to those that matched tokens are fitted to."""
    recomputed = 1 if gpu_budget == 1 else REFERENCE_POSITIONS
    whole = [n for n in LENGTHS if n < parallel.MIN_PROMPT]
    cut = [(n - recomputed) // PAGE * PAGE for n in LENGTHS if n >= parallel.MIN_PROMPT]
    return sum(whole) + sum(cut)


@pytest.fixture
def case(tmp_path):
    pytest.importorskip("nixl", reason="NIXL is not installed")
    rng = np.random.default_rng(7)
    prompts = [rng.integers(0, 499, length).tolist() for length in LENGTHS]
    return parallel.write_model(tmp_path, DTYPE), prompts


def check(found: dict, gpu_budget: float) -> None:
    first, *others = found["completions"]
    for again in others:
        assert_same_completions(again, first)
    assert found["loaded"][:2] == [0, received(gpu_budget)]
    assert found["held"] == found["elsewhere"]["held"] == 0
    assert found["metrics"]["requests_compacted{}"] == len(found["completions"]) * NUM_COMPACTED
    assert found["elsewhere"]["requests_compacted{}"] == 0


@pytest.mark.feature("Prefill and decode apart")
def test_a_received_prompt_is_answered_as_one_that_was_prefilled_here(case):
    model, prompts = case
    options = parallel.options(model, 1.0, debug_poison=True)
    check(prefill_engine.go_on(model, options, prompts), 1.0)


@pytest.mark.feature("Prefill and decode apart")
def test_what_was_received_is_offloaded_before_it_is_freed(case):
    """The third time prompts come from the host."""
    model, prompts = case
    options = parallel.options(model, parallel.BUDGET, debug_poison=True)
    found = prefill_engine.go_on(model, options, prompts, beside=[OFFLOADING])
    check(found, parallel.BUDGET)
    from_host = found["loaded"][2] - found["loaded"][1]
    assert received(parallel.BUDGET) - len(LENGTHS) * 2 * PAGE <= from_host


@pytest.mark.gpu
@pytest.mark.feature("Prefill and decode apart")
@pytest.mark.parametrize(
    ("gpu_budget", "num_gpus"), [(1.0, 1), (parallel.BUDGET, 1), (parallel.BUDGET, 2)]
)
def test_on_gpus_a_received_prompt_is_answered_as_one_that_was_prefilled_here(
    case, gpu_budget, num_gpus
):
    """Both engines on one GPU, or the one that prefills on a second GPU."""
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs")
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    model, prompts = case
    options = parallel.options(model, gpu_budget, debug_poison=True)
    run = functools.partial(
        prefill_engine.go_on,
        model,
        options,
        prompts,
        elsewhere_gpu=gpus[num_gpus - 1],
        enforce_eager=False,
    )
    check(alone(run), gpu_budget)
