from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole
from vllm_heterocache.heads.profile import HeadProfile, ModelIdentity
from vllm_heterocache.heads.recipes import configured_heads
from vllm_heterocache.policies import make_policy, policy_class
from vllm_heterocache.policies.policy import Policy, Shard
from vllm_heterocache.startup.resolve import assign_ranks, check_host_pools, make_plan
from vllm_heterocache.startup.serving_plan import ServingPlan, compact_min_tokens, serving_policy

LAYERS, HEADS = 6, 4
WHOLE = Shard(range(LAYERS), range(HEADS), LAYERS)


def make_profile(seed: int = 0, **changes) -> HeadProfile:
    rng = np.random.default_rng(seed)
    similarity = rng.random((3, LAYERS, HEADS, HEADS)).astype(np.float32)
    for distance in range(3):
        similarity[distance, LAYERS - distance :] = np.nan
    scores = {
        name: rng.random((LAYERS, HEADS)).astype(np.float32) for name in ("stability", "retrieval")
    }
    model = ModelIdentity("m", "LlamaForCausalLM", LAYERS, 2 * HEADS, HEADS, 64)
    return HeadProfile(
        model, {"top_share": 0.2}, {}, **{**scores, "similarity": similarity, **changes}
    )


def policy_of(config: HeteroCacheConfig) -> Policy:
    return serving_policy(config, make_policy(config))


def assign(profile: HeadProfile | None, shard: Shard = WHOLE, **options) -> HeadAssignment:
    """Roles of one rank."""
    config = HeteroCacheConfig(**options)
    return policy_of(config).assign(config, shard, profile)


def test_a_budget_of_one_keeps_every_head_whole_and_needs_no_profile():
    assignment = assign(None, Shard([2, 3, 4], [0, 1], LAYERS), gpu_budget=1.0)
    assert assignment.roles.shape == (3, 2)
    assert assignment.full.all() and not (assignment.leaders >= 0).any()


@pytest.mark.parametrize("recipe", ["retrieval", "paper"])
def test_one_rank_gets_the_roles_of_the_whole_model(recipe):
    options = {"recipe": recipe, "gpu_budget": 0.6, "full_share": 0.4, "similarity_threshold": 0.8}
    assignment = assign(make_profile(), **options)
    expected = configured_heads(make_profile(), HeteroCacheConfig(**options))
    for name in ("roles", "leaders", "weights"):
        assert np.array_equal(getattr(assignment, name), getattr(expected, name))
    assert (assignment.leaders >= 0).any()


def test_options_reach_the_recipe():
    profile = make_profile()

    def num_full(**options) -> int:
        return assign(profile, gpu_budget=0.8, **options).num_full

    assert num_full(full_share=0.25) == 4 and num_full(full_share=0.5) == 9
    paper = {"recipe": "paper", "similarity_threshold": 1.0}  # nobody is led
    assert num_full(**paper, stability_threshold=0.0) == 0
    assert num_full(**paper, stability_threshold=0.3) == int((profile.stability < 0.3).sum()) > 0


@pytest.mark.parametrize(
    ("layers", "heads"), [(range(6), [2, 3]), (range(2, 5), range(4)), ([1, 2, 3, 4], [1, 2])]
)
def test_clusters_of_a_rank_are_made_of_its_own_heads(layers, heads):
    """Every similarity within the rank is .9 between heads of one column, else at chance: a
    satellite must follow a pivot of its own column, in indices of the rank."""
    similarity = np.full((3, LAYERS, HEADS, HEADS), 0.2, np.float32)
    for distance in range(3):
        similarity[distance, :, range(HEADS), range(HEADS)] = 0.9
        similarity[distance, LAYERS - distance :] = np.nan
    profile = make_profile(similarity=similarity)
    shard = Shard(layers, heads, LAYERS)
    assignment = assign(profile, shard, gpu_budget=0.7, finder_share=0)
    shape = len(layers), len(heads)
    assert assignment.roles.shape == shape
    led = np.argwhere(assignment.leaders >= 0)
    assert len(led)
    for layer, head in led:
        pivot_layer, pivot_head = divmod(int(assignment.leaders[layer, head]), shape[1])
        assert assignment.roles[pivot_layer, pivot_head] == HeadRole.PIVOT
        assert pivot_head == head and layer - 2 <= pivot_layer < layer


@pytest.mark.parametrize("options", [{}, {"finder_share": 0}], ids=str)
@pytest.mark.parametrize(("layers", "heads"), [(range(6), [2, 3]), (range(2, 5), range(4))])
def test_heads_of_other_ranks_do_not_matter(layers, heads, options):
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
    shard = Shard(layers, heads, LAYERS)
    alone, among = (assign(p, shard, gpu_budget=0.7, **options) for p in (profile, mixed))
    assert (alone.leaders >= 0).any()
    assert np.array_equal(alone.roles, among.roles)
    assert np.array_equal(alone.leaders, among.leaders)
    # and they would: the scores of the other heads' profile give other roles here
    elsewhere = assign(other, shard, gpu_budget=0.7, **options)
    assert not np.array_equal(alone.roles, elsewhere.roles)


def test_stored_satellites_whose_leader_is_on_another_rank_are_not_led_from_there():
    """A published cluster file: roles only, no similarities to lead them by anew."""
    roles = np.full((2, 4), HeadRole.SATELLITE, np.int8)
    roles[:, 0] = HeadRole.PIVOT
    leaders = np.array([[-1, 0, 0, 0], [-1, 4, 4, 4]], np.int32)
    weights = (roles == HeadRole.SATELLITE).astype(np.float32)
    model = ModelIdentity("m", None, 2, 8, 4, 64)
    profile = HeadProfile(model, {}, {}, assignment=HeadAssignment(roles, leaders, weights))
    own = assign(profile, Shard([0, 1], [0, 1], LAYERS), recipe="paper", gpu_budget=0.6)
    assert own.roles.tolist() == [[HeadRole.PIVOT, HeadRole.SATELLITE]] * 2
    assert own.leaders.tolist() == [[-1, 0], [-1, 2]]
    other = assign(profile, Shard([0, 1], [2, 3], LAYERS), recipe="paper")
    assert (other.roles == HeadRole.ANCHOR).all() and (other.leaders == -1).all()


def test_a_budget_under_the_floor_of_the_recipe_is_refused():
    profile = make_profile(stability=np.zeros((LAYERS, HEADS), np.float32))
    with pytest.raises(ValueError, match=r"gpu_budget 0\.3"):
        assign(profile, recipe="paper", similarity_threshold=1.0)


def test_a_profile_that_lacks_what_the_recipe_needs_is_refused():
    profile = make_profile(retrieval=None)
    with pytest.raises(ValueError, match='recipe "retrieval" needs'):
        assign(profile)


def make_engine(
    tp_size: int = 1,
    pp_size: int = 1,
    max_model_len: int = 4096,
    replicas: int = 1,
    cache_dtype: str = "auto",
) -> SimpleNamespace:
    model = SimpleNamespace(
        hf_text_config=SimpleNamespace(),
        get_sliding_window=lambda: None,
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
    return SimpleNamespace(
        model_config=model,
        parallel_config=parallel,
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        quant_config=None,
    )


def plan_for(engine: SimpleNamespace, **options) -> ServingPlan:
    """The plan that start-up makes of these options, with `make_profile`."""
    config = HeteroCacheConfig(**options)
    policy = policy_of(config)
    return make_plan(engine, config, policy, make_profile() if policy.needs_profile else None)


def assert_same_roles(found: Sequence[HeadAssignment], expected: Sequence[HeadAssignment]) -> None:
    for one, other in zip(found, expected, strict=True):
        for name in ("roles", "leaders", "weights"):
            array, wanted = getattr(one, name), getattr(other, name)
            assert array.dtype == wanted.dtype and np.array_equal(array, wanted)


@pytest.mark.parametrize(
    ("tp_size", "pp_size", "ranks"),
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
    profile, config = make_profile(), HeteroCacheConfig(gpu_budget=0.7)
    found = assign_ranks(make_engine(tp_size, pp_size), config, policy_of(config), profile)
    expected = [assign(profile, Shard(*rank, LAYERS), gpu_budget=0.7) for rank in ranks]
    assert len(found) == len(expected) == tp_size * pp_size
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.roles, other.roles)
        assert np.array_equal(one.leaders, other.leaders)


def test_a_rank_finds_its_own_roles_in_the_plan():
    plan = plan_for(make_engine(tp_size=2, pp_size=3), gpu_budget=0.7)
    for pp_rank in range(3):
        for tp_rank in range(2):
            layers, heads = range(2 * pp_rank, 2 * pp_rank + 2), [2 * tp_rank, 2 * tp_rank + 1]
            expected = assign(make_profile(), Shard(layers, heads, LAYERS), gpu_budget=0.7)
            found = plan.assignment(pp_rank, tp_rank, tp_size=2)
            assert_same_roles([found], [expected])


PLANS = [
    {"gpu_budget": 0.7, "drift_interval": 3, "cpu_pool_gib": 1 / 3},
    {"recipe": "paper", "gpu_budget": 0.7, "similarity_threshold": 0.8},
    {"policy": "snapkv", "policy_options": {"window": 16, "group": "max"}},
    {"policy": "pyramidkv", "policy_options": {"beta": 7.7}},
    {"policy": "h2o", "gpu_budget": 1 / 3},
    {"policy": "quest", "policy_options": {"full_layers": 1}},
    {"policy": "snapkv", "gpu_budget": 1.0},
]


@pytest.mark.parametrize("options", PLANS, ids=str)
def test_a_plan_arrives_in_other_processes_as_it_was_made(options):
    plan = plan_for(make_engine(tp_size=2, replicas=2), **options)
    sections = json.loads(json.dumps(plan.to_additional_config()))
    arrived = ServingPlan.from_additional_config({"other_plugin": 7, **sections})
    assert_same_roles(arrived.assignments, plan.assignments)
    assert arrived.policy == plan.policy and type(arrived.policy) is type(plan.policy)
    assert replace(arrived, assignments=()) == replace(plan, assignments=())
    assert arrived.to_additional_config() == sections
    assert arrived.config == HeteroCacheConfig.from_additional_config(sections)


def test_weights_travel_with_all_their_digits():
    plan = plan_for(make_engine(), gpu_budget=0.7)
    weights = plan.assignments[0].weights
    assert (weights.round(5) != weights).any(), "five digits would do"
    sections = json.loads(json.dumps(plan.to_additional_config()))
    assert np.array_equal(
        ServingPlan.from_additional_config(sections).assignments[0].weights, weights
    )


def test_without_a_plan_there_is_none():
    with pytest.raises(KeyError, match="heterocache_plan"):
        ServingPlan.from_additional_config({"heterocache": {}})


@pytest.mark.parametrize("policy", ["heterocache", "snapkv", "h2o", "quest"])
def test_the_policy_in_force_is_the_one_asked_for_unless_everything_is_kept(policy):
    plan = plan_for(make_engine(), policy=policy, gpu_budget=0.7)
    assert type(plan.policy) is policy_class(policy)
    whole = plan_for(make_engine(), policy=policy, gpu_budget=1.0)
    assert whole.policy.name == "full" and whole.config.policy == policy


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"policy": "snapkv", "policy_options": {"window": 48}}, 48),
        ({"policy": "h2o"}, 4096),
        ({"policy": "h2o", "gpu_budget": 1.0}, 1),
        ({"gpu_budget": 1.0}, 1),
        ({"gpu_budget": 0.7}, 128),
        ({"evicted_means": True}, 1),
        ({"matched_share": 0}, 1),
        ({"policy": "h2o", "matched_share": 0.5}, 4096),
        ({"policy": "snapkv", "matched_share": 0.5}, 128),
    ],
    ids=str,
)
def test_tokens_whose_queries_are_needed_are_computed_again(options, tokens):
    assert plan_for(make_engine(max_model_len=4096), **options).recomputed_tokens == tokens


@pytest.mark.parametrize(("kind", "tokens"), [("sliding_attention", 128), ("mamba", 1)])
def test_matched_tokens_compute_nothing_again_beside_recurrent_layers(kind, tokens):
    """There a hit in the prefix cache ends with a block or an earlier prompt, or is none."""
    engine = make_engine()
    kinds = [kind, "full_attention"] * LAYERS
    engine.model_config.hf_text_config.layer_types = kinds
    engine.model_config.get_sliding_window = lambda: 64
    engine.model_config.get_total_num_hidden_layers = lambda: len(kinds)
    assert plan_for(engine).recomputed_tokens == tokens
    window = {"policy": "snapkv", "policy_options": {"window": 48}}
    assert plan_for(engine, **window).recomputed_tokens == 48


# [layers][heads] retrieval scores: all heads look for facts, or one alone does
ALL_LOOK = np.linspace(0.2, 1, LAYERS * HEADS, dtype=np.float32).reshape(LAYERS, HEADS)
ONE_LOOKS = np.where(ALL_LOOK == 1, ALL_LOOK, np.float32(0.2) * ALL_LOOK)


@pytest.mark.parametrize(
    ("retrieval", "options", "share"),
    [
        (ALL_LOOK, {"full_share": 0}, 0.1),
        (ALL_LOOK, {"full_share": 0.1}, 0.1),  # one head is whole
        (ALL_LOOK, {"full_share": 0.3}, 0.5),  # two are
        (ONE_LOOKS, {"full_share": 0}, 0.5),
        (ONE_LOOKS, {"full_share": 0.1}, 0.5),
        (ALL_LOOK, {"full_share": 0, "matched_share": 0.4}, 0.4),
        (ALL_LOOK, {"full_share": 0, "matched_share": 0}, 0),
        (ALL_LOOK, {"full_share": 0, "evicted_means": True}, 0),
        (ALL_LOOK, {"recipe": "paper", "similarity_threshold": 1.0, "stability_threshold": 0}, 0),
        (ALL_LOOK, {"policy": "snapkv"}, 0),
    ],
)
def test_matched_tokens_take_less_where_many_heads_look_for_facts_and_at_most_one_is_whole(
    retrieval, options, share
):
    profile, config = make_profile(retrieval=retrieval), HeteroCacheConfig(**options)
    policy = policy_of(config)
    plan = make_plan(make_engine(), config, policy, profile if policy.needs_profile else None)
    assert plan.config.share_of_matched == share
    assert plan.config.mixes_means == (share > 0)
    sections = json.loads(json.dumps(plan.to_additional_config()))
    assert ServingPlan.from_additional_config(sections).config == plan.config


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (1, 2), (8, 1)])
@pytest.mark.parametrize("num_looking", [0, 1, LAYERS * HEADS])
def test_ranks_have_one_share_of_matched_tokens(tp_size, pp_size, num_looking):
    """That of the whole model, where the heads of a rank would have another."""
    scores = np.full(LAYERS * HEADS, 0.1, np.float32)
    scores[:num_looking] = 1
    profile = make_profile(retrieval=scores.reshape(LAYERS, HEADS))
    config = HeteroCacheConfig(full_share=0, gpu_budget=0.6)
    plan = make_plan(make_engine(tp_size, pp_size), config, policy_of(config), profile)
    # without a head that looks more than others all are the strongest
    assert plan.config.share_of_matched == (0.5 if num_looking == 1 else 0.1)


def test_heads_that_are_whole_on_any_rank_count():
    """One on each of two ranks are two."""
    profile, config = make_profile(retrieval=ALL_LOOK), HeteroCacheConfig(full_share=0.1)
    alone, two = (
        make_plan(make_engine(tp_size), config, policy_of(config), profile) for tp_size in (1, 2)
    )
    assert [sum(one.num_full for one in plan.assignments) for plan in (alone, two)] == [1, 2]
    assert alone.config.share_of_matched == 0.1 and two.config.share_of_matched == 0.5


def test_prompts_are_compacted_from_the_length_asked_for_if_the_budgets_allow_it():
    engine = make_engine(tp_size=2)

    def shortest(**options) -> int:
        return plan_for(engine, gpu_budget=0.6, **options).compact_min_tokens

    plan = plan_for(engine, gpu_budget=0.6, min_prompt_tokens=1)
    feasible = plan.compact_min_tokens
    assert feasible > 16
    # the rank with the most to keep decides
    alone = [compact_min_tokens(plan.config, [assignment]) for assignment in plan.assignments]
    assert feasible == max(alone)
    assert shortest(min_prompt_tokens=feasible + 1) == feasible + 1
    assert shortest(min_prompt_tokens=1, recent_pages=12) > feasible


# The heads whose prompts go to the host by default, and where no head is a finder
HOST_ROLES = [({}, HeadRole.FINDER), ({"finder_share": 0}, HeadRole.SATELLITE)]


@pytest.mark.parametrize(("options", "role"), HOST_ROLES, ids=["finders", "satellites"])
@pytest.mark.parametrize(("cache_dtype", "size"), [("auto", 2), ("fp8_e5m2", 1)])
def test_a_host_pool_must_hold_one_longest_request(cache_dtype, size, options, role):
    engine = make_engine(max_model_len=1024, cache_dtype=cache_dtype)
    plan = plan_for(engine, gpu_budget=0.7, **options)
    led = plan.assignments[0].count(role)
    assert led
    # 1024 tokens: 64 pages of 16 tokens, 64 elements, K and V
    needed = led * 64 * (16 * 64 * 2 * size)
    plan_for(engine, gpu_budget=0.7, cpu_pool_gib=needed / 2**30, **options)
    short = {"gpu_budget": 0.7, "cpu_pool_gib": (needed - 1) / 2**30, **options}
    with pytest.raises(ValueError, match=r"cpu_pool_gib .* max_model_len=1024"):
        plan_for(engine, **short)
    # one rank with too many such heads is enough to refuse
    whole = plan_for(make_engine(), gpu_budget=1.0).assignments
    too_small = replace(plan, config=HeteroCacheConfig(**short))
    with pytest.raises(ValueError, match="cpu_pool_gib"):
        check_host_pools(engine, replace(too_small, assignments=whole + plan.assignments))
    check_host_pools(engine, replace(too_small, assignments=whole))


@pytest.mark.parametrize(("options", "role"), HOST_ROLES, ids=["finders", "satellites"])
@pytest.mark.parametrize("ranks", [{}, {"tp_size": 2}, {"tp_size": 2, "replicas": 3}], ids=str)
def test_workers_of_one_host_share_a_quarter_of_its_free_memory(ranks, options, role, monkeypatch):
    engine = make_engine(max_model_len=1024, **ranks)
    plan = plan_for(engine, gpu_budget=0.7, **options)
    led = max(assignment.count(role) for assignment in plan.assignments)
    block_bytes = led * 16 * 64 * 2 * 2
    needed = 4 * len(plan.assignments) * ranks.get("replicas", 1) * 64 * block_bytes

    def free(num_bytes: int) -> None:
        memory = SimpleNamespace(available=num_bytes)
        monkeypatch.setattr("psutil.virtual_memory", lambda: memory)

    free(needed)
    plan_for(engine, gpu_budget=0.7, **options)
    free(needed - 4 * block_bytes)
    with pytest.raises(ValueError, match="cpu_pool_gib"):
        plan_for(engine, gpu_budget=0.7, **options)


def test_a_host_pool_beyond_the_free_memory_is_refused_before_anything_is_loaded(monkeypatch):
    engine = make_engine(max_model_len=1024, tp_size=2)
    memory = SimpleNamespace(available=12 << 30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr("vllm_heterocache.startup.host_memory._left_by_cgroups", lambda root: [])
    plan_for(engine, gpu_budget=0.7, cpu_pool_gib=6)
    with pytest.raises(ValueError, match=r"cpu_pool_gib=6.5 .*6.00 GiB.*for each worker; .*less"):
        plan_for(engine, gpu_budget=0.7, cpu_pool_gib=6.5)
    # nothing is allocated where nothing is fetched
    plan_for(engine, gpu_budget=0.7, cpu_pool_gib=6.5, drift_threshold=0)
    plan_for(engine, gpu_budget=1.0, cpu_pool_gib=6.5)
