import dataclasses
import json
import statistics

import numpy as np
import pytest

from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole
from vllm_heterocache.heads.profile import LEAD_LAYERS, LEAD_MARGIN, HeadProfile, ModelIdentity
from vllm_heterocache.heads.recipes import (
    LEAST_COMPRESSED_SHARE,
    LEAST_FULL_HEADS,
    STABILITY_FLOOR,
    all_full,
    assign_heads,
    num_full_heads,
)

P, S, A, V = HeadRole.PIVOT, HeadRole.SATELLITE, HeadRole.ANCHOR, HeadRole.VOLATILE
CHANCE = 0.2
OPTIONS = {
    "gpu_budget": 0.3,
    "full_share": 0.5,
    "stability_threshold": 0.4,
    "similarity_threshold": 0.7,
}


def make_profile(num_layers: int, num_kv_heads: int, seed: int = 0) -> HeadProfile:
    rng = np.random.default_rng(seed)
    similarity = rng.random((3, num_layers, num_kv_heads, num_kv_heads), np.float32)
    similarity[0] = (similarity[0] + similarity[0].transpose(0, 2, 1)) / 2
    for d in range(3):
        similarity[d, max(0, num_layers - d) :] = np.nan
    model = ModelIdentity("random", None, num_layers, None, num_kv_heads, None)
    scores = rng.random((2, num_layers, num_kv_heads), np.float32)
    return HeadProfile(model, {"top_share": CHANCE}, {}, *scores, similarity)


def make_quiet_profile(num_layers: int, num_kv_heads: int) -> HeadProfile:
    """Nobody retrieves, nobody resembles anyone, everybody is stable; five layers of similarity."""
    shape = (num_layers, num_kv_heads)
    similarity = np.zeros((5, *shape, num_kv_heads), np.float32)
    for d in range(5):
        similarity[d, max(0, num_layers - d) :] = np.nan
    return dataclasses.replace(
        make_profile(*shape),
        stability=np.ones(shape, np.float32),
        retrieval=np.zeros(shape, np.float32),
        similarity=similarity,
    )


def slow_retrieval(profile: HeadProfile, num_full: int, floor: float) -> tuple[list, list, list]:
    """Roles and leaders by loops over (layer, head) pairs, written from the description."""
    num_layers, num_kv_heads = profile.model.num_layers, profile.model.num_kv_heads
    heads = [(layer, h) for layer in range(num_layers) for h in range(num_kv_heads)]

    def similarity(leader, led):
        if leader == led:
            return 1.0
        d = led[0] - leader[0]
        if not 0 <= d <= LEAD_LAYERS:
            return 0.0
        value = float(profile.similarity[d, leader[0], leader[1], led[1]])
        return 0.0 if value != value else value

    top = max(float(x) for x in profile.retrieval.flat)
    score = {head: float(profile.retrieval[head]) / top for head in heads}
    pivots = sorted(heads, key=lambda head: -score[head])[:num_full]
    roles, leaders = [], []
    for head in heads:
        nearest = max(sorted(pivots), key=lambda p: similarity(p, head))
        if head in pivots:
            roles.append(P)
        elif similarity(nearest, head) >= CHANCE + LEAD_MARGIN:
            roles.append(S)
        else:
            roles.append(A)
        leaders.append(heads.index(nearest) if roles[-1] == S else -1)
    weights = [0.0 if head in pivots else floor + score[head] for head in heads]
    mean = statistics.fmean(w for w in weights if w > 0)
    return roles, leaders, [w / mean for w in weights]


def slow_paper(profile: HeadProfile, tau_stable: float, tau_sim: float) -> tuple[list, list, list]:
    num_layers, num_kv_heads = profile.model.num_layers, profile.model.num_kv_heads
    roles, leaders, weights = [], [], []
    for layer in range(num_layers):
        near = {
            (i, j)
            for i in range(num_kv_heads)
            for j in range(num_kv_heads)
            if i != j and profile.similarity[0, layer, i, j] >= tau_sim
        }
        free, leader = set(range(num_kv_heads)), {}
        while True:
            degree = {i: sum((i, j) in near for j in free) for i in sorted(free)}
            if not degree or max(degree.values()) == 0:
                break
            pivot = min(degree, key=lambda i: (-degree[i], i))
            members = {j for j in free if (pivot, j) in near}
            leader |= dict.fromkeys(members, pivot)
            free -= members | {pivot}
        for i in range(num_kv_heads):
            stability = float(profile.stability[layer, i])
            if i in leader:
                roles.append(S)
            elif i in leader.values():
                roles.append(P)
            else:
                roles.append(A if stability >= tau_stable else V)
            leaders.append(layer * num_kv_heads + leader[i] if i in leader else -1)
            weights.append(1 / max(stability, STABILITY_FLOOR) if roles[-1] in (S, A) else 0.0)
    compressed = [w for w in weights if w > 0]
    return roles, leaders, [w / statistics.fmean(compressed) for w in weights]


# 3 by 30 is SmolLM2-135M, the model of the quality study
@pytest.mark.parametrize("shape", [(30, 3), (7, 5), (1, 11), (13, 1)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_retrieval_recipe_agrees_with_slow_reference(shape, seed):
    profile = make_profile(*shape, seed)
    if shape[0] > 2:
        profile.similarity[1, 0, 0, 0] = np.nan
    assignment = assign_heads(profile, recipe="retrieval", **OPTIONS)
    num_full = max(1, int(0.15 * shape[0] * shape[1]))
    roles, leaders, weights = slow_retrieval(profile, num_full, 0.3)
    assert assignment.roles.reshape(-1).tolist() == roles
    assert assignment.leaders.reshape(-1).tolist() == leaders
    np.testing.assert_allclose(assignment.weights.reshape(-1), weights, rtol=1e-6)


@pytest.mark.parametrize(
    ("gpu_budget", "floor"), [(0.02, 0.06), (0.05, 0.15), (0.1, 0.3), (0.5, 0.3)]
)
def test_the_smaller_the_budget_the_more_of_it_goes_to_few_heads(gpu_budget, floor):
    profile = make_profile(5, 12, seed=3)
    options = {**OPTIONS, "gpu_budget": gpu_budget, "full_share": 0}
    weights = assign_heads(profile, recipe="retrieval", **options).weights
    score = profile.retrieval / profile.retrieval.max()
    expected = (floor + score) / (floor + score).mean()
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(30, 3), (7, 8), (1, 11), (13, 1)], ids=str)
@pytest.mark.parametrize("taus", [(0.5, 0.5), (0.4, 0.7), (0.2, 0.9)], ids=str)
def test_paper_recipe_agrees_with_slow_reference(shape, taus):
    profile = make_profile(*shape, seed=5)
    profile.stability[0, 0] = 0.0  # an unbounded weight would take everything
    options = OPTIONS | {"gpu_budget": 0.999}
    options |= {"stability_threshold": taus[0], "similarity_threshold": taus[1]}
    assignment = assign_heads(profile, recipe="paper", **options)
    roles, leaders, weights = slow_paper(profile, *taus)
    assert assignment.roles.reshape(-1).tolist() == roles
    assert assignment.leaders.reshape(-1).tolist() == leaders
    np.testing.assert_allclose(assignment.weights.reshape(-1), weights, rtol=1e-6)


@pytest.mark.parametrize(
    ("gpu_budget", "full_share", "expected"),
    [
        *[(0.3, 0.5, 13), (0.2, 0.5, 9), (0.12, 0.5, 5), (0.3, 0.01, 1), (0.3, 0.99, 26)],
        (0.3, 0.0, 0),
        *[(0.3, None, 14), (0.2, None, 9), (0.1, None, 5), (0.05, None, 1), (0.02, None, 1)],
    ],
)
def test_number_of_full_heads(gpu_budget, full_share, expected):
    """9, 5 and 1 of 90 have the most right answers at 20, 10 and 5 % (docs/quality.md)."""
    options = OPTIONS | {"gpu_budget": gpu_budget, "full_share": full_share}
    assignment = assign_heads(make_profile(30, 3), recipe="retrieval", **options)
    assert assignment.num_full == assignment.count(P) == expected


@pytest.mark.parametrize("recipe", ["retrieval", "paper"])
def test_even_budgets_change_the_weights_alone(recipe):
    profile = make_profile(30, 3)
    options = OPTIONS | {"gpu_budget": 0.9, "recipe": recipe}
    of_recipe = assign_heads(profile, **options)
    even = assign_heads(profile, **options, even_budgets=True)
    assert np.unique(of_recipe.weights[~of_recipe.full]).size > 1
    np.testing.assert_array_equal(even.weights, np.where(even.full, 0, 1))
    np.testing.assert_array_equal(even.roles, of_recipe.roles)
    np.testing.assert_array_equal(even.leaders, of_recipe.leaders)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 18, 90, 256, 1024])
def test_without_a_share_the_budget_decides_how_many_heads_stay_whole(num_heads):
    budgets = np.arange(1, 100) / 100
    counts = [num_full_heads(num_heads, float(budget), None) for budget in budgets]
    assert counts == sorted(counts)
    for budget, count in zip(budgets * num_heads, counts, strict=True):
        assert (count > 0) == (budget > 1)
        if count > 1:
            others = (budget - count) / (num_heads - count)
            assert others >= LEAST_COMPRESSED_SHARE - 1e-9 or count <= LEAST_FULL_HEADS * num_heads
            assert count <= budget / 2 + 0.5 + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_leader_is_the_most_similar_admissible_pivot(seed):
    profile = make_profile(11, 3, seed)
    assignment = assign_heads(profile, recipe="retrieval", **OPTIONS)
    assert assignment.count(S) > 10
    pivots = np.argwhere(assignment.roles == P).tolist()
    for layer, head in np.argwhere(assignment.roles == S).tolist():
        lead_layer, lead_head = divmod(int(assignment.leaders[layer, head]), 3)
        assert 0 <= layer - lead_layer <= LEAD_LAYERS
        similarity = {
            (pl, ph): profile.similarity[layer - pl, pl, ph, head]
            for pl, ph in pivots
            if 0 <= layer - pl <= LEAD_LAYERS
        }
        assert similarity[lead_layer, lead_head] == max(similarity.values())


def test_strong_retrieval_head_that_resembles_nobody_is_kept_whole():
    profile = make_quiet_profile(8, 2)
    profile.retrieval[5, 1] = 0.8
    profile.similarity[0, :5] = 0.6  # others form clusters, and retrieve nothing
    assignment = assign_heads(profile, recipe="retrieval", **OPTIONS)
    assert assignment.roles[5, 1] == P


def test_two_alike_strong_heads_are_both_kept_whole():
    """SmolLM2-135M at 10 %: its strongest head resembles the second, and is not to be led by it."""
    profile = make_quiet_profile(4, 4)
    profile.retrieval[1] = [0.9, 0.8, 0, 0]
    profile.retrieval[2, 0] = 0.5
    profile.similarity[0, 1, :2, :2] = 0.95
    assignment = assign_heads(profile, recipe="retrieval", **OPTIONS)
    assert np.argwhere(assignment.roles == P).tolist() == [[1, 0], [1, 1]]


def test_heads_that_no_pivot_resembles_become_anchors():
    profile = make_quiet_profile(6, 2)
    profile.retrieval[0, 0] = 1.0
    profile.similarity[0, 0] = 0.9
    profile.similarity[1, 0, 0, 0] = CHANCE + LEAD_MARGIN
    profile.similarity[2, 0, 0, 0] = CHANCE + LEAD_MARGIN - 0.01
    profile.similarity[3, 0] = 1.0  # three layers away: out of reach
    assignment = assign_heads(profile, recipe="retrieval", **OPTIONS)
    assert assignment.roles.tolist() == [[P, S], [S, A], [A, A], [A, A], [A, A], [A, A]]
    assert (assignment.weights[1:] == 1).all()


def test_profile_without_similarities_has_no_satellites():
    profile = dataclasses.replace(make_profile(10, 2), similarity=None)
    assignment = assign_heads(profile, recipe="retrieval", **OPTIONS)
    top = np.sort(profile.retrieval.reshape(-1))[-3:]
    assert sorted(profile.retrieval[assignment.roles == P]) == top.tolist()
    assert assignment.count(A) == 17


@pytest.mark.parametrize("recipe", ["retrieval", "paper"])
def test_ties_go_to_the_lowest_index(recipe):
    profile = make_quiet_profile(1, 6)
    profile.similarity[0] = 0.9
    options = OPTIONS | {"gpu_budget": 0.5}
    assignment = assign_heads(profile, recipe=recipe, **options)
    assert assignment.roles.tolist() == [[P, S, S, S, S, S]]
    assert assignment.leaders.tolist() == [[-1, 0, 0, 0, 0, 0]]


def test_heads_of_equal_score_are_whole_all_over_the_layers():
    profile = make_quiet_profile(10, 2)
    profile.retrieval[1:, 0] = 0.5  # heads 2, 4, ..., 18
    profile.retrieval[0, 1] = 0.9  # head 1
    profile.retrieval[9, 1] = 0.4
    assignment = assign_heads(profile, recipe="retrieval", **OPTIONS | {"gpu_budget": 0.4})
    # four are whole: the strongest, and every third of the nine equal ones
    assert np.flatnonzero(assignment.full).tolist() == [1, 2, 8, 14]


def earlier_file() -> dict:
    """JSON as versions up to vllm-0.26 wrote it: induction scores, similarities of five layers."""
    rng = np.random.default_rng(11)
    layers, heads = 6, 2
    similarity = rng.random((5, layers, heads, heads)).round(5)
    nothing = [[None] * heads] * heads
    scores = {
        name: rng.random((layers, heads)).round(5).tolist()
        for name in ("stability", "retrieval", "induction")
    }
    return {
        "format": "vllm-heterocache/head-profile/1",
        "model": {
            "name": "tiny",
            "architecture": "LlamaForCausalLM",
            "num_layers": layers,
            "num_q_heads": 4,
            "num_kv_heads": heads,
            "head_dim": 64,
            "weights_fingerprint": "abc",
        },
        "settings": {"top_share": 0.2, "induction_prompts": 3},
        "provenance": {"induction_rows": 192},
        **scores,
        "similarity": [
            [similarity[d, i].tolist() if i + d < layers else nothing for i in range(layers)]
            for d in range(5)
        ],
        "assignment": None,
    }


# Recorded from the version that wrote such files, at a budget of 0.7. A reading of the induction
# scores, or of similarities over three or four layers, gives others.
EARLIER = {
    "retrieval": (
        [[A, A], [P, P], [S, A], [P, S], [S, A], [S, P]],
        [[-1, -1], [-1, -1], [2, -1], [-1, 3], [6, -1], [11, -1]],
        [
            [0.5921884179115295, 1.3424766063690186],
            [0.0, 0.0],
            [1.561467170715332, 0.5615512132644653],
            [0.0, 1.534839153289795],
            [0.6833740472793579, 1.1900639533996582],
            [0.534039318561554, 0.0],
        ],
    ),
    "paper": (
        [[V, V], [P, S], [V, A], [V, V], [P, S], [A, V]],
        [[-1, -1], [-1, 2], [-1, -1], [-1, -1], [-1, 8], [-1, -1]],
        [
            [0.0, 0.0],
            [0.0, 0.9303615689277649],
            [0.0, 0.9210065007209778],
            [0.0, 0.0],
            [0.0, 1.4992833137512207],
            [0.649348795413971, 0.0],
        ],
    ),
}


@pytest.mark.parametrize("recipe", ["retrieval", "paper"])
def test_file_of_an_earlier_version_gives_the_roles_that_it_gave(recipe, tmp_path):
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(earlier_file()))
    options = OPTIONS | {"gpu_budget": 0.7}
    assignment = assign_heads(HeadProfile.load(path), recipe=recipe, **options)
    roles, leaders, weights = EARLIER[recipe]
    assert assignment.roles.tolist() == roles
    assert assignment.leaders.tolist() == leaders
    assert assignment.weights.tolist() == weights  # to the last bit


@pytest.mark.parametrize("missing", ["all", "one head"])
def test_induction_scores_of_an_earlier_version_do_not_stand_in_for_retrieval_scores(missing):
    data = earlier_file()
    if missing == "all":
        data["retrieval"] = None
    else:
        data["retrieval"][3][1] = None
    profile = HeadProfile.from_json(data)
    with pytest.raises(ValueError, match="retrieval score of every head") as caught:
        assign_heads(profile, recipe="retrieval", **OPTIONS)
    for part in ('recipe "retrieval"', "'tiny'", "heterocache calibrate", 'recipe "paper"'):
        assert part in str(caught.value)


def paper_example(stability: list[float], edges: list[tuple[int, int]]) -> HeadProfile:
    profile = make_quiet_profile(1, len(stability))
    profile.stability[0] = stability
    for i, j in edges:
        profile.similarity[0, 0, i, j] = profile.similarity[0, 0, j, i] = 0.7
    return profile


def test_paper_recipe_worked_example():
    """A path 0-1-2-3 and a lonely 4: head 1 takes 0 and 2, so 3 is left alone."""
    profile = paper_example([0.5, 0.9, 0.25, 0.4, 0.3], [(0, 1), (1, 2), (2, 3)])
    assignment = assign_heads(profile, recipe="paper", **OPTIONS | {"gpu_budget": 0.5})
    assert assignment.roles.tolist() == [[S, P, S, A, V]]
    assert assignment.leaders.tolist() == [[1, -1, 1, -1, -1]]
    # 1 / stability = 2, 4, 2.5, of mean 17 / 6
    expected = [[12 / 17, 0, 24 / 17, 15 / 17, 0]]
    np.testing.assert_allclose(assignment.weights, expected, rtol=1e-6)


def test_paper_recipe_takes_degrees_among_the_heads_that_are_left():
    """Head 0 has four neighbours. Of the rest, 5 has lost three of four, so 6 goes first."""
    edges = [(0, 1), (0, 2), (0, 3), (0, 4), (5, 1), (5, 2), (5, 3), (5, 6), (6, 7)]
    profile = paper_example([0.5] * 8, edges)
    assignment = assign_heads(profile, recipe="paper", **OPTIONS)
    assert assignment.roles.tolist() == [[P, S, S, S, S, S, P, S]]
    assert assignment.leaders.tolist() == [[-1, 0, 0, 0, 0, 6, -1, 6]]


def test_stored_threshold_values_reach_the_threshold():
    """0.7 as float32 is less than 0.7."""
    profile = paper_example([0.7, 0.7, 0.7], [(0, 1)])
    options = OPTIONS | {"gpu_budget": 0.5, "stability_threshold": 0.7}
    assignment = assign_heads(profile, recipe="paper", **options)
    assert assignment.roles.tolist() == [[P, S, A]]


def stored_profile() -> HeadProfile:
    assignment = HeadAssignment(
        np.array([[P, S, S, S]], np.int8),
        np.array([[-1, 0, 0, 0]], np.int32),
        np.array([[0, 0.5, 1, 1.5]], np.float32),
    )
    model = ModelIdentity("published", None, 1, None, 4, None)
    return HeadProfile(model, {}, {}, assignment=assignment)


def test_paper_recipe_uses_stored_roles_of_a_profile_without_statistics():
    profile = stored_profile()
    assert assign_heads(profile, recipe="paper", **OPTIONS) is profile.assignment


@pytest.mark.parametrize("gpu_budget", [0.25, 0.2])
def test_budget_at_or_under_the_floor_of_the_paper_recipe_is_refused(gpu_budget):
    with pytest.raises(ValueError, match=rf"gpu_budget {gpu_budget} .*0\.2500") as caught:
        assign_heads(stored_profile(), recipe="paper", **OPTIONS | {"gpu_budget": gpu_budget})
    for part in ("raise gpu_budget", "similarity_threshold", 'recipe "retrieval"'):
        assert part in str(caught.value)


@pytest.mark.parametrize(("num_layers", "num_full"), [(3, 0), (4, 1), (6, 1), (7, 1)])
def test_budget_too_small_for_one_whole_head_keeps_none_whole(num_layers, num_full):
    """0.3 of 3 heads is less than a head, of 4 more; half of 0.3 of 7 is a head."""
    assignment = assign_heads(make_profile(num_layers, 1), recipe="retrieval", **OPTIONS)
    assert assignment.num_full == assignment.count(HeadRole.PIVOT) == num_full
    if not num_full:
        assert assignment.count(HeadRole.ANCHOR) == num_layers and assignment.floor == 0


def test_retrieval_recipe_without_scores_is_refused():
    with pytest.raises(ValueError, match=r'"retrieval" needs.*\'published\'.*recipe "paper"'):
        assign_heads(stored_profile(), recipe="retrieval", **OPTIONS)


def test_paper_recipe_without_statistics_is_refused():
    profile = dataclasses.replace(make_profile(4, 2), stability=None)
    with pytest.raises(ValueError, match=r'"paper" needs stability.*recipe "retrieval"'):
        assign_heads(profile, recipe="paper", **OPTIONS)


def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(ValueError, match=r'\'magic\'.*"retrieval" or "paper"'):
        assign_heads(make_profile(4, 2), recipe="magic", **OPTIONS)


def test_full_budget_keeps_every_head_whole():
    assignment = assign_heads(stored_profile(), recipe="retrieval", **OPTIONS | {"gpu_budget": 1.0})
    assignment.validate()
    assert assignment.floor == 1.0
    np.testing.assert_array_equal(assignment.roles, all_full(1, 4).roles)


@pytest.mark.parametrize("finder_share", [0.01, 0.1, 0.35, 0.99])
def test_finders_are_the_compressed_heads_of_the_highest_scores(finder_share):
    profile = make_profile(5, 4, seed=2)
    assignment = assign_heads(profile, recipe="retrieval", finder_share=finder_share, **OPTIONS)
    without = assign_heads(profile, recipe="retrieval", **OPTIONS)
    assert np.array_equal(assignment.full, without.full)
    assert np.array_equal(assignment.weights, without.weights)
    finders, compressed = assignment.finders, np.flatnonzero(~without.full)
    assert len(finders) == min(max(1, int(finder_share * 20 + 0.5)), len(compressed))
    score = profile.retrieval.reshape(-1)
    rest = np.setdiff1d(compressed, finders)
    assert set(finders) <= set(compressed)
    assert not len(rest) or score[finders].min() >= score[rest].max()
    roles = assignment.roles.reshape(-1)
    assert set(roles[rest]) <= {A} and set(roles[np.flatnonzero(without.full)]) == {V}
    assert np.array_equal(np.flatnonzero(assignment.leaders.reshape(-1) >= 0), finders)
    assert assignment.num_led == len(finders)
    data = json.loads(json.dumps(assignment.to_json()))
    assert np.array_equal(HeadAssignment.from_json(data).leaders, assignment.leaders)


def test_finders_of_equal_score_are_spread_evenly_over_the_heads():
    """As whole heads are: else the first layers had all of them."""
    profile = make_profile(8, 4, seed=2)
    scores = np.zeros((8, 4), np.float32)
    scores[3, 1] = 1  # the whole head
    profile = dataclasses.replace(profile, retrieval=scores)
    options = OPTIONS | {"gpu_budget": 0.05}
    assignment = assign_heads(profile, recipe="retrieval", finder_share=0.25, **options)
    assert np.flatnonzero(assignment.full).tolist() == [13]
    # eight of the 31 others, whose flat indices are one higher behind the whole head
    assert assignment.finders.tolist() == [0, 3, 7, 11, 16, 20, 24, 28]


def test_a_finder_leads_itself_and_nobody_else():
    assignment = assign_heads(make_profile(3, 3), recipe="retrieval", finder_share=0.3, **OPTIONS)
    wrong = assignment.leaders.copy()
    wrong.reshape(-1)[assignment.finders] = assignment.finders[::-1]
    with pytest.raises(ValueError, match="a finder must lead itself"):
        dataclasses.replace(assignment, leaders=wrong).validate()
