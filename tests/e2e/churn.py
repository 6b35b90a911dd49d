"""A busy engine: what the e2e tests of both platforms put it through, and what must hold."""

from __future__ import annotations

import math
import random
from typing import Any

from common.forced_triggers import force_triggers

# Freed blocks hold NaN, so a stale read shows in the log-probabilities.
OPTIONS = {
    "gpu_budget": 0.3,
    "debug_poison": True,
}
SATELLITES = {"finder_share": 0}  # options of an engine whose drift checks trigger
TRIGGERS = 0.5  # share of the drift checks
COMPACT = "decode_rows{kind=compact,reason=compacted}"
DENSE = "decode_rows{kind=dense,reason=short_prompt}"


class Churn:
    """Requests that join, leave, are aborted, preempted and hit prefixes; dense ones among them."""

    def __init__(self, tokens: list[int], num_late: int, longest: int, seed: int) -> None:
        self.chance = random.Random(seed)
        self.tokens, self.num_late, self.longest = tokens, num_late, longest
        self.aborted: set[str] = set()
        self.late = 0

    def params(self):
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0.0,
            max_tokens=self.chance.randrange(1, 300),
            logprobs=1,
            ignore_eos=True,
        )

    def prompt(self) -> list[int]:
        """Often a shared prefix; lengths on both sides of page borders and `min_prompt_tokens`."""
        start = self.chance.choice((0, 0, 20000 * self.chance.randrange(4)))
        long = 16 * self.chance.randrange(64, self.longest // 16) + self.chance.choice((0, 1, 9))
        length = self.chance.choice((self.chance.randrange(20, 900), long))
        return self.tokens[start : start + length]

    def on_step(self, engine, step: int) -> None:
        llm_engine = engine.llm.llm_engine
        if step % 5 == 0 and self.late < self.num_late:
            self.late += 1
            prompt = {"prompt_token_ids": self.prompt()}
            llm_engine.add_request(f"late{self.late}", prompt, self.params())
        if step in (23, 60):  # preempts all running requests, between two steps
            llm_engine.reset_prefix_cache(reset_running_requests=True)
        if step % 29 == 0 and engine.scheduler.running:
            victim = self.chance.choice(engine.scheduler.running).request_id
            # vLLM's own ids are the caller's and a random suffix
            llm_engine.abort_request([victim.rsplit("-", 1)[0]])
            self.aborted.add(victim)


def run(engine, tokens: list[int], num_late: int, longest: int) -> dict[str, Any]:
    """Six requests at once, `num_late` more while they run; integrity is checked at every step.
    Finders fetch as their attention asks; where there are none, drift checks trigger by chance.

    `longest` is the length of the longest prompt, in tokens.
    """
    has_finders = engine.runtime.rank.assignment.finders.size > 0
    if not has_finders:
        force_triggers(engine.runtime, TRIGGERS)
    script = Churn(tokens, num_late, longest, seed=7)
    free_before = engine.num_free
    prompts = [script.prompt() for _ in range(6)]
    outputs = engine.run(prompts, [script.params() for _ in prompts], script.on_step)
    return {
        "has_finders": has_finders,
        "blocks_lost": free_before - engine.num_free,
        "host_blocks_used": engine.runtime.host_pool.num_blocks - engine.runtime.host_pool.num_free,
        "preemptions": engine.num_preemptions,
        "aborted": len(script.aborted),
        "steps": len(engine.free_blocks),
        "metrics": engine.metrics(),
        "logprobs": [
            entry.logprob
            for output in outputs.values()
            for position in output.outputs[0].logprobs or []
            for entry in position.values()
        ],
    }


def check(result: dict[str, Any]) -> None:
    """Raise AssertionError unless everything happened, nothing leaked and no NaN was read."""
    assert result["blocks_lost"] == result["host_blocks_used"] == 0
    assert result["preemptions"] > 0, f"no preemption in {result['steps']} steps"
    assert result["aborted"] > 0, f"no abort in {result['steps']} steps"
    metrics = result["metrics"]
    assert metrics["pages_fetched{}"] > 0
    assert (metrics["drift_triggers{}"] == 0) == result["has_finders"]
    assert metrics[COMPACT] > 0 and metrics[DENSE] > 0
    assert len(result["logprobs"]) > 500 and all(map(math.isfinite, result["logprobs"]))
