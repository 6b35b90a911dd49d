"""What goes to vLLM and what comes back, without an engine."""

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_heterocache.evaluation.engine import session
from vllm_heterocache.evaluation.sample import FREE, Sample


def test_forced_samples_run_to_their_end():
    sample = Sample("a", [1, 2], 4, forced=[FREE, FREE, 5, FREE])
    params = session._sampling_params(sample)
    assert params.extra_args == {"forced_tokens": [FREE, FREE, 5, FREE]}
    assert (params.max_tokens, params.ignore_eos, params.temperature) == (4, True, 0)
    assert params.logprobs is None and params.detokenize


def test_free_samples_stop_where_they_want():
    params = session._sampling_params(Sample("a", [1], 9, stop=("\n",)))
    assert params.stop == ["\n"] and not params.ignore_eos and params.extra_args is None


def test_a_forced_beginning_leaves_the_end_to_the_model():
    params = session._sampling_params(Sample("a", [1], 9, forced=[3, 4]))
    assert params.extra_args == {"forced_tokens": [3, 4]} and not params.ignore_eos


def test_distributions_are_asked_for_without_text():
    params = session._sampling_params(Sample("a", [1], 2, forced=[3, 4], top_k=64))
    assert params.logprobs == 64 and not params.detokenize


def test_distributions_are_sorted_and_hold_the_taken_token():
    def step(**logprobs):
        return {int(k[1:]): SimpleNamespace(logprob=v, rank=0) for k, v in logprobs.items()}

    steps = [step(t7=-5.0, t3=-0.1, t4=-2.0), step(t4=-0.2, t3=-1.5)]
    got = session.distributions_of([7, 3], steps, top_k=2)
    np.testing.assert_array_equal(got.ids, [[3, 4], [4, 3]])
    np.testing.assert_allclose(got.logprobs, [[-0.1, -2.0], [-0.2, -1.5]])
    np.testing.assert_allclose(got.chosen, [-5.0, -1.5])


def test_resident_share_is_of_whole_pages():
    residency = session.Residency(table_share=0.1, num_heads=6)
    nothing = {"share": None, "with_tables": None, "highest_share": None, "host": None}
    nothing["moments"] = 0
    assert residency.summary() == nothing
    residency.look(48, [33, 16], 12)  # 3 + 1 pages in full
    residency.look(64, [33, 17], 9)  # 3 + 2
    assert residency.summary() == {
        "share": pytest.approx((0.75 + 0.8) / 2),
        "with_tables": pytest.approx(1.1 * (0.75 + 0.8) / 2),
        "highest_share": pytest.approx(0.8),
        "host": pytest.approx((12 / 24 + 9 / 30) / 2),
        "moments": 2,
    }


def test_stock_has_nothing_in_host_memory():
    residency = session.Residency()
    residency.look(64, [33, 16])
    assert residency.summary()["host"] == 0


def test_steps_have_the_time_of_the_middle_one():
    assert session.Steps().summary() == {"median_ms": None, "steps": 0}
    assert session.Steps([9.0, 1.0, 2.0]).summary() == {"median_ms": 2.0, "steps": 3}


def test_reads_are_shares_of_what_full_attention_reads():
    reads = session.Reads()
    assert reads.summary() == {"share": None, "fetched": None, "dense_pages": 0}
    before = {"decode_pages_read": 100, "decode_pages_dense": 300, "pages_fetched": 7, "x": 1}
    after = {"decode_pages_read": 150, "decode_pages_dense": 500, "pages_fetched": 12, "x": 2}
    reads.add(before, after)
    reads.add(after, {**after, "decode_pages_read": 250, "decode_pages_dense": 600})
    assert reads.summary() == {"share": 0.5, "fetched": 5 / 300, "dense_pages": 300}


class FakeWorkers:
    """Two tensor-parallel ranks with two layers, and a third head that both have."""

    def collective_rpc(self, name):
        return {
            "heterocache_block_bytes": [(100, 3), (100, 5)],
            "heterocache_head_roles": [
                ([0, 1], [2, 0], [[0, 1], [2, 3]]),
                ([0, 1], [1, 2], [[1, 0], [1, 2]]),
            ],
        }[name]


def test_what_workers_say_is_joined_over_ranks():
    facts = session.plugin_facts(FakeWorkers())
    assert facts == {"block_bytes": [200, 8], "roles": ["SSP", "VSA"]}


class FakeLLM:
    """Requests that take a token a step; the second is prefilled later than the first."""

    def __init__(self, starts, plugin=False):
        self.starts, self.step_number, self.requests = starts, 0, {}
        self.plugin = plugin
        self.llm_engine = self
        self.looked_at = []

    def add_request(self, request_id, prompt, params):
        self.requests[request_id] = (prompt["prompt_token_ids"], params)

    def has_unfinished_requests(self):
        return bool(self.requests)

    def step(self):
        self.step_number += 1
        outputs = []
        for request_id, (prompt, params) in list(self.requests.items()):
            count = self.step_number - self.starts[request_id]
            if count > 0:
                output = SimpleNamespace(token_ids=[prompt[0]] * count, text="t", logprobs=None)
                finished = count == params.max_tokens
                if finished:
                    del self.requests[request_id]
                outputs.append(
                    SimpleNamespace(request_id=request_id, outputs=[output], finished=finished)
                )
        return outputs

    def get_metrics(self):
        self.looked_at.append(self.step_number)
        values = {"kv_cache_usage_perc": 0.5}
        if self.plugin:
            counters = {"decode_pages_read": 3, "decode_pages_dense": 10, "pages_fetched": 1}
            values |= {f"heterocache_{k}": v * self.step_number for k, v in counters.items()}
        found = [SimpleNamespace(name=f"vllm:{k}", value=v) for k, v in values.items()]
        pages = {"host": 6, "spare": 1, "compact": 4} if self.plugin else {}
        return found + [
            SimpleNamespace(name="vllm:heterocache_pages", value=value, labels={"kind": kind})
            for kind, value in pages.items()
        ]


def session_of(llm, plugin):
    one = session.VllmSession.__new__(session.VllmSession)
    one.llm, one._pool_tokens, one._plugin = llm, 128, plugin
    one._residency, one._reads, one._steps = {}, {}, {}
    return one


def test_reads_are_noted_by_length():
    llm = FakeLLM({"a": 0, "b": 20}, plugin=True)
    plugin = {"block_bytes": [200, 8], "roles": ["SSP"]}
    one = session_of(llm, plugin)
    for name, length in (("a", 30), ("b", 60)):
        list(one.answers([Sample(name, [5] * length, 20, meta={"length": length})]))
    facts = one.facts()
    assert facts["reads"] == {
        "30": {"share": 0.3, "fetched": 0.1, "dense_pages": 200},
        "60": {"share": 0.3, "fetched": 0.1, "dense_pages": 200},
    }
    resident = facts["resident"]["30"]
    assert resident["with_tables"] == pytest.approx(1.04 * resident["share"])
    # prompts of 30 tokens and 5 or 9 of output are 3 pages in each of 3 heads
    assert resident["host"] == pytest.approx(6 / 9, rel=0.2)
    assert facts["roles"] == ["SSP"] and facts["counters"]["pages_fetched"] == 40


def test_pool_is_looked_at_only_while_all_requests_decode():
    llm = FakeLLM({"a": 0, "b": 3})
    one = session_of(llm, {})
    meta = {"length": 32}
    samples = [Sample("a", [5] * 30, 20, meta=meta), Sample("b", [6] * 10, 12, meta=meta)]
    answers = list(one.answers(samples))
    assert [(a.sample.id, a.tokens) for a in answers] == [("b", [6] * 12), ("a", [5] * 20)]
    assert min(llm.looked_at) == 3 + session.SETTLED_TOKENS, "b's fourth token"
    (residency,) = one._residency.values()
    assert len(llm.looked_at) == len(residency.shares) > 1
    # step 7: 30 + 7 tokens take 48 slots, 10 + 4 take 16
    assert residency.shares[0] == pytest.approx(64 / 64)
    facts = one.facts()
    assert facts.pop("steps")["32"]["steps"] == 13, "from the eighth to the twentieth"
    assert facts == {"resident": {"32": residency.summary()}, "reads": {}, "counters": {}}


def test_turns_are_requests_that_begin_with_all_that_was_said():
    """Here a conversation of three turns beside one of two; each answers with its first token."""
    llm = FakeLLM({"a": 0, "b": 0})
    asked = []
    add_request = llm.add_request
    llm.add_request = lambda name, prompt, params: (
        asked.append((name, prompt["prompt_token_ids"], params.max_tokens, params.extra_args)),
        llm.starts.update({name: llm.step_number}),
        add_request(name, prompt, params),
    )
    one, meta = session_of(llm, {}), {"length": 3}
    samples = [
        Sample("a", [5, 1, 2], 8, [FREE, FREE, 8, 9, FREE, 7, FREE, FREE], True, meta=meta),
        Sample("b", [6, 1, 3], 3, [FREE, 4, FREE], True, meta=meta),
        Sample("c", [9], 1, meta=meta),
    ]
    llm.starts["c"] = 0
    answers = {answer.sample.id: answer for answer in one.answers(samples)}
    assert answers["a"].tokens == [5, 5, 8, 9, 5, 7, 5, 5] and answers["a"].text == "ttt"
    assert answers["b"].tokens == [6, 4, 6] and answers["c"].tokens == [9]
    assert answers["a"].sample is samples[0]

    def free(count):
        return {"forced_tokens": [FREE] * count}

    assert asked == [
        ("c", [9], 1, None),
        ("a", [5, 1, 2], 2, free(2)),
        ("b", [6, 1, 3], 1, free(1)),
        ("a", [5, 1, 2, 5, 5, 8, 9], 1, free(1)),
        ("b", [6, 1, 3, 6, 4], 1, free(1)),
        ("a", [5, 1, 2, 5, 5, 8, 9, 5, 7], 2, free(2)),
    ]


def test_a_conversation_does_not_end_with_a_question():
    sample = Sample("a", [5], 3, [FREE, 4, 4], in_turns=True)
    with pytest.raises(ValueError, match="sample a ends with a question"):
        list(session_of(FakeLLM({"a": 0}), {}).answers([sample]))
