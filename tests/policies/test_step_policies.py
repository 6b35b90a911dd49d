"""Policies that choose at each step: roles, options, warm-up. tests/worker/test_step_selection.py
has what they read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from world import PAGE, World

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadAssignment
from vllm_heterocache.heads.budget import page_budgets, smallest_prompt
from vllm_heterocache.policies import make_policy
from vllm_heterocache.policies.policy import Shard
from vllm_heterocache.startup.serving_plan import compact_min_tokens, serving_policy
from vllm_heterocache.worker.warm_up import warm_up

LAYERS, HEADS = 5, 2
WHOLE = Shard(range(LAYERS), range(HEADS), LAYERS)


def make_config(policy: str = "quest", gpu_budget: float = 0.6, **options) -> HeteroCacheConfig:
    return HeteroCacheConfig(policy=policy, gpu_budget=gpu_budget, policy_options=options)


def assign(config: HeteroCacheConfig, shard: Shard = WHOLE) -> HeadAssignment:
    return make_policy(config).assign(config, shard)


@pytest.mark.parametrize("full_layers", [0, 1, 2])
@pytest.mark.parametrize("name", ["quest", "fier"])
def test_the_first_layers_of_the_model_are_read_whole(name, full_layers):
    assignment = assign(make_config(name, full_layers=full_layers))
    assignment.validate()
    assert assignment.full.all(axis=1).tolist() == [i < full_layers for i in range(LAYERS)]
    assert assignment.num_full == full_layers * HEADS
    # a later pipeline rank has none of them
    later = assign(make_config(name, full_layers=full_layers), Shard([3, 4], [1], LAYERS))
    assert later.num_full == 0 and later.roles.shape == (2, 1)


def test_layers_that_are_read_whole_count_towards_the_budget():
    config = make_config()
    assignment = assign(config)
    budgets = page_budgets(assignment, 100, 60 * LAYERS * HEADS, config.min_pages)
    assert (budgets[:2] == 100).all() and budgets.sum() == 600
    assert np.ptp(budgets[2:]) <= 1, "the others share the rest equally"


@pytest.mark.parametrize("gpu_budget", [0.3, 0.4])
@pytest.mark.parametrize("name", ["quest", "fier"])
def test_a_budget_that_the_first_layers_use_up_is_refused(name, gpu_budget):
    words = f"gpu_budget={gpu_budget} .*{name!r} reads 2 of 5 layers.*full_layers"
    with pytest.raises(ValueError, match=words):
        assign(make_config(name, gpu_budget=gpu_budget))
    assert assign(make_config(name, gpu_budget=0.41)).num_full == 4


def test_oracle_gives_all_heads_the_same():
    config = make_config("oracle", 0.1)
    assignment = assign(config)
    assert assignment.num_full == 0
    budgets = page_budgets(assignment, 250, 25 * LAYERS * HEADS, config.min_pages)
    assert (budgets == 25).all()
    assert compact_min_tokens(config, [assignment]) == 1024
    assert smallest_prompt([assignment], 0.1, config.min_pages) <= 60 * PAGE


@pytest.mark.parametrize("name", ["quest", "fier", "oracle"])
def test_they_free_nothing_and_say_so(name):
    policy = make_policy(make_config(name))
    assert not policy.frees_prompt and policy.name == name
    text = " ".join(type(policy).__doc__.split())
    assert "frees no" in text or "frees none" in text
    assert serving_policy(make_config(name, 1.0), policy).name == "full"


@pytest.mark.parametrize("value", [-1, 1.5, True, "2", None])
@pytest.mark.parametrize("name", ["quest", "fier"])
def test_number_of_full_layers_is_checked(name, value):
    assert dataclasses.asdict(make_policy(make_config(name))) == {"full_layers": 2}
    with pytest.raises(ValueError, match=f"full_layers.*whole number.*{name}"):
        make_policy(make_config(name, full_layers=value))


@pytest.mark.parametrize("name", ["quest", "fier", "oracle"])
def test_warm_up_leaves_nothing_behind(name, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    assignment = assign(make_config(name))
    world = World(assignment, 0.6, 700, compact_min_tokens=176, options={"policy": name})
    world.pool.zero_()
    summarized = []
    if name != "oracle":
        summarize = world.runtime.ops.summarize
        world.runtime.ops.summarize = lambda blocks: (
            summarized.append(len(blocks)) or summarize(blocks)
        )
    fresh = world.runtime.snapshot()
    warm_up(world.runtime, 1000 * PAGE)
    assert summarized == ([] if name == "oracle" else [256, 1000])
    assert world.runtime.snapshot() == fresh
    assert bool((world.table.tensors.entries == -1).all())
    world.runtime.check_integrity()
    world.pool.fill_(torch.nan)
    world.step(prefill={"a": 373})
    world.step(decode=["a"])
    assert world.done == ["a"]
