import importlib
import json

import pytest

from vllm_heterocache.commands import cli
from vllm_heterocache.heads.profile import HeadProfile

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 8192,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


@pytest.fixture(autouse=True)
def own_logging_level(monkeypatch):
    """The command sets the level for its process, and vLLM reads it when it is first imported."""
    importlib.import_module("vllm.logger")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")


@pytest.fixture
def model(tmp_path) -> str:
    """A folder that holds the configuration alone."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


@pytest.fixture
def gates(tmp_path) -> str:
    path = tmp_path / "full_attention_heads.tsv"
    path.write_text("1.0\t0.25\n1.0\t0.75\n0.5\t1.0\n")
    return str(path)


def test_profile_is_written_and_what_is_absent_is_said(model, gates, tmp_path, capsys):
    output = tmp_path / "p.json"
    assert cli.main(["import-heads", model, gates, "-o", str(output)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"wrote {output}\ntiny: 3 layers x 2 KV heads\nfrom DuoAttention gates")
    for part in (
        "measured on a model that the file does not name",
        "3 of 6 heads have the highest score",
        "finders alone keep their prompts on the host and fetch pages; with finder_share 0 no head",
        'absent: stability and similarity; recipe "paper" refuses this profile',
    ):
        assert part in text
    profile = HeadProfile.load(output)
    assert profile.model.architecture == "LlamaForCausalLM"
    assert (profile.model.num_q_heads, profile.model.head_dim) == (4, 64)
    assert cli.main(["inspect", str(output), "--gpu-budget", "0.7"]) == 0
    roles = "0 pivot, 0 satellite, 3 anchor, 2 volatile, 1 finder"
    assert roles in capsys.readouterr().out
    inspect = ["inspect", str(output), "--gpu-budget", "0.7", "--finder-share", "0"]
    assert cli.main(inspect) == 0
    text = capsys.readouterr().out
    assert "2 pivot, 0 satellite, 4 anchor" in text and "host: 0 pages" in text


def test_inspect_says_what_clusters_do_not_tell(model, tmp_path, capsys):
    clusters = {
        "meta": {"type_map": {"anchor": 1, "pivot": 3, "satellite": 4}},
        "classification_matrix": [[3, 4], [1, 1], [1, 1]],
        "allocation_matrix": [[-1, 1], [1, 1], [1, 1]],
        "leader_member_relations": [{"0": [1]}, {}, {}],
    }
    (tmp_path / "c.json").write_text(json.dumps(clusters))
    output = str(tmp_path / "p.json")
    assert cli.main(["import-heads", model, str(tmp_path / "c.json"), "-o", output]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", output, "--recipe", "paper"]) == 0
    text = capsys.readouterr().out
    assert 'absent: retrieval scores; recipe "retrieval" refuses this profile' in text
    assert 'recipe "paper" takes the roles that are stored' in text
    assert cli.main(["inspect", output]) == 1
    assert 'recipe "retrieval" needs the retrieval score' in capsys.readouterr().err


def test_file_of_another_model_leaves_no_profile(model, tmp_path, capsys):
    (tmp_path / "other.tsv").write_text("1.0\t0.25\n1.0\t0.75\n")
    output = tmp_path / "p.json"
    assert cli.main(["import-heads", model, str(tmp_path / "other.tsv"), "-o", str(output)]) == 1
    error = capsys.readouterr().err
    assert "other.tsv cannot be imported for 'tiny': it has 2 layers" in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("{folder}/none", "is no folder here; correct the path"),
        ("{folder}", "cannot be read (Invalid repository ID or local directory specified"),
    ],
)
def test_model_without_a_configuration_is_refused_in_one_line(wrong, message, gates, capsys):
    folder = gates.rpartition("/")[0]
    arguments = ["import-heads", wrong.format(folder=folder), gates, "-o", f"{folder}/p.json"]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("heterocache")]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in error


def test_output_folder_is_checked_before_any_work(gates, capsys):
    assert cli.main(["import-heads", "org/none", gates, "-o", "/no/such/folder/p.json"]) == 1
    assert "its folder does not exist" in capsys.readouterr().err
