import dataclasses
import subprocess
import sys

import numpy as np
import pydantic
import pytest

from vllm_heterocache import __version__
from vllm_heterocache.calibration import calibrate, profile_cache
from vllm_heterocache.commands import cli, doctor
from vllm_heterocache.heads.profile import HeadProfile, ModelIdentity


@pytest.fixture
def profile() -> HeadProfile:
    """Random numbers for 6 layers and 2 KV heads."""
    rng = np.random.default_rng(5)
    similarity = rng.random((3, 6, 2, 2), np.float32)
    for d in range(1, 3):
        similarity[d, 6 - d :] = np.nan
    return HeadProfile(
        ModelIdentity("org/tiny", "LlamaForCausalLM", 6, 4, 2, 16, "feed"),
        {},
        {},
        *rng.random((2, 6, 2), np.float32),
        similarity,
    )


@pytest.fixture
def profile_file(profile, tmp_path) -> str:
    profile.save(tmp_path / "p.json")
    return str(tmp_path / "p.json")


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["calibrat"],
        ["calibrate"],
        ["import-heads", "org/tiny", "heads.tsv"],
        ["inspect"],
        ["inspect", "f", "--gpu-budgt", "1"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: heterocache" in capsys.readouterr().err


def test_inspect_prints_the_table_at_these_options(profile_file, capsys):
    assert (
        cli.main(["inspect", profile_file, "--gpu-budget", "0.5", "--prompt-tokens", "8000"]) == 0
    )
    output = capsys.readouterr().out
    assert "org/tiny: 6 layers x 2 KV heads" in output
    assert "gpu_budget 0.5" in output and "prompt of 8000 tokens" in output


def test_inspect_writes_a_picture(profile_file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "p.png"
    assert cli.main(["inspect", profile_file, "-o", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {picture}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere.json"], "/nowhere.json cannot be read"),
        (["FILE", "--gpu-budget", "1.5"], "gpu_budget=1.5 is refused"),
        (["FILE", "--gpu-budget", "0.3", "--full-share", "1"], "full_share=1.0 is refused"),
        (["FILE", "--recipe", "paper", "--gpu-budget", "0.01"], "gpu_budget"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes_end_in_one_line_without_a_traceback(profile_file, arguments, message, capsys):
    arguments = [profile_file if word == "FILE" else word for word in arguments]
    assert cli.main(["inspect", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("heterocache inspect: error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err and captured.err.count("\n") == 1


def test_calibrate_hands_its_options_over(profile, tmp_path, monkeypatch, capsys):
    calls = []

    def noted(model, **options):
        calls.append((model, options))
        return profile

    monkeypatch.setattr(calibrate, "calibrate", noted)
    output = tmp_path / "out.json"
    arguments = ["calibrate", "org/tiny", "-o", str(output), "--samples", "2", "--text", "t.txt"]
    arguments += ["--tensor-parallel-size", "2", "--max-model-len", "4096", "--trust-remote-code"]
    assert cli.main(arguments) == 0
    ((model, options),) = calls
    assert model == "org/tiny"
    assert (options["samples"], options["text"], options["seed"]) == (2, "t.txt", 0)
    # options that were not given are left to vLLM
    assert options["llm_kwargs"] == {
        "tensor_parallel_size": 2,
        "max_model_len": 4096,
        "trust_remote_code": True,
    }
    assert HeadProfile.load(output).model == profile.model
    assert f"wrote {output}" in capsys.readouterr().out


def test_calibrate_without_output_fills_the_cache(profile, tmp_path, monkeypatch):
    loading = {"dtype": "float32"}
    measured = dataclasses.replace(profile, settings={"loading": loading})
    monkeypatch.setattr(calibrate, "calibrate", lambda model, **options: measured)
    monkeypatch.setenv("HETEROCACHE_CACHE_DIR", str(tmp_path / "new" / "cache"))
    assert profile_cache.load_cached(profile.model, loading) is None
    assert cli.main(["calibrate", "org/tiny"]) == 0
    assert profile_cache.load_cached(profile.model, loading) is not None
    assert profile_cache.load_cached(profile.model, {"dtype": "bfloat16"}) is None
    other = dataclasses.replace(profile.model, weights_fingerprint="beef")
    assert profile_cache.load_cached(other, loading) is None


@pytest.mark.parametrize(
    "flags", [["--load-format", "dummy"], ["--llm", '{"load_format": "dummy"}']], ids=str
)
def test_calibrate_never_caches_dummy_weights(flags, profile, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HETEROCACHE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrate, "calibrate", lambda *a, **k: profile)
    assert cli.main(["calibrate", "org/tiny", *flags]) == 1
    assert "load_format" in capsys.readouterr().err and not (tmp_path / "cache").exists()
    assert cli.main(["calibrate", "org/tiny", *flags, "-o", str(tmp_path / "p.json")]) == 0


def test_calibrate_checks_the_output_folder_before_the_model_runs(monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "calibrate", lambda *a, **k: pytest.fail("it ran"))
    assert cli.main(["calibrate", "org/tiny", "-o", "/no/such/folder/p.json"]) == 1
    assert "its folder does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["calibrate", "org/tiny", "-o", "FOLDER"],
        ["import-heads", "org/tiny", "FILE", "-o", "FOLDER"],
        ["inspect", "FILE", "-o", "FOLDER"],
    ],
    ids=lambda words: words[0],
)
def test_an_output_that_is_a_folder_is_refused_before_any_work(
    words, profile_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(calibrate, "calibrate", lambda *a, **k: pytest.fail("it ran"))
    folder = tmp_path / "folder.png"
    folder.mkdir()
    names = {"FOLDER": str(folder), "FILE": profile_file}
    assert cli.main([names.get(word, word) for word in words]) == 1
    assert f"-o {folder} cannot be written: it is a folder" in capsys.readouterr().err


def test_calibrate_says_that_a_model_folder_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "calibrate", lambda *a, **k: pytest.fail("it ran"))
    assert cli.main(["calibrate", str(tmp_path / "missing")]) == 1
    assert "missing' is no folder here" in capsys.readouterr().err


def test_calibrate_checks_the_cache_before_the_model_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "calibrate", lambda *a, **k: pytest.fail("it ran"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HETEROCACHE_CACHE_DIR", str(tmp_path / "file"))
    assert cli.main(["calibrate", "org/tiny"]) == 1
    assert "set HETEROCACHE_CACHE_DIR to a folder" in capsys.readouterr().err


def test_calibrate_refuses_an_argument_that_vllm_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HETEROCACHE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(calibrate, "_start_engine", lambda *a: pytest.fail("it ran"))
    assert cli.main(["calibrate", "org/tiny", "--llm", '{"max_model_length": 900}']) == 1
    captured = capsys.readouterr().err
    assert "no argument 'max_model_length' (did you mean 'max_model_len'?)" in captured
    assert captured.count("\n") == 1


def test_what_vllm_refuses_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HETEROCACHE_CACHE_DIR", str(tmp_path))

    @pydantic.dataclasses.dataclass
    class Options:
        dtype: int

    monkeypatch.setattr(calibrate, "calibrate", lambda *a, **k: Options(dtype="nosuch"))
    assert cli.main(["calibrate", "org/tiny", "--dtype", "nosuch"]) == 1
    captured = capsys.readouterr().err
    assert captured.startswith("heterocache calibrate: error: dtype='nosuch': ")
    assert captured.count("\n") == 1 and "pydantic.dev" not in captured


@pytest.mark.parametrize("count", ["0", "-3", "x", "1.5", "1000000001", "9" * 5000])
@pytest.mark.parametrize(
    "words", [["calibrate", "org/tiny", "--samples"], ["inspect", "f", "--prompt-tokens"]], ids=str
)
def test_a_count_that_cannot_be_is_wrong_usage(words, count, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*words, count])
    assert end.value.code == 2
    assert f"{count[:40]} is not a positive number up to 1,000,000,000" in capsys.readouterr().err


def test_calibrate_names_a_missing_text(capsys):
    assert cli.main(["calibrate", "org/tiny", "--text", "/nowhere.txt"]) == 1
    assert "/nowhere.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["org/tiny"],
        ["org/tiny", "--max-model-len", "4096", "--additional-config", '{"heterocache": {}}'],
        [
            "--host",
            "0.0.0.0",
            "--port",
            "8000",
            "--model",
            "org/tiny",
            "--max_num_seqs=4",
            "-tp",
            "2",
        ],
        ["vllm", "serve", "org/tiny", "--config", "serve.yaml", "-O3"],
    ],
    ids=" ".join,
)
def test_doctor_gets_the_command_line_as_it_is(monkeypatch, line):
    calls = []
    monkeypatch.setattr(doctor, "run", lambda words: calls.append(words) or 1)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    assert cli.main(["doctor", *line]) == 1
    assert calls == [line]


@pytest.mark.parametrize("name", ["p.jpg", "p", "no/such/folder/p.png"])
def test_picture_that_cannot_be_written_is_refused_before_any_work(
    name, profile_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(HeadProfile, "load", lambda *_: pytest.fail("it was loaded"))
    assert cli.main(["inspect", profile_file, "-o", str(tmp_path / name)]) == 1
    captured = capsys.readouterr()
    assert name in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_module_and_help_start_without_what_is_slow_to_import():
    code = "import sys; from vllm_heterocache.commands import cli; cli.build_parser().format_help()"
    code += "; print({'vllm', 'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    command = [sys.executable, "-m", "vllm_heterocache.commands.cli", "calibrate", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--tensor-parallel-size" in done.stdout


def test_commands_do_not_import_the_evaluation_until_one_is_parsed():
    code = "import sys, vllm_heterocache.commands.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not [m for m in done.stdout.split() if m.startswith("vllm_heterocache.evaluation")]
