"""More than a hundred requests, with preemption and clients who leave. Finders fetch."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any

import churn
import engines
import pytest
import soak
from engines import assert_same_greedy_tokens

# Clients come faster than they are served, on any machine that the tests run on.
PER_SECOND = 8.0
COUNT, LONGEST_ANSWER = 120, 260
NUM_COMPARED, LONGEST_COMPARED = 20, 60
LOOK_EVERY_S = 2.0
# Others may have the cores: without them, no wait is longer than a few seconds.
STALL_S = 120.0
# Of the process between the halves of the soak.
GROWTH_BYTES = 128 << 20
# Entries for each kind of what happened, not for each request.
KINDS = ("decode_rows", "_warned_of")

pytestmark = pytest.mark.skipif(engines.ON_GPU, reason="its load and its model are for a CPU")


@dataclass
class Found:
    """What happened, and what was left of it."""

    plan: list[soak.Visit]
    answers: dict[str, soak.Answer]
    before: dict[str, Any]
    after: dict[str, Any]
    metrics: dict[str, float]
    resident: list[int]
    compared: list[tuple[soak.Visit, soak.Answer, soak.Answer]]  # among others, and alone
    preempted: dict[str, int]

    @property
    def served(self) -> list[tuple[soak.Visit, soak.Answer]]:
        """Those who stayed."""
        pairs = [(visit, self.answers[visit.name]) for visit in self.plan]
        return [(visit, answer) for visit, answer in pairs if not answer.has_left]

    @property
    def left(self) -> list[soak.Answer]:
        return [answer for answer in self.answers.values() if answer.has_left]


async def run(model: str) -> Found:
    # The longest prompt, and as many rows at once as there can be: buffers grow with both.
    warm_up = soak.visits(4, PER_SECOND, seed=0, longest_answer=40)
    warm_up += soak.visits(2 * soak.MAX_ROWS, 500.0, 3, longest_answer=40)[soak.MAX_ROWS :]
    plan = soak.impatient(soak.visits(COUNT, PER_SECOND, 1, LONGEST_ANSWER), seed=1)
    to_compare = soak.visits(NUM_COMPARED, PER_SECOND, 2, LONGEST_COMPARED)
    async with soak.start(model) as engine:
        await engine.serve(warm_up, LOOK_EVERY_S, STALL_S)
        before, warm = await engine.idle_state(), engine.metrics()
        engine.resident.clear()
        answers = await engine.serve(plan, LOOK_EVERY_S, STALL_S)
        await engine.alone(warm_up[0], STALL_S)  # gauges move with steps, and the last may abort
        after, metrics = await engine.idle_state(), engine.metrics()
        resident = list(engine.resident)
        together = await engine.serve(to_compare, LOOK_EVERY_S, STALL_S)
        alone = [await engine.alone(visit, STALL_S) for visit in to_compare]
        preempted = await engine.call("soak_preemptions")
    print(f"longest wait {engine.longest_wait_s:.1f} s, MiB {[size >> 20 for size in resident]}")
    print(metrics)
    return Found(
        plan,
        answers,
        before,
        after,
        {n: v if n.startswith("pages{") else v - warm.get(n, 0) for n, v in metrics.items()},
        resident,
        [(v, together[v.name], one) for v, one in zip(to_compare, alone, strict=True)],
        preempted,
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Found:
    return asyncio.run(run(soak.write_model(tmp_path_factory.mktemp("soak"))))


@pytest.mark.feature("Asynchronous scheduling")
def test_the_soak_meets_everything(found):
    metrics = found.metrics
    assert metrics["pages_fetched{}"] > 0
    assert metrics["pages_offloaded{}"] > 0 and metrics["requests_compacted{}"] > 0
    assert metrics[churn.COMPACT] > 0 and metrics[churn.DENSE] > 0
    assert metrics["vllm:num_preemptions"] > 0 and metrics["vllm:prefix_cache_hits"] > 0
    assert found.after["overlaps"] > 0, "no step was scheduled while another one ran"
    seen = [answer.num_tokens for answer in found.left]
    assert any(seen) and not all(seen), "clients left at one stage only"
    assert any(visit.num_answers > 1 for visit, _ in found.served)
    assert len(found.resident) > 10, "the engine was hardly looked at"


@pytest.mark.feature(
    "Asynchronous API", "Several answers to a prompt", "Log-probabilities of output tokens"
)
def test_whoever_stays_gets_all_tokens(found):
    for visit, answer in found.served:
        outputs = answer.outputs.values()
        assert [len(one.token_ids) for one in outputs] == [visit.num_tokens] * visit.num_answers
        # Freed blocks hold NaN, so a stale read shows.
        positions = [position for one in outputs for position in one.logprobs]
        assert all(math.isfinite(p.logprob) for position in positions for p in position.values())


@pytest.mark.feature("Aborted requests")
def test_nothing_is_left_behind(found):
    after = found.after
    assert after["running"] == after["waiting"] == 0
    assert after["blocks_used"] == after["host_blocks_used"] == 0
    grown = {
        name: (found.before["sizes"].get(name), size)
        for name, size in after["sizes"].items()
        if size != found.before["sizes"].get(name) and not name.endswith(KINDS)
    }
    assert not grown, "containers with other numbers of entries than before"


def test_memory_is_flat(found):
    half = len(found.resident) // 2
    growth = median(found.resident[half:]) - median(found.resident[:half])
    assert growth < GROWTH_BYTES, [size >> 20 for size in found.resident]


def test_counters_agree_with_what_the_clients_saw(found):
    metrics = found.metrics
    for kind in ("dense", "compact", "host", "spare"):
        assert metrics[f"pages{{kind={kind}}}"] == 0
    assert metrics["drift_checks{}"] == metrics["drift_triggers{}"] == 0
    assert metrics["decode_pages_read{}"] < metrics["decode_pages_dense{}"]
    # A prefill gives the first token, after a preemption too. Of those who left, some of the
    # tokens were decoded.
    seen = sum(answer.num_tokens for _, answer in found.served)
    wanted = sum(visit.num_tokens * visit.num_answers for visit in found.plan)
    prefills = sum(v.num_answers for v in found.plan) + metrics["vllm:num_preemptions"]
    rows = metrics[churn.COMPACT] + metrics[churn.DENSE]
    assert seen - prefills <= rows <= wanted + prefills


def test_every_answer_is_that_of_the_request_alone(found):
    """Retrieval included, up to the first preemption: the answer so far is a part of the prompt
    after that."""
    num_compared = 0
    for visit, among_others, alone in found.compared:
        tokens, expected = among_others.outputs[0].token_ids, alone.outputs[0]
        assert len(tokens) == len(expected.token_ids) == visit.num_tokens
        end = found.preempted.get(visit.name, visit.num_tokens)
        first = SimpleNamespace(
            token_ids=expected.token_ids[:end], logprobs=expected.logprobs[:end]
        )
        num_compared += assert_same_greedy_tokens(tokens[:end], first)
    assert num_compared > 0.9 * sum(visit.num_tokens for visit, _, _ in found.compared)
