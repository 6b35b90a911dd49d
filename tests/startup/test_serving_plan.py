from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole
from vllm_heterocache.heads.profile import HeadProfile, ModelIdentity
from vllm_heterocache.heads.recipes import assign_heads
from vllm_heterocache.policies.policy import Shard
from vllm_heterocache.startup.serving_plan import (
    all_assignments,
    check_host_pools,
    compact_min_tokens,
    rank_assignment,
)

LAYERS, HEADS = 6, 4


def make_profile(seed: int = 0, **changes) -> HeadProfile:
    rng = np.random.default_rng(seed)
    similarity = rng.random((3, LAYERS, HEADS, HEADS)).astype(np.float32)
    for distance in range(3):
        similarity[distance, LAYERS - distance :] = np.nan
    scores = {
        name: rng.random((LAYERS, HEADS)).astype(np.float32)
        for name in ("stability", "retrieval", "induction")
    }
    model = ModelIdentity("m", "LlamaForCausalLM", LAYERS, 2 * HEADS, HEADS, 64)
    return HeadProfile(
        model, {"top_share": 0.2}, {}, **{**scores, "similarity": similarity, **changes}
    )


def make_config(profile: HeadProfile | None, **options) -> HeteroCacheConfig:
    data = None if profile is None else profile.to_json()
    return HeteroCacheConfig(profile_data=data, **options)


def test_a_budget_of_one_keeps_every_head_whole_and_needs_no_profile():
    assignment = rank_assignment(
        make_config(None, gpu_budget=1.0), Shard([2, 3, 4], [0, 1], LAYERS)
    )
    assert assignment.roles.shape == (3, 2)
    assert assignment.full.all() and not (assignment.leaders >= 0).any()


@pytest.mark.parametrize("recipe", ["retrieval", "paper"])
def test_one_rank_gets_the_roles_of_the_whole_model(recipe):
    options = dict(recipe=recipe, gpu_budget=0.6, full_share=0.4, similarity_threshold=0.8)
    config = make_config(make_profile(), **options)
    assignment = rank_assignment(config, Shard(range(LAYERS), range(HEADS), LAYERS))
    expected = assign_heads(
        # from_json: JSON holds 5 digits
        HeadProfile.from_json(make_profile().to_json()),
        stability_threshold=config.stability_threshold,
        **options,
    )
    for name in ("roles", "leaders", "weights"):
        assert np.array_equal(getattr(assignment, name), getattr(expected, name))
    assert (assignment.leaders >= 0).any()


def test_options_reach_the_recipe():
    profile = make_profile()

    def num_full(**options) -> int:
        config = make_config(profile, gpu_budget=0.8, **options)
        return rank_assignment(config, Shard(range(LAYERS), range(HEADS), LAYERS)).num_full

    assert num_full(full_share=0.25) == 4 and num_full(full_share=0.5) == 9
    paper = dict(recipe="paper", similarity_threshold=1.0)  # nobody is led
    assert num_full(**paper, stability_threshold=0.0) == 0
    assert num_full(**paper, stability_threshold=0.3) == int((profile.stability < 0.3).sum()) > 0


@pytest.mark.parametrize(
    "layers, heads", [(range(6), [2, 3]), (range(2, 5), range(4)), ([1, 2, 3, 4], [1, 2])]
)
def test_clusters_of_a_rank_are_made_of_its_own_heads(layers, heads):
    """Every similarity within the rank is .9 between heads of one column, else at chance: a
    satellite must follow a pivot of its own column, in indices of the rank."""
    similarity = np.full((3, LAYERS, HEADS, HEADS), 0.2, np.float32)
    for distance in range(3):
        similarity[distance, :, range(HEADS), range(HEADS)] = 0.9
        similarity[distance, LAYERS - distance :] = np.nan
    profile = make_profile(similarity=similarity)
    assignment = rank_assignment(make_config(profile, gpu_budget=0.7), Shard(layers, heads, LAYERS))
    shape = len(layers), len(heads)
    assert assignment.roles.shape == shape
    led = np.argwhere(assignment.leaders >= 0)
    assert len(led)
    for layer, head in led:
        pivot_layer, pivot_head = divmod(int(assignment.leaders[layer, head]), shape[1])
        assert assignment.roles[pivot_layer, pivot_head] == HeadRole.PIVOT
        assert pivot_head == head and layer - 2 <= pivot_layer < layer


@pytest.mark.parametrize("layers, heads", [(range(6), [2, 3]), (range(2, 5), range(4))])
def test_heads_of_other_ranks_do_not_matter(layers, heads):
    profile, other = make_profile(seed=0), make_profile(seed=1)
    own = np.zeros((LAYERS, HEADS), bool)
    own[np.ix_(list(layers), list(heads))] = True
    # similarity[d, l, h, g]: both (l, h) and (l + d, g) must be the rank's
    inside = np.zeros(profile.similarity.shape, bool)
    for distance in range(3):
        for layer in range(LAYERS - distance):
            inside[distance, layer] = np.outer(own[layer], own[layer + distance])
    mixed = make_profile(
        seed=0,
        retrieval=np.where(own, profile.retrieval, other.retrieval),
        similarity=np.where(inside, profile.similarity, other.similarity),
    )
    alone, among = (
        rank_assignment(make_config(p, gpu_budget=0.7), Shard(layers, heads, LAYERS))
        for p in (profile, mixed)
    )
    assert (alone.leaders >= 0).any()
    assert np.array_equal(alone.roles, among.roles)
    assert np.array_equal(alone.leaders, among.leaders)
    # and they would: the scores of the other heads' profile give other roles here
    elsewhere = rank_assignment(make_config(other, gpu_budget=0.7), Shard(layers, heads, LAYERS))
    assert not np.array_equal(alone.roles, elsewhere.roles)


def test_stored_satellites_whose_leader_is_on_another_rank_are_not_led_from_there():
    """A published cluster file: roles only, no similarities to lead them by anew."""
    roles = np.full((2, 4), HeadRole.SATELLITE, np.int8)
    roles[:, 0] = HeadRole.PIVOT
    leaders = np.array([[-1, 0, 0, 0], [-1, 4, 4, 4]], np.int32)
    weights = (roles == HeadRole.SATELLITE).astype(np.float32)
    model = ModelIdentity("m", None, 2, 8, 4, 64)
    stored = HeadAssignment(roles, leaders, weights)
    config = make_config(HeadProfile(model, {}, {}, assignment=stored), recipe="paper")
    config_of_half = make_config(
        HeadProfile(model, {}, {}, assignment=stored), recipe="paper", gpu_budget=0.6
    )
    own = rank_assignment(config_of_half, Shard([0, 1], [0, 1], LAYERS))
    assert own.roles.tolist() == [[HeadRole.PIVOT, HeadRole.SATELLITE]] * 2
    assert own.leaders.tolist() == [[-1, 0], [-1, 2]]
    other = rank_assignment(config, Shard([0, 1], [2, 3], LAYERS))
    assert (other.roles == HeadRole.ANCHOR).all() and (other.leaders == -1).all()


def test_a_budget_under_the_floor_of_the_recipe_is_refused():
    profile = make_profile(stability=np.zeros((LAYERS, HEADS), np.float32))
    config = make_config(profile, recipe="paper", similarity_threshold=1.0)
    with pytest.raises(ValueError, match="gpu_budget 0.3"):
        rank_assignment(config, Shard(range(LAYERS), range(HEADS), LAYERS))


def test_a_profile_that_lacks_what_the_recipe_needs_is_refused():
    profile = make_profile(retrieval=None, induction=None)
    with pytest.raises(ValueError, match='recipe "retrieval" needs'):
        rank_assignment(make_config(profile), Shard(range(LAYERS), range(HEADS), LAYERS))


def make_engine(
    tp_size: int = 1, pp_size: int = 1, max_model_len: int = 4096, replicas: int = 1
) -> SimpleNamespace:
    model = SimpleNamespace(
        get_total_num_hidden_layers=lambda: LAYERS,
        get_total_num_kv_heads=lambda: HEADS,
        get_head_size=lambda: 64,
        dtype=torch.bfloat16,
        max_model_len=max_model_len,
    )
    parallel = SimpleNamespace(
        tensor_parallel_size=tp_size,
        pipeline_parallel_size=pp_size,
        local_world_size=tp_size * pp_size,
        data_parallel_size_local=replicas,
    )
    return SimpleNamespace(model_config=model, parallel_config=parallel)


@pytest.mark.parametrize(
    "tp_size, pp_size, ranks",
    [
        (1, 1, [(range(6), [0, 1, 2, 3])]),
        (2, 1, [(range(6), [0, 1]), (range(6), [2, 3])]),
        (
            2,
            3,
            [(range(i, i + 2), heads) for i in (0, 2, 4) for heads in ([0, 1], [2, 3])],
        ),
        # more ranks than KV heads: vLLM replicates heads
        (8, 1, [(range(6), [rank // 2]) for rank in range(8)]),
    ],
    ids=["1", "TP2", "TP2-PP3", "TP8"],
)
def test_every_rank_gets_roles_for_its_layers_and_heads(tp_size, pp_size, ranks):
    config = make_config(make_profile(), gpu_budget=0.7)
    found = all_assignments(make_engine(tp_size, pp_size), config)
    expected = [rank_assignment(config, Shard(*rank, LAYERS)) for rank in ranks]
    assert len(found) == len(expected) == tp_size * pp_size
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.roles, other.roles)
        assert np.array_equal(one.leaders, other.leaders)


def test_prompts_are_compacted_from_the_length_asked_for_if_the_budgets_allow_it():
    profile = make_profile()
    config = make_config(profile, gpu_budget=0.6, min_prompt_tokens=1)
    assignments = all_assignments(make_engine(tp_size=2), config)
    feasible = compact_min_tokens(config, assignments)
    assert feasible > 16
    # the rank with the most to keep decides
    alone = [compact_min_tokens(config, [assignment]) for assignment in assignments]
    assert feasible == max(alone)
    longer = make_config(profile, gpu_budget=0.6, min_prompt_tokens=feasible + 1)
    assert compact_min_tokens(longer, assignments) == feasible + 1
    protected = make_config(profile, gpu_budget=0.6, min_prompt_tokens=1, recent_pages=12)
    assert compact_min_tokens(protected, assignments) > feasible


def test_a_host_pool_must_hold_the_satellites_of_one_longest_request():
    profile = make_profile()
    config = make_config(profile, gpu_budget=0.7)
    assignments = all_assignments(make_engine(), config)
    satellites = int((assignments[0].roles == HeadRole.SATELLITE).sum())
    # 1024 tokens: 64 pages of 16 tokens, 64 elements of 2 bytes, K and V
    needed = satellites * 64 * (16 * 64 * 2 * 2)
    engine = make_engine(max_model_len=1024)
    enough = make_config(profile, gpu_budget=0.7, cpu_pool_gib=needed / 2**30)
    check_host_pools(engine, enough, assignments)
    short = make_config(profile, gpu_budget=0.7, cpu_pool_gib=(needed - 1) / 2**30)
    with pytest.raises(ValueError, match="cpu_pool_gib .* max_model_len=1024"):
        check_host_pools(engine, short, assignments)
    # one rank with too many satellites is enough to refuse
    with pytest.raises(ValueError, match="cpu_pool_gib"):
        none = make_config(None, gpu_budget=1.0)
        whole = all_assignments(make_engine(), none)
        check_host_pools(engine, short, whole + assignments)
    check_host_pools(engine, short, whole)


@pytest.mark.parametrize("ranks", [{}, {"tp_size": 2}, {"tp_size": 2, "replicas": 3}], ids=str)
def test_workers_of_one_host_share_a_quarter_of_its_free_memory(ranks, monkeypatch):
    config = make_config(make_profile(), gpu_budget=0.7)
    engine = make_engine(max_model_len=1024, **ranks)
    assignments = all_assignments(engine, config)
    satellites = max(int((a.roles == HeadRole.SATELLITE).sum()) for a in assignments)
    block_bytes = satellites * 16 * 64 * 2 * 2
    needed = 4 * len(assignments) * ranks.get("replicas", 1) * 64 * block_bytes

    def free(num_bytes: int) -> None:
        memory = SimpleNamespace(available=num_bytes)
        monkeypatch.setattr("psutil.virtual_memory", lambda: memory)

    free(needed)
    check_host_pools(engine, config, assignments)
    free(needed - 4 * block_bytes)
    with pytest.raises(ValueError, match="cpu_pool_gib"):
        check_host_pools(engine, config, assignments)
