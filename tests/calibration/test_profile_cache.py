import json
import logging
import os
import stat
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_heterocache.calibration import profile_cache
from vllm_heterocache.calibration.profile_cache import (
    cache_path,
    calibration_flags,
    load_cached,
    model_identity,
    resolve_profile,
    weights_fingerprint,
)
from vllm_heterocache.heads.profile import HeadProfile, ModelIdentity


def model_config(model="org/some-model", num_layers=3, revision=None, commit=None):
    return SimpleNamespace(
        model=str(model),
        tokenizer=str(model),
        architecture="ToyForCausalLM",
        revision=revision,
        quantization=None,
        dtype="torch.bfloat16",
        trust_remote_code=False,
        hf_config=SimpleNamespace(_commit_hash=commit),
        model_arch_config=SimpleNamespace(total_num_attention_heads=8),
        get_total_num_hidden_layers=lambda: num_layers,
        get_total_num_kv_heads=lambda: 2,
        get_head_size=lambda: 64,
    )


def vllm_config(model=None, tp=1, pp=1, executor=None):
    return SimpleNamespace(
        model_config=model or model_config(),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            distributed_executor_backend=executor,
        ),
        cache_config=SimpleNamespace(gpu_memory_utilization=0.8, kv_cache_memory_bytes=None),
        load_config=SimpleNamespace(load_format="auto"),
    )


def profile_of(identity: ModelIdentity, score=0.5) -> HeadProfile:
    shape = (identity.num_layers, identity.num_kv_heads)
    return HeadProfile(identity, {}, {}, retrieval=np.full(shape, score, np.float32))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder that does not exist yet."""
    folder = tmp_path / "cache" / "deep"
    monkeypatch.setenv("HETEROCACHE_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def calibrator(monkeypatch, tmp_path):
    """Stands in for the child `heterocache calibrate`; .calls lists arguments and environments."""
    state = SimpleNamespace(calls=[], status=0, prints="", writes=profile_of)

    def run(command, env, stdout, stderr):
        state.calls.append((command, env))
        stdout.write(state.prints.encode())
        if state.writes is not None:
            output = Path(command[command.index("-o") + 1])
            written = state.writes(model_identity(model_config()))
            if isinstance(written, str):
                output.write_text(written)
            else:
                written.save(output)
        return SimpleNamespace(returncode=state.status)

    monkeypatch.setattr(profile_cache.subprocess, "run", run)
    return state


def write_model(folder: Path, config='{"a": 1}', weights=b"header" + b"w" * 50_000) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(weights)
    return folder


# --- identity


def test_fingerprint_follows_config_and_weights_and_not_the_path(tmp_path):
    first = weights_fingerprint(write_model(tmp_path / "a"))
    assert len(first) == 16
    assert weights_fingerprint(write_model(tmp_path / "b")) == first
    assert weights_fingerprint(write_model(tmp_path / "c", config='{"a": 2}')) != first
    tuned = b"header" + b"w" * 49_999 + b"x"
    assert weights_fingerprint(write_model(tmp_path / "d", weights=tuned)) != first
    longer = b"header" + b"w" * 50_001
    assert weights_fingerprint(write_model(tmp_path / "e", weights=longer)) != first


def test_fingerprint_of_one_weight_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"abc")
    assert weights_fingerprint(path) == weights_fingerprint(path)
    before = weights_fingerprint(path)
    path.write_bytes(b"abd")
    assert weights_fingerprint(path) != before


def test_local_model_is_named_by_its_folder(tmp_path):
    folder = write_model(tmp_path / "my-model")
    identity = model_identity(model_config(f"{folder}/"))
    assert identity.name == "my-model"
    assert identity.weights_fingerprint == weights_fingerprint(folder)
    assert (identity.num_layers, identity.num_q_heads, identity.num_kv_heads) == (3, 8, 2)
    assert str(tmp_path) not in str(identity)


def test_hub_model_is_fingerprinted_by_commit_then_revision():
    assert model_identity(model_config()).weights_fingerprint is None
    assert model_identity(model_config(revision="v1")).weights_fingerprint == "v1"
    resolved = model_identity(model_config(revision="v1", commit="c0ffee"))
    assert resolved.weights_fingerprint == "c0ffee" and resolved.name == "org/some-model"


def test_cache_path_differs_with_every_fact_about_the_model(cache):
    identity = model_identity(model_config())
    path = cache_path(identity)
    assert path.parent == cache and path.name.startswith("org-some-model-")
    assert path == cache_path(replace(identity))
    changes = {
        "name": "other",
        "architecture": "Other",
        "num_layers": 4,
        "num_q_heads": 9,
        "num_kv_heads": 1,
        "head_dim": 8,
        "weights_fingerprint": "x",
    }
    paths = {cache_path(replace(identity, **{k: v})) for k, v in changes.items()}
    assert len(paths | {path}) == len(changes) + 1


def test_cache_folder_defaults_to_the_users_home(monkeypatch, tmp_path):
    monkeypatch.delenv("HETEROCACHE_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert profile_cache.cache_dir() == tmp_path / ".cache" / "vllm-heterocache"


# --- a named file


def test_named_profile_is_loaded_and_checked(tmp_path, calibrator):
    path = tmp_path / "profile.json"
    profile_of(model_identity(model_config()), score=0.25).save(path)
    assert resolve_profile(str(path), model_config()).retrieval[0, 0] == 0.25
    with pytest.raises(ValueError, match="num_layers"):
        resolve_profile(str(path), model_config(num_layers=5))
    with pytest.raises(ValueError, match="cannot be read"):
        resolve_profile(str(tmp_path / "missing.json"), model_config())
    assert calibrator.calls == []


# --- auto


def test_auto_calibrates_once_and_logs_one_line_before_and_one_after(cache, calibrator, caplog):
    with caplog.at_level(logging.INFO, "vllm.heterocache"):
        first = resolve_profile("auto", model_config(), ["--dtype=float32"])
        second = resolve_profile("auto", model_config(), ["--dtype=float32"])
    np.testing.assert_array_equal(first.retrieval, second.retrieval)
    ((command, _),) = calibrator.calls
    run = [sys.executable, "-m", "vllm_heterocache.commands.cli", "calibrate"]
    expected = [*run, "org/some-model", "-o"]
    assert command[:6] == expected and command[7:] == ["--dtype=float32"]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    path = cache_path(first.model)
    assert str(path.with_suffix(".log")) in messages[0] and str(path) in messages[1]
    assert path.exists() and load_cached(first.model) is not None
    assert not [p for p in cache.iterdir() if ".tmp" in p.name]


def test_calibration_process_is_no_rank_of_this_one(calibrator, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("VLLM_DP_RANK", "1")
    monkeypatch.setenv("VLLM_PLUGINS", "heterocache")
    resolve_profile("auto", model_config())
    ((_, environment),) = calibrator.calls
    assert "RANK" not in environment and "VLLM_DP_RANK" not in environment
    assert environment["VLLM_PLUGINS"] == "heterocache"
    assert environment["PATH"] == os.environ["PATH"]


def test_cached_profile_of_an_earlier_version_is_used(calibrator):
    """That version wrote induction scores and similarities of five layers."""
    identity = model_identity(model_config())
    similarity = np.full((5, 3, 2, 2), 0.9, np.float32)
    data = replace(profile_of(identity, score=0.25), similarity=similarity).to_json()
    data["induction"] = [[0.5, 0.5]] * 3
    path = cache_path(identity)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(data))
    assert resolve_profile("auto", model_config()).retrieval[0, 0] == 0.25
    assert calibrator.calls == []


def with_settings(settings) -> str:
    return json.dumps(profile_of(model_identity(model_config())).to_json() | {"settings": settings})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        '{"format": "something else"}',
        "[" * 200_000,
        with_settings([]),
        with_settings({"top_share": None}),
    ],
    ids=["empty", "cut", "format", "deep", "settings", "top_share"],
)
def test_unusable_cached_profile_is_replaced(calibrator, content):
    path = cache_path(model_identity(model_config()))
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert resolve_profile("auto", model_config()).retrieval is not None
    assert len(calibrator.calls) == 1 and HeadProfile.load(path).retrieval is not None


def test_failed_calibration_says_what_happened_and_how_to_do_it_by_hand(cache, calibrator):
    calibrator.status, calibrator.writes = 1, None
    calibrator.prints = "starting\nheterocache calibrate: error: text has 3 tokens\n\n"
    with pytest.raises(RuntimeError) as caught:
        resolve_profile("auto", model_config())
    message = str(caught.value)
    assert message.startswith('profile is "auto", but calibrating org/some-model failed')
    assert "error: text has 3 tokens" in message and "\n" not in message
    assert message.endswith(
        "run `heterocache calibrate org/some-model -o FILE` and set profile to FILE."
    )
    assert list(cache.glob("*.json")) == []


@pytest.mark.parametrize(
    "writes",
    [
        None,
        lambda identity: "not JSON",
        lambda identity: profile_of(replace(identity, num_layers=9)),
    ],
    ids=["nothing", "rubbish", "another_model"],
)
def test_calibration_without_a_usable_result_leaves_no_cached_profile(cache, calibrator, writes):
    calibrator.writes = writes
    with pytest.raises(RuntimeError, match="set profile to FILE"):
        resolve_profile("auto", model_config())
    assert list(cache.glob("*.json")) == []
    calibrator.writes = profile_of
    assert resolve_profile("auto", model_config()).retrieval is not None


def test_two_starts_at_once_calibrate_once(calibrator):
    started = threading.Event()
    release = threading.Event()
    quick = calibrator.writes

    def slow(identity):
        started.set()
        assert release.wait(20)
        return quick(identity)

    calibrator.writes = slow
    results = []

    def resolve():
        results.append(resolve_profile("auto", model_config()))

    threads = [threading.Thread(target=resolve) for _ in range(2)]
    threads[0].start()
    assert started.wait(20)
    threads[1].start()
    release.set()
    for thread in threads:
        thread.join(20)
    assert len(results) == 2 and len(calibrator.calls) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_cache_folder_is_an_error_that_names_the_variable(tmp_path, cache, calibrator):
    cache.mkdir(parents=True)
    cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(RuntimeError, match="HETEROCACHE_CACHE_DIR"):
        resolve_profile("auto", model_config())


def test_cache_folder_that_is_a_file_is_an_error_that_names_the_variable(cache, calibrator):
    cache.parent.mkdir()
    cache.write_text("")
    with pytest.raises(RuntimeError, match="set HETEROCACHE_CACHE_DIR to a folder"):
        resolve_profile("auto", model_config())


def test_user_without_a_home_is_told_the_variable(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HETEROCACHE_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(RuntimeError, match="set HETEROCACHE_CACHE_DIR to a folder"):
        cache_path(model_identity(model_config()))


# --- flags


def parsed(flags: list[str]) -> dict[str, str]:
    return dict(flag.removeprefix("--").split("=", 1) for flag in flags if "=" in flag)


def test_flags_load_the_model_as_the_engine_will():
    assert parsed(calibration_flags(vllm_config())) == {
        "dtype": "bfloat16",
        "tensor-parallel-size": "1",
        "pipeline-parallel-size": "1",
        "gpu-memory-utilization": "0.8",
    }
    model = model_config(revision="v1")
    model.tokenizer, model.quantization, model.trust_remote_code = "other/tokenizer", "fp8", True
    flags = calibration_flags(vllm_config(model, tp=2, pp=2, executor="mp"))
    assert "--trust-remote-code" in flags
    assert parsed(flags) == {
        "tokenizer": "other/tokenizer",
        "revision": "v1",
        "dtype": "bfloat16",
        "quantization": "fp8",
        "tensor-parallel-size": "2",
        "pipeline-parallel-size": "2",
        "distributed-executor-backend": "mp",
        "gpu-memory-utilization": "0.8",
    }


def test_ranks_that_would_share_kv_heads_are_left_out():
    assert parsed(calibration_flags(vllm_config(tp=8)))["tensor-parallel-size"] == "2"


def test_quantization_of_the_checkpoint_is_left_to_vllm():
    model = model_config()
    model.quantization, model.hf_config.quantization_config = "awq_marlin", {"bits": 4}
    assert "quantization" not in parsed(calibration_flags(vllm_config(model)))


def test_command_line_accepts_every_flag():
    from vllm_heterocache.commands.cli import build_parser

    model = model_config(revision="v1")
    model.tokenizer, model.quantization, model.trust_remote_code = "other/tokenizer", "fp8", True
    config = vllm_config(model, tp=2, pp=2, executor="ray")
    config.load_config.load_format = "dummy"
    config.cache_config.kv_cache_memory_bytes = 1 << 30
    command = ["calibrate", "org/some-model", "-o", "x.json", *calibration_flags(config)]
    args = build_parser().parse_args(command)
    assert args.tensor_parallel_size == 2 and args.kv_cache_memory_bytes == 1 << 30
    assert args.distributed_executor_backend == "ray" and args.trust_remote_code is True
