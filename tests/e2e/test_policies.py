"""Policies that choose at the end of the prefill, in one engine: starting one for each is dear, so
a policy is put in the place of another between two runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engines import Engine, chain_engine

from vllm_heterocache.heads.budget import compact_blocks
from vllm_heterocache.policies import make_policy
from vllm_heterocache.policies.policy import ALL_QUERIES, Shard
from vllm_heterocache.worker.observe.prompt_observer import PromptObserver
from vllm_heterocache.worker.requests import FinishedPrefill

BUDGET, WINDOW, PAGE, MIN_PROMPT = 0.3, 32, 16, 512
LENGTHS = (40, 512, 513, 755, 1300)
FEW_LENGTHS = (40, 513, 755)


class Watched:
    """An engine that serves with one policy after another, and notes what compactions look at."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.windows = engine, {}
        self._compact = engine.runtime.compact
        engine.runtime.compact = self._noted

    def _noted(self, finished: FinishedPrefill) -> None:
        runtime, order = self.engine.runtime, finished.order
        last = finished.query_place
        name = order.request_id.split("-")[0]  # vLLM adds something of its own
        queries = runtime.ops.memory.last_queries[last + 1 - WINDOW : last + 1]
        self.windows[name] = queries.float().clone()
        self._compact(finished)
        num_listed = runtime.table.num_listed(runtime.request(order.request_id).table_slot)
        pages = compact_blocks(order.num_tokens, BUDGET) * runtime.rank.assignment.num_heads
        assert num_listed == pages, "the budget is not used up"

    def use(self, name: str) -> None:
        """Make anew what depends on the policy; no request may be under way.

        The scheduler goes by the first policy's plan: as many prompt tokens are computed again.
        """
        runtime = self.engine.runtime
        rank, plan = runtime.rank, runtime.rank.plan
        config = replace(plan.config, policy=name)
        policy = make_policy(config)
        shard = Shard(rank.layer_ids, rank.kv_head_ids, rank.model_layers)
        assignment = policy.assign(config, shard)
        plan = replace(plan, config=config, policy=policy, assignments=(assignment,))
        runtime.rank = replace(rank, plan=plan, assignment=assignment)
        runtime.compactor = replace(
            runtime.compactor, config=config, policy=policy, assignment=assignment
        )
        runtime.observer = PromptObserver(
            rank.geometry, runtime.ops.memory, policy.observed_queries == ALL_QUERIES
        )

    def run(self, prompts: list[list[int]]) -> list:
        """Final outputs, with the number of cached prompt tokens; every prompt but short ones is
        compacted."""
        from vllm import SamplingParams

        before = self.engine.runtime.counters.requests_compacted
        outputs = self.engine.run(
            prompts, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        )
        compacted = self.engine.runtime.counters.requests_compacted - before
        assert compacted == sum(len(prompt) >= MIN_PROMPT for prompt in prompts)
        runtime = self.engine.runtime
        assert len(runtime.observer._free_windows) == runtime.rank.geometry.num_query_windows
        return [outputs[str(i)] for i in range(len(prompts))]


@pytest.fixture(scope="module")
def watched(model):
    options = {"policy": "snapkv", "gpu_budget": BUDGET, "min_prompt_tokens": MIN_PROMPT}
    with chain_engine(model, options) as engine:
        yield Watched(engine)


def test_cached_prefixes_leave_the_window_and_it_holds_the_same_queries(watched, text_tokens):
    """Fresh prompts come in chunks of 512 tokens in all; cached ones begin at the window."""
    watched.use("snapkv")
    prompts = [text_tokens(3000 * i, length) for i, length in enumerate(LENGTHS)]
    fresh = watched.run(prompts)
    windows = dict(watched.windows)
    cached = watched.run(prompts)
    assert not any(output.num_cached_tokens for output in fresh)
    for prompt, output in zip(prompts, cached, strict=True):
        left = WINDOW if len(prompt) >= MIN_PROMPT else 1
        assert output.num_cached_tokens == (len(prompt) - left) // PAGE * PAGE
    assert windows.keys() == watched.windows.keys() and len(windows) == len(LENGTHS) - 1
    for request_id, window in windows.items():
        again = watched.windows[request_id]
        # a query of the first layer depends on its token and position alone
        torch.testing.assert_close(window[:, 0], again[:, 0], rtol=0.02, atol=0.02)
        agreement = torch.nn.functional.cosine_similarity(window, again, dim=-1)
        assert agreement.mean() > 0.98
        neighbours = torch.nn.functional.cosine_similarity(window[1:, 0], again[:-1, 0], dim=-1)
        assert neighbours.mean() < 0.9, "the test could not tell one query from the next"


@pytest.mark.parametrize("name", ["chunkkv", "cake", "pyramidkv", "streaming", "h2o"])
def test_every_policy_serves_a_batch_of_chunked_prompts(name, watched, text_tokens):
    watched.use(name)
    first = 20000 + 1000 * len(name)  # h2o may not find cached tokens
    prompts = [text_tokens(first + 3000 * i, length) for i, length in enumerate(FEW_LENGTHS)]
    outputs = watched.run(prompts)
    assert all(len(output.outputs[0].token_ids) == 12 for output in outputs)
    rows = watched.engine.runtime.counters.decode_rows
    assert {reason for kind, reason in rows if kind == "dense"} <= {"short_prompt"}
