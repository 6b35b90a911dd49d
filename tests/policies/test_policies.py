"""Every policy that compresses prompts at the end of the prefill, in a worker: what all keep to."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from world import (
    PAGE,
    World,
    assert_outputs,
    attention_over,
    resident_pages,
    slow_select,
)

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.heads.matched_tokens import REFERENCE_POSITIONS
from vllm_heterocache.policies import POLICIES, make_policy, policy_class
from vllm_heterocache.policies.policy import Shard
from vllm_heterocache.refusal import Refusal
from vllm_heterocache.startup.serving_plan import recomputed_tokens, serving_policy
from vllm_heterocache.worker.warm_up import warm_up

LAYERS, HEADS = 4, 2


def compresses(name: str) -> bool:
    policy = make_policy(HeteroCacheConfig(policy=name, gpu_budget=1.0))
    return name != "full" and not policy.needs_profile and policy.frees_prompt


def reads_what_it_keeps(name: str) -> bool:
    policy = make_policy(HeteroCacheConfig(policy=name, gpu_budget=1.0))
    return policy.step_selection is None and policy.merged_chunk is None


NAMES = [name for name in POLICIES if compresses(name)]
each_policy = pytest.mark.parametrize("name", NAMES)
each_that_keeps_pages = pytest.mark.parametrize("name", filter(reads_what_it_keeps, NAMES))


def make_world(name: str, gpu_budget: float = 0.5, **kwargs) -> World:
    options = {"policy": name, **kwargs.pop("options", {})}
    config = HeteroCacheConfig(policy=name, gpu_budget=gpu_budget)
    policy = serving_policy(config, make_policy(config))
    assignment = policy.assign(config, Shard(range(LAYERS), range(HEADS), LAYERS))
    world = World(assignment, gpu_budget=gpu_budget, options=options, **kwargs)
    world.scores = []
    select = world.runtime.ops.select

    def recorded(scores, *args):
        world.scores.append(scores.clone())
        return select(scores, *args)

    world.runtime.ops.select = recorded
    return world


def test_the_published_policies_are_among_them():
    published = {"streaming", "h2o", "snapkv", "pyramidkv", "cake", "chunkkv", "rocketkv"}
    published.add("centroidkv")
    assert published <= set(NAMES)


@each_that_keeps_pages
def test_a_prompt_is_freed_down_to_its_budget_and_heads_share_it(name):
    world = make_world(name)
    world.step(prefill={"a": 373})
    assert world.done == ["a"]
    assert world.num_blocks - len(world.free) == 1 + 12  # ceil(.5 * 23), and the partial block
    kept = resident_pages(world, "a")
    assert sum(map(len, kept.values())) == 12 * LAYERS * HEADS
    for pages in kept.values():
        assert 5 <= len(pages) <= 23 and {0, 20, 21, 22} <= set(pages)
    world.step(gone=["a"])
    assert len(world.free) == world.num_blocks


@each_that_keeps_pages
def test_heads_keep_the_pages_of_the_highest_scores(name):
    world = make_world(name)
    world.step(prefill={"a": 390}, chunk={"a": 200})
    world.step(chunk={"a": 190})
    (scores,) = world.scores
    assert scores.dtype == torch.float32 and scores.shape == (LAYERS, HEADS, 24)
    assert bool((scores >= 0).all()) and bool(scores.isfinite().all())
    for (layer, head), pages in resident_pages(world, "a").items():
        coarse = (scores[layer, head].view(torch.int32) >> 11).tolist()  # as pages are ranked
        assert set(pages) == slow_select(coarse, len(pages), 1, 3)


@each_that_keeps_pages
def test_decode_reads_what_was_kept_and_what_came_after(name):
    world = make_world(name)
    world.step(prefill={"a": 351, "b": 320})
    kept = {request_id: resident_pages(world, request_id) for request_id in "ab"}
    for _ in range(18):
        world.step(decode=["a", "b"])
        for request_id, resident in kept.items():
            assert_outputs(world, request_id, attention_over(world, request_id, resident))


@each_policy
@pytest.mark.parametrize("chunks", [(200, 173), (372, 1), (1, 330, 42), (345, 28)], ids=str)
def test_the_choice_depends_neither_on_chunks_nor_on_the_batch(name, chunks):
    alone, batched = make_world(name, num_blocks=150), make_world(name, num_blocks=150)
    alone.step(prefill={"a": 373})
    batched.step(prefill={"a": 373}, chunk={"a": chunks[0]})
    batched.step(prefill={"other": 180}, chunk={"a": chunks[1]})
    for size in chunks[2:]:
        batched.step(chunk={"a": size}, decode=["other"])
    books = alone.books["a"], batched.books["a"]
    assert torch.equal(books[0].kv[:, :, :373], books[1].kv[:, :, :373])
    assert resident_pages(alone, "a") == resident_pages(batched, "a")


@each_policy
def test_a_budget_of_one_is_full_attention_and_observes_nothing(name):
    world = make_world(name, gpu_budget=1.0)
    world.step(prefill={"a": 100, "b": 33})
    for _ in range(3):
        world.step(decode=["a", "b"])
        for request_id in "ab":
            assert_outputs(world, request_id, world.dense_attention(request_id))
    plan = world.runtime.rank.plan
    assert plan.policy.name == "full" and world.runtime.rank.geometry.window == 1
    assert plan.recomputed_tokens == recomputed_tokens(plan.config, plan.policy, 999) == 1


@each_policy
def test_warm_up_goes_through_the_policy_and_leaves_nothing(name, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    world = make_world(name, num_blocks=600, compact_min_tokens=176)
    world.pool.zero_()
    world.runtime.ops.memory.last_queries.zero_()
    warm_up(world.runtime, 1000 * PAGE)
    assert [scores.shape[-1] for scores in world.scores] == [256, 1000]
    assert world.num_free_windows == world.num_query_windows
    world.runtime.check_integrity()
    world.pool.fill_(torch.nan)
    world.step(prefill={"a": 373})
    assert world.done == ["a"]


@each_policy
def test_prefix_cache_hits_leave_the_observed_tokens(name):
    config = HeteroCacheConfig(policy=name)
    policy = serving_policy(config, make_policy(config))
    observed = policy.observed_queries
    expected = {"heterocache": REFERENCE_POSITIONS}.get(name, observed)
    assert recomputed_tokens(config, policy, 4096) == (4096 if observed == -1 else expected) >= 1


@each_policy
def test_options_have_names_and_values_that_are_checked(name):
    options = dataclasses.asdict(make_policy(HeteroCacheConfig(policy=name)))
    assert make_policy(HeteroCacheConfig(policy=name, policy_options=options))
    for key in options:
        for value in ("x", -1, None, True):
            if value is None and options[key] is None:
                continue
            with pytest.raises(ValueError, match=f"'{key}'.*{name}"):
                make_policy(HeteroCacheConfig(policy=name, policy_options={key: value}))
    with pytest.raises(ValueError, match="has no option 'wndow'"):
        make_policy(HeteroCacheConfig(policy=name, policy_options={"wndow": 3}))


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("snapkv", {"window": 0}, "it must be a whole number, at least 1 (policy 'snapkv')"),
        ("snapkv", {"window": 8.0}, "a whole number, at least 1, not float (policy 'snapkv')"),
        ("snapkv", {"pool_pages": 2}, "so it is odd (policy 'snapkv'); choose an odd number"),
        ("snapkv", {"group": ["max"]}, "(policy 'snapkv'); choose one of mean, max."),
        ("snapkv", {"group": "men"}, "there is no such group (did you mean 'mean'?)"),
        ("snapkv", {"wndow": 3}, "has no option 'wndow' (did you mean 'window'?)"),
        ("streaming", {"window": 3}, "has no option 'window'; known options are none."),
        ("cake", {"tau1": 0}, "it must be a number, above 0, at most 1,000,000 (policy 'cake')"),
        ("cake", {"gamma": float("inf")}, "it must be a number, at least 0, at most 1,000,000,000"),
        ("cake", {"gamma": float("nan")}, "it must be a number, at least 0, at most 1,000,000,000"),
        ("h2o", {"recent_share": "0.5"}, "not str (policy 'h2o'); write it without quotes."),
    ],
)
def test_policy_made_directly_refuses_an_option_with_the_same_sentence(name, options, sentence):
    with pytest.raises(ValueError, match=" is refused: ") as asked:
        make_policy(HeteroCacheConfig(policy=name, policy_options=options))
    message = str(asked.value)
    assert message.startswith(f"heterocache option policy_options={options!r} is refused: ")
    assert sentence in message
    with pytest.raises(ValueError, match=" is refused: ") as direct:
        policy_class(name)(**options)
    assert str(direct.value) == message and type(direct.value) is Refusal


@each_policy
@pytest.mark.parametrize(
    "option", [{"full_share": 0.4}, {"finder_share": 0.1}, {"recipe": "paper"}], ids=str
)
def test_options_of_roles_are_refused_where_heads_have_none(name, option):
    (asked,) = option
    with pytest.raises(Refusal, match=rf"^heterocache option {asked}=.* gives heads no roles; "):
        make_policy(HeteroCacheConfig(policy=name, **option))
    make_policy(HeteroCacheConfig(policy=name, full_share=0, finder_share=0))


@pytest.mark.parametrize("name", POLICIES)
def test_policy_round_trips_through_json(name):
    policy = policy_class(name)()
    again = policy_class(name)(**json.loads(json.dumps(dataclasses.asdict(policy))))
    assert again == policy and hash(again) == hash(policy) and type(again) is type(policy)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.window = 3


@each_policy
def test_every_policy_says_where_it_comes_from(name):
    policy = make_policy(HeteroCacheConfig(policy=name))
    assert "arXiv" in type(policy).__doc__.replace("\n", " ")
    assert dataclasses.is_dataclass(policy) and policy.name == name
