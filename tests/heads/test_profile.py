import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole
from vllm_heterocache.heads.profile import FORMAT, HeadProfile, ModelIdentity

P, S, A, V = HeadRole.PIVOT, HeadRole.SATELLITE, HeadRole.ANCHOR, HeadRole.VOLATILE
MODEL = ModelIdentity("tiny", "LlamaForCausalLM", 3, 6, 2, 64, "abc")


def make_profile(assignment: HeadAssignment | None = None, distances: int = 3) -> HeadProfile:
    """3 layers x 2 KV heads of random numbers."""
    rng = np.random.default_rng(7)
    similarity = rng.random((distances, 3, 2, 2), np.float32)
    for d in range(distances):
        similarity[d, max(0, 3 - d) :] = np.nan
    scores = rng.random((2, 3, 2), np.float32)
    return HeadProfile(MODEL, {"top_share": 0.2}, {"tool": "test"}, *scores, similarity, assignment)


def make_assignment() -> HeadAssignment:
    return HeadAssignment(
        np.array([[P, S], [S, A], [V, S]], np.int8),
        np.array([[-1, 0], [0, -1], [-1, 0]], np.int32),
        np.array([[0, 1.5], [0.5, 1], [0, 1]], np.float32),
    )


def assert_same_assignment(actual: HeadAssignment, expected: HeadAssignment) -> None:
    for name in ("roles", "leaders", "weights"):
        a, e = getattr(actual, name), getattr(expected, name)
        assert a.dtype == e.dtype, name
        np.testing.assert_allclose(a, e, atol=1e-5, err_msg=name)


def test_saved_profile_loads_as_it_was_up_to_five_digits(tmp_path):
    profile = make_profile(make_assignment())
    profile.save(tmp_path / "p.json")
    loaded = HeadProfile.load(tmp_path / "p.json")
    assert loaded.model == profile.model
    assert (loaded.settings, loaded.provenance) == (profile.settings, profile.provenance)
    for name in ("stability", "retrieval", "similarity"):
        assert getattr(loaded, name).dtype == np.float32
        np.testing.assert_allclose(getattr(loaded, name), getattr(profile, name), atol=6e-6)
    assert_same_assignment(loaded.assignment, profile.assignment)
    # nothing is lost any more from here on
    assert loaded.to_json() == HeadProfile.from_json(loaded.to_json()).to_json()


def test_absent_arrays_stay_absent():
    profile = HeadProfile(MODEL, {}, {})
    loaded = HeadProfile.from_json(json.loads(json.dumps(profile.to_json())))
    assert loaded.similarity is None and loaded.stability is None and loaded.assignment is None


def test_file_is_readable_and_strict_json(tmp_path):
    make_profile(make_assignment()).save(tmp_path / "p.json")
    text = (tmp_path / "p.json").read_text()
    assert "NaN" not in text
    data = json.loads(text)
    assert data["format"] == FORMAT
    assert data["assignment"]["roles"][0] == ["pivot", "satellite"]
    assert data["assignment"]["leaders"][1] == [[0, 0], None]
    assert data["similarity"][1][2] == [[None, None], [None, None]]
    assert max(len(str(x)) for row in data["stability"] for x in row) <= 7
    lines = text.splitlines()
    assert len(lines) < 80 and max(map(len, lines)) <= 100


def test_lead_similarity_covers_own_and_following_layers_only():
    profile = make_profile()
    pairs = profile.lead_similarity(lead_layers=1).reshape(3, 2, 3, 2)
    for layer, head, other, target in np.ndindex(3, 2, 3, 2):
        d = other - layer
        if (layer, head) == (other, target):
            expected = 1.0
        elif 0 <= d <= 1:
            expected = profile.similarity[d, layer, head, target]
        else:
            expected = np.nan
        np.testing.assert_equal(pairs[layer, head, other, target], expected)


def test_distances_that_the_profile_lacks_are_unknown():
    pairs = make_profile(distances=1).lead_similarity(lead_layers=2).reshape(3, 2, 3, 2)
    assert np.isnan(pairs[0, :, 1:]).all() and not np.isnan(pairs[0, :, 0]).any()


def test_nearest_pivot_must_beat_chance_and_ties_go_to_the_lowest_index():
    similarity = np.full((3, 3, 2, 2), np.nan, np.float32)
    similarity[0] = 0.69  # chance 0.6 + margin 0.1 is not reached
    similarity[1, :2] = 0.7  # reached, although 0.7 as float32 is less than 0.7
    similarity[2, 0] = [[0.7, 0.9], [0.7, 0.95]]
    profile = HeadProfile(MODEL, {"top_share": 0.6}, {}, similarity=similarity)
    pivots = np.array([[1, 1], [0, 0], [1, 0]], bool)
    assert profile.nearest_pivots(pivots).tolist() == [[0, 1], [0, 0], [4, 1]]


def test_select_of_everything_changes_nothing():
    profile = make_profile(make_assignment())
    assert profile.select(range(3), [0, 1]).to_json() == profile.to_json()


def test_select_slices_scores_and_similarities():
    profile = make_profile()
    rank = profile.select(range(1, 3), [1])
    expected = dataclasses.replace(MODEL, num_layers=2, num_kv_heads=1, num_q_heads=3)
    assert rank.model == expected
    np.testing.assert_array_equal(rank.retrieval, profile.retrieval[1:, 1:])
    np.testing.assert_array_equal(rank.similarity[0], profile.similarity[0, 1:, 1:, 1:])
    np.testing.assert_array_equal(rank.similarity[1, 0], profile.similarity[1, 1, 1:, 1:])
    assert np.isnan(rank.similarity[1, 1]).all() and np.isnan(rank.similarity[2:]).all()


OF_LAYERS = dataclasses.replace(MODEL, layers=(5, 11, 17))


def of_layers(profile: HeadProfile) -> HeadProfile:
    """The profile of a model of which these layers alone have full attention."""
    return dataclasses.replace(profile, model=OF_LAYERS)


def test_a_profile_says_which_layers_it_describes():
    profile = of_layers(make_profile())
    again = HeadProfile.from_json(json.loads(json.dumps(profile.to_json())))
    assert again.model == OF_LAYERS and list(again.model.layer_ids) == [5, 11, 17]
    again.check_model(OF_LAYERS)
    assert list(MODEL.layer_ids) == [0, 1, 2]
    assert profile.select(range(1, 3), [0, 1]).model.layers == (11, 17)


@pytest.mark.parametrize("layers", [(5, 11, 18), None])
def test_a_profile_of_other_layers_is_refused(layers):
    other = dataclasses.replace(MODEL, layers=layers)
    with pytest.raises(ValueError, match=r"profile data describes layers \[5, 11, 17\] of "):
        of_layers(make_profile()).check_model(other)
    served = (
        r"but HeteroCache serves layers \[5, 11, 17\] of 'tiny', those with full attention; use "
    )
    with pytest.raises(ValueError, match=served):
        dataclasses.replace(make_profile(), model=other).check_model(OF_LAYERS)


def test_a_profile_of_all_layers_of_a_mixed_model_is_refused_by_its_layers():
    """Not by their number, which would read as another model."""
    of_two = dataclasses.replace(MODEL, num_layers=2, layers=(0, 2))
    sentence = (
        r"profile data describes layers 0 to 2 of 'tiny', but HeteroCache serves layers \[0, 2\] "
        r"of 'tiny', those with full attention; use profile \"auto\" or make one with"
    )
    with pytest.raises(ValueError, match=sentence):
        make_profile().check_model(of_two)


@pytest.mark.parametrize("layers", ["5", [5, 11], [5, 17, 11], [5, 5, 11], [-1, 0, 1], [0, 1, 2.0]])
def test_layers_that_are_no_indices_in_order_are_refused(layers):
    data = make_profile().to_json()
    data["model"]["layers"] = layers
    with pytest.raises(ValueError, match=r"model\.layers is .*, not 3 indices of layers"):
        HeadProfile.from_json(data)


def test_select_does_not_reach_layers_of_another_pipeline_rank():
    rank = make_profile().select(range(0, 2), [0, 1])
    assert np.isnan(rank.similarity[1, 1]).all()  # layer 2 is elsewhere
    assert not np.isnan(rank.similarity[1, 0]).any()


def test_selected_satellites_follow_their_leader_by_its_new_index():
    assignment = HeadAssignment(
        np.array([[A, V], [S, P], [V, S]], np.int8),
        np.array([[-1, -1], [3, -1], [-1, 3]], np.int32),
        np.array([[1, 0], [1, 0], [0, 1]], np.float32),
    )
    rank = make_profile(assignment).select(range(1, 3), [0, 1])
    assert rank.assignment.leaders.tolist() == [[1, -1], [-1, 1]]


def test_selected_satellites_without_leader_are_led_anew_or_become_anchors():
    assignment = HeadAssignment(
        np.array([[P, S], [S, P], [V, S]], np.int8),
        np.array([[-1, 0], [0, -1], [-1, 0]], np.int32),
        np.array([[0, 1.5], [0.5, 0], [0, 1]], np.float32),
    )
    profile = make_profile(assignment)
    profile.similarity[1, 1, 1, 1] = 0.8  # pivot (1, 1) can lead satellite (2, 1)
    rank = profile.select(range(3), [1]).assignment
    rank.validate()
    # (0, 1) lies before the only pivot left
    assert rank.roles.tolist() == [[A], [P], [S]]
    assert rank.leaders.tolist() == [[-1], [-1], [1]]
    assert rank.weights.tolist() == [[1.5], [0], [1]]
    no_similarity = dataclasses.replace(profile, similarity=None)
    assert no_similarity.select(range(3), [1]).assignment.roles.tolist() == [[A], [P], [A]]


def test_check_model_accepts_its_own_and_what_is_unknown():
    profile = make_profile()
    profile.check_model(dataclasses.replace(MODEL, name="elsewhere/tiny"))
    unknown = dataclasses.replace(MODEL, num_q_heads=None, head_dim=None)
    dataclasses.replace(profile, model=unknown).check_model(MODEL)


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "num_q_heads", "head_dim"])
def test_check_model_refuses_another_geometry(field):
    other = dataclasses.replace(MODEL, name="big", **{field: 128})
    with pytest.raises(ValueError, match=rf"^profile .*tiny.*{field}.*big.*128.*calibrate"):
        make_profile().check_model(other)


def test_check_model_warns_of_other_weights(caplog):
    caplog.set_level("WARNING", logger="vllm.heterocache")
    make_profile().check_model(dataclasses.replace(MODEL, weights_fingerprint="xyz"))
    assert "other weights" in caplog.text


NEW_NAMES = ("anchor", "volatile", "pivot", "satellite")
OLD_NAMES = ("Stable_Unique", "Decaying_Unique", "Similar_Leader", "Similar_Member")


def reference_data(names: tuple[str, ...]) -> dict:
    """2 layers x 4 KV heads in the layout of the reference repository's cluster files."""
    return {
        "meta": {
            "type_map": {name: code for code, name in enumerate(names, start=1)},
            "counts": dict(zip(names, (1, 1, 2, 4), strict=True)),
        },
        "classification_matrix": [[4, 3, 4, 1], [3, 4, 2, 4]],
        "allocation_matrix": [[0.8, -1.0, 1.2, 0.9], [-1.0, 1.1, -1.0, 1.0]],
        "leader_member_relations": [{"1": [0, 2]}, {"0": [1, 3]}],
    }


@pytest.mark.parametrize("names", [NEW_NAMES, OLD_NAMES], ids=["new-names", "old-names"])
def test_reference_cluster_file_gives_roles(tmp_path, names):
    path = tmp_path / "Head_Analysis_some-model-8b_topk1024_th0.5_sim0.5_step5000.json"
    path.write_text(json.dumps(reference_data(names), indent=4))
    profile = HeadProfile.load(path)
    assert profile.model == ModelIdentity("some-model-8b", None, 2, None, 4, None)
    assert profile.stability is None and profile.similarity is None
    expected = HeadAssignment(
        np.array([[S, P, S, A], [P, S, V, S]], np.int8),
        np.array([[1, -1, 1, -1], [-1, 4, -1, 4]], np.int32),
        np.array([[0.8, 0, 1.2, 0.9], [0, 1.1, 0, 1]], np.float32),
    )
    assert_same_assignment(profile.assignment, expected)
    assert profile.assignment.floor == 3 / 8
    # it can be passed on in this project's format
    assert_same_assignment(HeadProfile.from_json(profile.to_json()).assignment, expected)


def test_reference_file_with_a_leaderless_satellite_is_refused():
    data = reference_data(NEW_NAMES)
    data["leader_member_relations"][0] = {"1": [0]}
    with pytest.raises(ValueError, match=r"clusters\.json.*satellite needs a leader.*calibrate"):
        HeadProfile.from_json(data, "clusters.json")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("roles: none", "not JSON"),
        ("[1, 2]", "format is None"),
        ('{"format": "vllm-heterocache/head-profile/9"}', "head-profile/9"),
        (f'{{"format": "{FORMAT}"}}', "'model'"),
        ("[" * 200_000, "not JSON"),
    ],
    ids=lambda value: value[:40],
)
def test_wrong_file_is_named_with_the_fix(tmp_path, text, reason):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="heterocache calibrate") as caught:
        HeadProfile.load(path)
    assert str(path) in str(caught.value) and reason in str(caught.value)


def test_missing_file_is_named_with_the_fix(tmp_path):
    with pytest.raises(ValueError, match=r"absent.json.*No such file.*calibrate"):
        HeadProfile.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data["stability"].pop(),
        lambda data: data["similarity"][0][0].pop(),
        lambda data: data["assignment"]["roles"][0].__setitem__(0, "boss"),
        lambda data: data["assignment"]["leaders"][0].__setitem__(1, [2, 0]),
        lambda data: data["model"].pop("num_layers"),
        lambda data: data["model"].update(num_layers=3.0),
        lambda data: data["model"].update(num_kv_heads="2"),
        lambda data: data["model"].update(num_q_heads=[6]),
        lambda data: data.update(model=[]),
        lambda data: data.update(settings=[]),
        lambda data: data.update(settings={"top_share": None}),
        lambda data: data.update(settings={"top_share": "0.2"}),
        lambda data: data.update(settings={"top_share": 10**400}),
        lambda data: data["retrieval"][0].__setitem__(0, 10**400),
        lambda data: data["retrieval"][0].__setitem__(0, 1e39),
        lambda data: data["retrieval"][0].__setitem__(0, -0.1),
        lambda data: data["stability"][0].__setitem__(0, -5),
        lambda data: data["similarity"][0][0][0].__setitem__(1, 1e39),
        lambda data: data["assignment"]["weights"][0].__setitem__(1, 10**400),
    ],
)
def test_spoilt_profile_is_refused(spoil):
    data = make_profile(make_assignment()).to_json()
    spoil(data)
    with pytest.raises(ValueError, match=r"spoilt\.json is not a usable head profile"):
        HeadProfile.from_json(data, "spoilt.json")


@pytest.mark.parametrize(
    ("field", "index", "value", "message"),
    [
        ("roles", (0, 1), 9, "unknown role"),
        ("leaders", (1, 1), 0, "no other head"),
        ("leaders", (1, 0), -1, "needs a leader"),
        ("leaders", (1, 0), 6, "must be a pivot"),
        ("leaders", (1, 0), 4, "must be a pivot"),
        ("weights", (1, 1), 0, "weights"),
        ("weights", (0, 0), 1, "weights"),
        ("weights", (1, 1), np.nan, "weights"),
    ],
)
def test_validate_refuses_broken_assignments(field, index, value, message):
    assignment = make_assignment()
    assignment.validate()
    getattr(assignment, field)[index] = value
    with pytest.raises(ValueError, match=message):
        assignment.validate()


def test_validate_refuses_a_leader_in_a_later_layer():
    assignment = HeadAssignment(
        np.array([[S], [P]], np.int8),
        np.array([[1], [-1]], np.int32),
        np.array([[1], [0]], np.float32),
    )
    with pytest.raises(ValueError, match="later layer"):
        assignment.validate()


def test_counts():
    assignment = make_assignment()
    assert (assignment.num_heads, assignment.num_full, assignment.floor) == (6, 2, 1 / 3)
    assert assignment.cluster_sizes().tolist() == [[3, 0], [0, 0], [0, 0]]
    assert [role.is_full for role in (P, S, A, V)] == [True, False, False, True]


def test_pure_modules_import_without_vllm_or_torch():
    modules = ("heads.published_heads", "heads.recipes", "heads.budget", "commands.profile_report")
    code = "import sys\n" + "\n".join(f"import vllm_heterocache.{name}" for name in modules)
    code += "\nprint(sorted({'vllm', 'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
