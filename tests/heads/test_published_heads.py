"""Published head data as head profiles. The files are made here, in the published formats."""

import dataclasses
import json
import logging

import numpy as np
import pytest

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole
from vllm_heterocache.heads.profile import HeadProfile, ModelIdentity
from vllm_heterocache.heads.published_heads import read_published
from vllm_heterocache.policies import make_policy
from vllm_heterocache.policies.policy import Shard

P, S, A, V = HeadRole.PIVOT, HeadRole.SATELLITE, HeadRole.ANCHOR, HeadRole.VOLATILE
F = HeadRole.FINDER
MODEL = ModelIdentity("org/tiny", "LlamaForCausalLM", 3, 4, 2, 64, "feed")
GATES = [[1.0, 0.25], [-0.0014, 0.75], [0.5, 1.0]]
FLAGS = [[0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]]
CLUSTERS = {
    "meta": {"type_map": {"anchor": 1, "volatile": 2, "pivot": 3, "satellite": 4}},
    "classification_matrix": [[3, 4], [1, 2], [4, 3]],
    "allocation_matrix": [[-1, 1.5], [0.5, -1], [1.0, -1]],
    "leader_member_relations": [{"0": [1]}, {}, {"1": [0]}],
}


def table(gates: list) -> str:
    """As numpy's savetxt writes it, with tabs."""
    return "".join("\t".join(f"{gate:.18e}" for gate in row) + "\n" for row in gates)


def headwise(flags: list, **others) -> dict:
    layers = {str(layer): row for layer, row in enumerate(flags)}
    settings = {"sink_token_num": 4, "swa_token_num": 8192, "seqlen_threshold": 16384}
    return {"model_type": "llama", "headwise_config": settings | layers | others}


def read(folder, content, name: str = "heads", model: ModelIdentity = MODEL) -> HeadProfile:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_published(path, model)


def assign(profile: HeadProfile, shard: Shard | None = None, **options) -> HeadAssignment:
    config = HeteroCacheConfig(**options)
    return make_policy(config).assign(config, shard or Shard(range(3), range(2), 3), profile)


def test_gates_are_retrieval_scores_within_0_and_1(tmp_path):
    profile = read(tmp_path, table(GATES))
    np.testing.assert_array_equal(profile.retrieval, [[1, 0.25], [0, 0.75], [0.5, 1]])
    assert profile.retrieval.dtype == np.float32


def test_share_of_a_group_that_retrieves_is_the_score_of_its_kv_head(tmp_path):
    profile = read(tmp_path, headwise(FLAGS), "config.json")
    np.testing.assert_array_equal(profile.retrieval, [[0, 0.5], [1, 0], [0, 0.5]])


def test_layers_of_a_headwise_config_may_stand_in_any_order(tmp_path):
    model = dataclasses.replace(MODEL, num_layers=11)
    flags = [[0, 0, 0, 0]] * 10 + [[0, 0, 0, 1]]
    data = headwise(flags)
    data["headwise_config"] = dict(reversed(data["headwise_config"].items()))
    profile = read(tmp_path, data, model=model)
    assert np.argwhere(profile.retrieval).tolist() == [[10, 1]]


@pytest.mark.parametrize("content", [table(GATES), headwise(FLAGS)], ids=["gates", "headwise"])
def test_what_a_file_of_scores_does_not_tell_is_absent(tmp_path, content):
    profile = read(tmp_path, content)
    assert profile.stability is None and profile.similarity is None and profile.assignment is None


def test_clusters_are_roles_and_nothing_else(tmp_path):
    profile = read(tmp_path, CLUSTERS, "Head_Analysis_tiny-instruct_topk8_th0.5.json")
    assert profile.assignment.roles.tolist() == [[P, S], [A, V], [S, P]]
    assert profile.assignment.leaders.tolist() == [[-1, 0], [-1, -1], [5, -1]]
    assert profile.retrieval is None and profile.stability is None and profile.similarity is None
    assert profile.provenance["measured_on"] == "tiny-instruct"


@pytest.mark.parametrize(
    ("content", "recipe"),
    [(table(GATES), "retrieval"), (headwise(FLAGS), "retrieval"), (CLUSTERS, "paper")],
    ids=["gates", "headwise", "clusters"],
)
def test_saved_profile_is_of_the_model_and_gives_the_same_roles(tmp_path, content, recipe, caplog):
    profile = read(tmp_path, content)
    profile.save(tmp_path / "p.json")
    loaded = HeadProfile.load(tmp_path / "p.json")
    assert loaded.model == dataclasses.replace(MODEL, weights_fingerprint=None)
    with caplog.at_level(logging.WARNING, "vllm.heterocache"):
        loaded.check_model(MODEL)  # other weights are not told of, as the file names none
    assert not caplog.records
    options = {"recipe": recipe, "gpu_budget": 0.8}
    np.testing.assert_array_equal(assign(loaded, **options).roles, assign(profile, **options).roles)


def test_policy_keeps_the_heads_of_the_highest_gates_whole(tmp_path):
    profile = read(tmp_path, table(GATES))
    # floor(0.5 * 0.7 * 6) heads; without similarities nobody follows them
    assignment = assign(profile, gpu_budget=0.7, finder_share=0)
    assert assignment.roles.tolist() == [[P, A], [A, A], [A, P]]
    assert assignment.weights[0, 1] < assignment.weights[2, 0] < assignment.weights[1, 1]


def test_each_rank_keeps_its_own_highest_gates_whole(tmp_path):
    profile = read(tmp_path, table(GATES))
    assignment = assign(profile, Shard(range(3), [0], 3), gpu_budget=0.7)
    assert assignment.roles.tolist() == [[V], [A], [F]]
    alone = assign(profile, Shard(range(3), [0], 3), gpu_budget=0.7, finder_share=0)
    assert alone.roles.tolist() == [[P], [A], [A]]


def test_finder_has_the_highest_gate_of_the_compressed_heads(tmp_path):
    profile = read(tmp_path, table(GATES))
    assert assign(profile, gpu_budget=0.7).roles.tolist() == [[V, A], [A, F], [A, V]]


def test_policy_takes_the_roles_of_clusters_with_recipe_paper(tmp_path):
    assignment = assign(read(tmp_path, CLUSTERS), recipe="paper", gpu_budget=0.8)
    assert assignment.roles.tolist() == [[P, S], [A, V], [S, P]]


@pytest.mark.parametrize(
    ("content", "recipe", "missing"),
    [
        (table(GATES), "paper", "stability and similarity"),
        (headwise(FLAGS), "paper", "stability and similarity"),
        (CLUSTERS, "retrieval", "the retrieval score"),
    ],
    ids=["gates", "headwise", "clusters"],
)
def test_recipe_that_a_profile_cannot_serve_is_refused(tmp_path, content, recipe, missing):
    profile = read(tmp_path, content)
    with pytest.raises(ValueError, match=rf'"{recipe}" needs {missing}.*org/tiny.*use recipe'):
        assign(profile, recipe=recipe, gpu_budget=0.8)


def test_provenance_tells_the_file_and_the_model_beside_it(tmp_path):
    (tmp_path / "config.json").write_text('{"model_name": "models/tiny-chat", "sink_size": 128}')
    profile = read(tmp_path, table(GATES), "full_attention_heads.tsv")
    assert profile.provenance["measured_on"] == "tiny-chat"
    assert profile.provenance["file"] == "full_attention_heads.tsv"
    other = read(tmp_path, table(GATES[::-1]), "full_attention_heads.tsv")
    assert other.provenance["file_sha256"] != profile.provenance["file_sha256"]


@pytest.mark.parametrize("beside", [None, "no JSON", "[]", '{"model_name": 7}'])
def test_model_that_no_file_names_is_unknown(tmp_path, beside):
    if beside is not None:
        (tmp_path / "config.json").write_text(beside)
    assert read(tmp_path, table(GATES)).provenance["measured_on"] is None


SPOILT = {
    "empty": ("", "it is empty"),
    "words": ("a\tb\n", "layer 0, KV head 0 has 'a', not a gate"),
    "nan": ("0.5\t0.1\n0.2\tnan\n", "layer 1, KV head 1 has 'nan', not a gate"),
    "out of range": (table([[0.5, 1.25]] * 3), "layer 0, KV head 1 has '1.25"),
    "ragged": ("0.5\t0.1\n0.2\n", "layer 1 has 1 values, and layer 0 has 2"),
    "layers": (table(GATES[:2]), "2 layers of 2 KV heads, and the model has 3 layers of 2"),
    "KV heads": (
        table([[0, 1, 0, 1]] * 3),
        "3 layers of 4 KV heads, and the model has 3 layers of 2",
    ),
    "no ranking": (table([[1.0, 1.0]] * 3), "all heads have the score 1, so it ranks none"),
    "no JSON": ('{"headwise_config": ', "Expecting value"),
    "another JSON": ({"model_name": "x"}, "neither headwise_config .* nor classification_matrix"),
    "own profile": ({"format": "vllm-heterocache/head-profile/1"}, "a head profile already"),
    "list": ({"headwise_config": [1]}, "headwise_config is list"),
    "no layers": ({"headwise_config": {}}, "headwise_config has no layers"),
    "fewer layers": (headwise(FLAGS[:2]), "2 layers, 0 to 1, and the model has 3"),
    "gap": (headwise(FLAGS[:2], **{"3": [0] * 4}), "3 layers, 0 to 3, and the model has 3"),
    "query heads": (headwise([[0, 1]] * 3), "layer 0 has 2 query heads, and the model has 4"),
    "flags": (headwise([[0, 1, 0, 2]] * 3), r"layer 0 is \[0, 1, 0, 2\], not a list of 0 and 1"),
    "no list": (headwise([[0, 0, 1, 0], 1, [0] * 4]), "layer 1 is 1, not a list"),
    "no retrieval head": (headwise([[0] * 4] * 3), "all heads have the score 0"),
    "cluster layers": (
        {name: rows if name == "meta" else rows[:1] for name, rows in CLUSTERS.items()},
        "1 layers of 2 KV heads, and the model has 3 layers of 2",
    ),
    "leader": (CLUSTERS | {"leader_member_relations": [{}, {}, {}]}, "satellite needs a leader"),
    "code": (CLUSTERS | {"classification_matrix": [[9, 4], [1, 2], [4, 3]]}, "unusable .*9"),
}


@pytest.mark.parametrize(("content", "reason"), SPOILT.values(), ids=SPOILT)
def test_file_that_does_not_fit_is_named_with_the_reason_and_the_fix(tmp_path, content, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        read(tmp_path, content, "spoilt.txt")
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'spoilt.txt'} cannot be imported for 'org/tiny': ")
    assert text.endswith("or measure them with `heterocache calibrate`") and "\n" not in text


@pytest.mark.parametrize(("name", "reason"), [("none.tsv", "No such file"), ("", "Is a directory")])
def test_file_that_cannot_be_read_is_named(tmp_path, name, reason):
    with pytest.raises(ValueError, match=rf"cannot be read \({reason}.*; give the path of a file"):
        read_published(tmp_path / name, MODEL)


def test_binary_file_is_refused(tmp_path):
    (tmp_path / "heads.pt").write_bytes(b"\x80\x02\xff\xfe")
    with pytest.raises(ValueError, match=r"heads\.pt cannot be imported.*utf-8"):
        read_published(tmp_path / "heads.pt", MODEL)
