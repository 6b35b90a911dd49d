"""The synthetic profiles have the roles that the benchmarks say they have."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common import model_shapes, profiles
from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadRole
from vllm_heterocache.heads.budget import page_budgets
from vllm_heterocache.heads.profile import HeadProfile
from vllm_heterocache.heads.recipes import configured_heads
from vllm_heterocache.policies.heterocache import HeteroCache
from vllm_heterocache.policies.policy import Shard

LLAMA, TINY = profiles.LLAMA, profiles.TINY


def count_by_role(assignment) -> dict[str, int]:
    return {role.name.lower(): assignment.count(role) for role in HeadRole}


def test_paper_profile_has_the_published_spread():
    assignment = profiles.assignment_of(LLAMA, "paper")
    counts = {"pivot": 33, "volatile": 17, "anchor": 10, "satellite": 196, "finder": 0}
    assert count_by_role(assignment) == counts
    full = assignment.full.sum(axis=1)
    assert (full.min(), full.max(), np.flatnonzero(full == 3).tolist()) == (1, 3, [5, 10, 17, 25])
    per_layer = {
        role: (assignment.roles == role).sum(axis=1) for role in (HeadRole.PIVOT, HeadRole.ANCHOR)
    }
    assert (per_layer[HeadRole.PIVOT].min(), per_layer[HeadRole.PIVOT].max()) == (1, 2)
    assert (per_layer[HeadRole.ANCHOR].min(), per_layer[HeadRole.ANCHOR].max()) == (0, 2)
    satellites = (assignment.roles == HeadRole.SATELLITE).sum(axis=1)
    assert (satellites.min(), satellites.max()) == (4, 7)
    sizes = assignment.cluster_sizes()[assignment.roles == HeadRole.PIVOT]
    assert Counter(sizes.tolist()) == {1: 1, 4: 2, 5: 7, 6: 9, 7: 14}
    # published pivots lead their own layer
    layers = np.arange(LLAMA.num_layers)[:, None]
    led = assignment.leaders >= 0
    assert np.array_equal((assignment.leaders // LLAMA.num_kv_heads)[led], (layers + 0 * led)[led])


def test_paper_budgets_at_a_quarter_are_the_published_ones():
    assignment = profiles.assignment_of(LLAMA, "paper")
    budgets = page_budgets(assignment, 8192, 2048 * 256, 5)
    kept = budgets[~assignment.full] / 8192
    assert kept.min() == pytest.approx(0.039, abs=0.003)
    assert kept.max() == pytest.approx(0.136, abs=0.01)
    layers = budgets.mean(axis=1) / 2048
    assert layers.max() == pytest.approx(1.687, abs=0.05)
    assert layers.min() == pytest.approx(0.684, abs=0.05)


def test_retrieval_recipe_keeps_the_wanted_pivots():
    assignment = profiles.assignment_of(LLAMA, "retrieval")
    counts = {"pivot": 32, "volatile": 0, "anchor": 0, "satellite": 224, "finder": 0}
    assert count_by_role(assignment) == counts
    full = assignment.full.sum(axis=1)
    assert full.tolist() == list(LLAMA.retrieval_pivots)
    assert (full.min(), full.max(), full.sum()) == (0, 4, 32)
    assert (assignment.cluster_sizes()[assignment.full] > 0).all()


def test_heads_follow_pivots_of_their_own_rank():
    """Roles are made within a rank: with the profile of one rank, half of the others' are lost."""
    profile = profiles.retrieval_profile(LLAMA, ranks=2)
    config = HeteroCacheConfig(gpu_budget=0.25, finder_share=0)
    for heads in (range(4), range(4, 8)):
        roles = HeteroCache().assign(config, Shard(range(32), heads, 32), profile)
        assert roles.count(HeadRole.PIVOT) == 16 and roles.count(HeadRole.SATELLITE) >= 75


HYBRIDS = [*model_shapes.SHAPES.values(), *model_shapes.TINY_SHAPES.values()]


@pytest.mark.parametrize("shape", HYBRIDS, ids=lambda shape: shape.name)
def test_profiles_of_hybrids_are_of_the_layers_with_full_attention(shape, tmp_path):
    profiles.write_model(shape, tmp_path)
    assert not (tmp_path / "paper.json").exists()
    model = HeadProfile.load(tmp_path / "retrieval.json").model
    config = AutoConfig.from_pretrained(tmp_path)
    kinds = config.layer_types
    full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    assert list(model.layers) == full and model.num_layers == len(full)
    assert (model.num_q_heads, model.num_kv_heads, model.head_dim) == (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    assignment = profiles.assignment_of(shape, "retrieval", 0.25)
    assert assignment.full.sum() == pytest.approx(0.125 * assignment.full.size, abs=0.5)


@pytest.mark.parametrize(
    ("name", "layers", "billions"),
    [
        ("gemma-3-27b", (10, 62), 27.0),
        ("gpt-oss-20b", (12, 24), 4.2),
        ("qwen3.5-27b", (16, 64), 27),
    ],
)
def test_hybrids_are_as_large_as_their_names_say(name, layers, billions, tmp_path):
    """The gpt-oss has 3.6 billion that a token goes through, and 0.6 of embeddings."""
    shape = model_shapes.SHAPES[name]
    assert (shape.num_layers, len(shape.layer_types)) == layers
    profiles.write_model(shape, tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.03)


def test_first_layers_of_a_shape_keep_their_kinds_and_pivots():
    whole = model_shapes.SHAPES["gemma-3-27b"]
    first = whole.first_layers(24)
    assert first.layers == whole.layers[:4] == (5, 11, 17, 23)
    assert first.retrieval_pivots == whole.retrieval_pivots[:4] and first.num_layers == 4
    assert first.config()["num_hidden_layers"] == len(first.config()["layer_types"]) == 24
    assert first.name == whole.name
    for count in (0, 11, 63):
        with pytest.raises(ValueError, match="is not from 12 to 62"):
            whole.first_layers(count)


@pytest.mark.parametrize("shape", [LLAMA, TINY], ids=lambda shape: shape.name)
@pytest.mark.parametrize("recipe", ["paper", "retrieval"])
def test_files_lead_to_the_same_roles(shape, recipe, tmp_path):
    profiles.write_model(shape, tmp_path)
    profile = HeadProfile.load(tmp_path / f"{recipe}.json")
    config = HeteroCacheConfig(recipe=recipe, gpu_budget=shape.gpu_budget, finder_share=0)
    again = configured_heads(profile, config)
    expected = profiles.assignment_of(shape, recipe)
    assert np.array_equal(again.roles, expected.roles)
    assert np.array_equal(again.leaders, expected.leaders)
    assert again.floor < shape.gpu_budget
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == profile.model.num_layers == shape.num_layers
    assert config["num_key_value_heads"] == profile.model.num_kv_heads
