import json
import logging
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_heterocache.calibration import profile_cache
from vllm_heterocache.calibration.model_identity import (
    loading_facts,
    model_identity,
    weights_fingerprint,
)
from vllm_heterocache.calibration.profile_cache import (
    cache_path,
    load_cached,
    resolve_profile,
    save_cached,
)
from vllm_heterocache.heads.profile import HeadProfile, ModelIdentity
from vllm_heterocache.refusal import Refusal

HUB_COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model_config(model="org/some-model", num_layers=3, revision=None, commit=None, **changes):
    facts = {
        "model": str(model),
        "model_weights": "",
        "tokenizer": str(model),
        "tokenizer_revision": revision,
        "tokenizer_mode": "auto",
        "architecture": "ToyForCausalLM",
        "revision": revision,
        "code_revision": None,
        "quantization": None,
        "quantization_config": None,
        "dtype": "torch.bfloat16",
        "config_format": "auto",
        "hf_config": SimpleNamespace(_commit_hash=commit),
        "hf_config_path": None,
        "hf_overrides": {},
        "model_class_overrides": {},
        "model_arch_config": SimpleNamespace(total_num_attention_heads=8),
        "hf_text_config": SimpleNamespace(),
        "get_sliding_window": lambda: None,
        "get_total_num_hidden_layers": lambda: num_layers,
        "get_total_num_kv_heads": lambda: 2,
        "get_head_size": lambda: 64,
    }
    return SimpleNamespace(**{**facts, **changes})


def vllm_config(model=None, tp=1, pp=1, load_format="auto", experts=False, local_replicas=1):
    return SimpleNamespace(
        model_config=model or model_config(),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        quant_config=None,
        parallel_config=SimpleNamespace(
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            enable_expert_parallel=experts,
            data_parallel_size_local=local_replicas,
        ),
        load_config=SimpleNamespace(load_format=load_format),
    )


def path_of(config) -> Path:
    """Where the profile of this ModelConfig is cached."""
    return cache_path(model_identity(config), loading_facts(config, "auto"))


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
def calibrator(monkeypatch):
    """Stands in for the child `heterocache calibrate`; .calls lists models and arguments."""
    state = SimpleNamespace(calls=[], status=0, prints="", writes=profile_of)

    def run(model, output, arguments, log):
        state.calls.append((model, arguments))
        log.write_text(state.prints)
        if state.writes is not None:
            written = state.writes(model_identity(model_config()))
            if isinstance(written, str):
                output.write_text(written)
            else:
                written.save(output)
        return state.status

    monkeypatch.setattr(profile_cache, "calibrate_in_child", run)
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
    path = cache_path(identity, {})
    assert path.parent == cache and path.name.startswith("org-some-model-")
    assert path == cache_path(replace(identity), {})
    changes = {
        "name": "other",
        "architecture": "Other",
        "num_layers": 4,
        "num_q_heads": 9,
        "num_kv_heads": 1,
        "head_dim": 8,
        "weights_fingerprint": "x",
    }
    paths = {cache_path(replace(identity, **{k: v}), {}) for k, v in changes.items()}
    assert len(paths | {path}) == len(changes) + 1


def test_cache_folder_defaults_to_the_users_home(monkeypatch, tmp_path):
    monkeypatch.delenv("HETEROCACHE_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert profile_cache.cache_dir() == tmp_path / ".cache" / "vllm-heterocache"


def test_cache_folder_below_a_home_that_no_shell_has_put_in(monkeypatch, tmp_path):
    monkeypatch.setenv("HETEROCACHE_CACHE_DIR", "~/profiles")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert profile_cache.cache_dir() == tmp_path / "profiles"


# --- a named file


def test_named_profile_is_loaded_and_checked(tmp_path, calibrator):
    path = tmp_path / "profile.json"
    profile_of(model_identity(model_config()), score=0.25).save(path)
    assert resolve_profile(str(path), vllm_config()).retrieval[0, 0] == 0.25
    with pytest.raises(ValueError, match="num_layers"):
        resolve_profile(str(path), vllm_config(model_config(num_layers=5)))
    with pytest.raises(ValueError, match="cannot be read"):
        resolve_profile(str(tmp_path / "missing.json"), vllm_config())
    assert calibrator.calls == []


# --- auto


def test_auto_calibrates_once_and_names_the_file_at_every_start(cache, calibrator, caplog, logged):
    with caplog.at_level(logging.INFO, "vllm.heterocache"):
        first = resolve_profile("auto", vllm_config())
        second = resolve_profile("auto", vllm_config())
    np.testing.assert_array_equal(first.retrieval, second.retrieval)
    ((model, arguments),) = calibrator.calls
    assert model == "org/some-model" and arguments["tensor_parallel_size"] == 1
    messages = logged()
    assert len(messages) == 3
    path = path_of(model_config())
    assert str(path.with_suffix(".log")) in messages[0]
    assert str(path) in messages[1] and str(path) in messages[2]
    assert HeadProfile.load(path).model == first.model
    assert not [p for p in cache.iterdir() if ".tmp" in p.name]


def test_cached_profile_of_an_earlier_version_is_used(calibrator):
    """That version wrote induction scores and similarities of five layers."""
    identity = model_identity(model_config())
    similarity = np.full((5, 3, 2, 2), 0.9, np.float32)
    data = replace(profile_of(identity, score=0.25), similarity=similarity).to_json()
    data["induction"] = [[0.5, 0.5]] * 3
    path = path_of(model_config())
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(data))
    assert resolve_profile("auto", vllm_config()).retrieval[0, 0] == 0.25
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
    path = path_of(model_config())
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert resolve_profile("auto", vllm_config()).retrieval is not None
    assert len(calibrator.calls) == 1 and HeadProfile.load(path).retrieval is not None


def test_failed_calibration_says_what_happened_and_how_to_do_it_by_hand(cache, calibrator):
    calibrator.status, calibrator.writes = 1, None
    calibrator.prints = "starting\nheterocache calibrate: error: text has 3 tokens\n\n"
    with pytest.raises(RuntimeError) as caught:
        resolve_profile("auto", vllm_config())
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
        resolve_profile("auto", vllm_config())
    assert list(cache.glob("*.json")) == []
    calibrator.writes = profile_of
    assert resolve_profile("auto", vllm_config()).retrieval is not None


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
        results.append(resolve_profile("auto", vllm_config()))

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
    with pytest.raises(Refusal, match="HETEROCACHE_CACHE_DIR"):
        resolve_profile("auto", vllm_config())


def test_cache_folder_that_may_not_be_looked_into_is_an_error_that_names_the_variable(
    cache, calibrator, monkeypatch
):
    exists = Path.exists

    def forbidden(path):
        if cache in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", forbidden)
    with pytest.raises(Refusal, match=r"Permission denied.*set HETEROCACHE_CACHE_DIR"):
        resolve_profile("auto", vllm_config())


def test_cache_folder_that_is_a_file_is_an_error_that_names_the_variable(cache, calibrator):
    cache.parent.mkdir()
    cache.write_text("")
    with pytest.raises(Refusal, match="set HETEROCACHE_CACHE_DIR to a folder"):
        resolve_profile("auto", vllm_config())


def test_user_without_a_home_is_told_the_variable(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HETEROCACHE_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(Refusal, match="set HETEROCACHE_CACHE_DIR to a folder"):
        path_of(model_config())


# --- what stands in the key


class Resolved(str):
    """A revision as the hub's client returns it: its name, with the commit it stands for."""

    resolved = HUB_COMMIT


def snapshot(tmp_path) -> Path:
    folder = tmp_path / "hub" / "models--org--some-model" / "snapshots" / HUB_COMMIT
    folder.mkdir(parents=True)
    write_model(folder / "weights")
    for file in (folder / "weights").iterdir():
        file.rename(folder / file.name)
    return folder


def test_hub_model_has_one_cache_file_however_it_is_reached(tmp_path):
    folder = snapshot(tmp_path)
    noted = model_config(commit=HUB_COMMIT, revision=Resolved("main"))
    resolved = model_config(revision=Resolved("main"))  # a format that notes no commit
    offline = model_config(folder)  # vLLM puts the snapshot in the place of the name
    pinned = model_config(revision=HUB_COMMIT)
    assert model_identity(offline).name == "org/some-model"
    assert len({path_of(one) for one in (noted, resolved, offline, pinned)}) == 1
    slash = model_config(f"{folder}/")
    assert path_of(slash) == path_of(offline)


def test_commit_is_read_from_the_hubs_cache_where_nothing_notes_it(tmp_path, monkeypatch):
    import huggingface_hub

    folder = snapshot(tmp_path)

    def cached(repo, file, revision):
        assert (repo, revision) == ("org/some-model", None)
        return str(folder / file) if (folder / file).exists() else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert model_identity(model_config()).weights_fingerprint == HUB_COMMIT


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": "other/tokenizer"},
        {"tokenizer_revision": "v2"},
        {"tokenizer_mode": "slow"},
        {"revision": "v2"},
        {"code_revision": "v2"},
        {"quantization": "fp8"},
        {"dtype": "torch.float32"},
        {"config_format": "mistral"},
        {"hf_config_path": "other/config"},
        {"hf_overrides": {"rope_theta": 1e6}},
        {"model_class_overrides": {"A": "b:B"}},
    ],
    ids=str,
)
def test_what_changes_the_measurement_stands_in_the_key(change):
    assert path_of(model_config(**change)) != path_of(model_config())


def test_quantization_of_the_checkpoint_is_known_from_its_weights():
    hf_config = SimpleNamespace(_commit_hash=None, quantization_config={"bits": 4})
    kinds = [model_config(hf_config=hf_config, quantization=q) for q in ("awq", "awq_marlin")]
    assert path_of(kinds[0]) == path_of(kinds[1])


def test_weights_that_change_between_all_samples_get_a_new_key(tmp_path):
    """As a LoRA that is merged in place."""
    size = 4 << 20
    folder = write_model(tmp_path / "m", weights=b"w" * size)
    weights = folder / "model.safetensors"
    os.utime(weights, (1_000_000, 1_000_000))
    before, fingerprint = path_of(model_config(folder)), weights_fingerprint(folder)
    with weights.open("r+b") as data:
        data.seek(5000)
        data.write(b"x")
    assert weights_fingerprint(folder) == fingerprint
    assert path_of(model_config(folder)) != before


def test_parts_of_a_second_do_not_matter(tmp_path):
    """Images and archives do not keep them."""
    folder = write_model(tmp_path / "m")
    paths = set()
    for ns in (0, 999_999_999):
        os.utime(folder / "model.safetensors", ns=(0, 10**18 + ns))
        paths.add(path_of(model_config(folder)))
    assert len(paths) == 1


def test_samples_lie_everywhere_in_the_weights(tmp_path):
    """A change of 2 % of the bytes in one piece is seen, wherever it is."""
    size, piece = 1 << 20, 21_000
    first = weights_fingerprint(write_model(tmp_path / "m", weights=b"w" * size))
    for i, start in enumerate(range(0, size - piece, piece)):
        changed = b"w" * start + b"x" * piece + b"w" * (size - start - piece)
        folder = write_model(tmp_path / str(i), weights=changed)
        assert weights_fingerprint(folder) != first


def test_tokenizer_files_of_a_local_model_stand_in_the_key(tmp_path):
    folder = write_model(tmp_path / "m")
    (folder / "tokenizer.json").write_text("one")
    before = path_of(model_config(folder))
    (folder / "tokenizer.json").write_text("two")
    assert path_of(model_config(folder)) != before


def test_model_of_an_object_store_is_named_by_its_address(tmp_path):
    paths = set()
    for name in ("a", "b"):  # vLLM pulls all but the weights into a folder of the process
        pulled = write_model(tmp_path / name)
        config = model_config(pulled, model_weights="s3://bucket/model")
        assert model_identity(config).name == "s3://bucket/model"
        paths.add(path_of(config))
    assert len(paths) == 1


# --- dummy weights


def test_dummy_weights_are_calibrated_for_one_start_alone(cache, calibrator):
    for _ in range(2):
        assert resolve_profile("auto", vllm_config(load_format="dummy")).retrieval is not None
    assert len(calibrator.calls) == 2 and not cache.exists()
    resolve_profile("auto", vllm_config())
    assert len(calibrator.calls) == 3


def test_dummy_weights_use_the_profile_of_the_real_ones(calibrator):
    real = resolve_profile("auto", vllm_config())
    dummy = resolve_profile("auto", vllm_config(load_format="dummy"))
    np.testing.assert_array_equal(real.retrieval, dummy.retrieval)
    assert len(calibrator.calls) == 1


# --- writing


def test_saved_profile_is_found_and_never_half_there(cache, monkeypatch):
    config = model_config()
    loading = loading_facts(config, "auto")
    profile = replace(profile_of(model_identity(config)), settings={"loading": loading})
    path, whole = path_of(config), HeadProfile.save

    def checked(self, file):
        assert not path.exists() and Path(file) != path
        whole(self, file)
        assert not path.exists()

    monkeypatch.setattr(HeadProfile, "save", checked)
    assert save_cached(profile) == path
    assert load_cached(profile.model, loading) is not None
    assert not [p for p in cache.iterdir() if ".tmp" in p.name]


def test_saving_waits_for_who_holds_the_lock(cache):
    from filelock import FileLock

    config = model_config()
    settings = {"loading": loading_facts(config, "auto")}
    profile = replace(profile_of(model_identity(config)), settings=settings)
    path = path_of(config)
    cache.mkdir(parents=True)
    with FileLock(path.with_suffix(".lock")):
        thread = threading.Thread(target=save_cached, args=(profile,))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and not path.exists()
    thread.join(20)
    assert path.exists()


def test_drafts_have_names_of_their_own(cache, calibrator, monkeypatch):
    """Two containers have the same process ids."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    names, quick = set(), profile_cache.calibrate_in_child

    def noted(model, output, arguments, log):
        names.add(output)
        return quick(model, output, arguments, log)

    monkeypatch.setattr(profile_cache, "calibrate_in_child", noted)
    for _ in range(2):
        resolve_profile("auto", vllm_config())
        path_of(model_config()).unlink()
    assert len(names) == 2
