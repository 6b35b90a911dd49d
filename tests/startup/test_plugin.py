"""The backend's name, what the plugin does to a config that names it, and nothing else.

Two fresh interpreters run beside the tests: one in which vLLM loads no plugin, and one that
first of all unpickles what another process would send it.
"""

import copy
import importlib.metadata
import inspect
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_heterocache import plugin
from vllm_heterocache.calibration.child import calibration_arguments
from vllm_heterocache.compat import AttentionBackendEnum, AttentionConfig, EngineArgs
from vllm_heterocache.compat.backend_name import BACKEND_PATH, is_selected
from vllm_heterocache.compat.engine_args import given_engine_args
from vllm_heterocache.compat.hooks import WORKER_PATHS, is_installed
from vllm_heterocache.compat.names import check_vllm_version
from vllm_heterocache.compat.platforms import (
    check_executor,
    check_platform,
    check_runner,
    platform_name,
)
from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.connectors.multi import HeteroMultiConnector
from vllm_heterocache.heads.budget import smallest_prompt
from vllm_heterocache.heads.profile import HeadProfile, ModelIdentity
from vllm_heterocache.heads.recipes import configured_heads
from vllm_heterocache.plugin import OptionError, register
from vllm_heterocache.policies.heterocache import HeteroCache
from vllm_heterocache.startup import resolve, serving_plan
from vllm_heterocache.startup.serving_plan import ServingPlan

# What vLLM makes of a config in which nobody asks for our backend.
FACTS = """
import json, os, pickle, sys

def facts(model):
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import AttentionSelectorConfig
    from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry as Registry

    args = EngineArgs(model=model, skip_tokenizer_init=True, load_format="dummy")
    config = args.create_engine_config()
    geometry = dict(block_size=16, num_kv_heads=2, head_size=16, dtype=torch.float32)
    specs = FullAttentionSpec(**geometry), SlidingWindowSpec(**geometry, sliding_window=64)
    current_platform.register_custom_kv_cache_specs(config)
    register_all_kvcache_specs(config)
    selector = AttentionSelectorConfig(64, torch.float32, None, 16)
    transfer = config.kv_transfer_config
    return {
        "worker_cls": config.parallel_config.worker_cls,
        "kv_transfer_config": transfer and transfer.kv_connector,
        "block_size": config.cache_config.block_size,
        "user_specified_block_size": config.cache_config.user_specified_block_size,
        "backend": current_platform.get_attn_backend_cls(config.attention_config.backend, selector),
        "additional_config": config.additional_config,
        "hash": config.compute_hash(),
        "managers": [Registry.get_manager_class(spec).__qualname__ for spec in specs],
        "bases": [Registry.get_uniform_type_base_spec(spec).__qualname__ for spec in specs],
    }

def failure(function):
    try:
        return repr(function())
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
"""

WITHOUT_PLUGIN = """
model, results = sys.argv[1], {}
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum
def named():
    args = EngineArgs(model=model, skip_tokenizer_init=True, attention_backend="heterocache")
    return args.create_engine_config().attention_config.backend
results["facts"] = facts(model)
results["modules"] = [name for name in sys.modules if name.startswith("vllm_heterocache")]
results["named"] = failure(named)

# now vLLM finds the plugin, which was made for another vLLM
del os.environ["VLLM_PLUGINS"]
import vllm.plugins
from vllm_heterocache.compat import names
names.SUPPORTED_VLLM = ("0.25.",)
vllm.plugins.plugins_loaded = False
results["unsupported"] = failure(named)
results["stock"] = facts(model)
results["members"] = list(AttentionBackendEnum.__members__)
print("RESULTS", json.dumps(results))
"""

FRESH = """
model, pickled, forms, results = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), {}
with open(pickled, "rb") as file:
    member, config = pickle.load(file), pickle.load(file)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
results["same"] = member is AttentionBackendEnum.HETEROCACHE is config.attention_config.backend
from vllm.platforms import current_platform
results["hooked"] = "heterocache_hooked" in vars(type(current_platform))
results["path"] = current_platform.get_attn_backend_cls(member, None)
results["facts"] = facts(model)

from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
common = ["--model", model, "--skip-tokenizer-init", "--load-format", "dummy"]
common += ["--additional-config", '{"heterocache": {"gpu_budget": 1.0}}']
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
def parse(form):
    config = EngineArgs.from_cli_args(parser.parse_args(form + common)).create_engine_config()
    return config.attention_config.backend, config.parallel_config.worker_cls
results["forms"] = [failure(lambda: parse(form)) for form in forms]
print("RESULTS", json.dumps(results))
"""

CLI_FORMS = {
    "option": ["--attention-backend", "heterocache"],
    "option=": ["--attention-backend=HETEROCACHE"],
    "json": ["--attention-config", '{"backend": "heterocache"}'],
    "short": ["-ac.backend=heterocache"],
    "dotted": ["--attention-config.backend", "heterocache"],
    "yaml": ["--config", "YAML"],
}


def tiny_config(model, **options):
    args = EngineArgs(model=model, skip_tokenizer_init=True, load_format="dummy", **options)
    return args.create_engine_config()


def named_config(model, options=None, **more):
    section = {"gpu_budget": 1.0} if options is None else options
    additional = {"heterocache": section, "other_plugin": 7}
    return tiny_config(model, attention_backend="heterocache", additional_config=additional, **more)


def sent_plan(config) -> ServingPlan:
    """The plan as another process reads it."""
    return ServingPlan.from_additional_config(json.loads(json.dumps(config.additional_config)))


def worker_path():
    return WORKER_PATHS[platform_name()]


@pytest.fixture(scope="module")
def backend():
    """The member; vLLM has loaded the plugin by itself."""
    from vllm.platforms import current_platform

    assert current_platform.is_cpu() or current_platform.is_cuda()
    return AttentionBackendEnum["HETEROCACHE"]


class Interpreter:
    """A Python process under way; `results` waits for what it prints."""

    def __init__(self, code, *arguments, **environment):
        self._process = subprocess.Popen(
            [sys.executable, "-c", FACTS + code, *arguments],
            env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._results = None

    @property
    def results(self):
        if self._results is None:
            out, err = self._process.communicate(timeout=300)
            lines = [line for line in out.splitlines() if line.startswith("RESULTS ")]
            assert self._process.returncode == 0 and lines, err[-3000:]
            self._results = json.loads(lines[0].removeprefix("RESULTS "))
        return self._results

    def stop(self):
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module", autouse=True)
def interpreters(backend, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin")
    pickled, yaml = folder / "sent.pickle", folder / "server.yaml"
    pickled.write_bytes(pickle.dumps(backend) + pickle.dumps(named_config(tiny_model)))
    yaml.write_text("attention-backend: heterocache\n")
    forms = [[str(yaml) if a == "YAML" else a for a in form] for form in CLI_FORMS.values()]
    without = Interpreter(WITHOUT_PLUGIN, tiny_model, VLLM_PLUGINS="")
    fresh = Interpreter(FRESH, tiny_model, str(pickled), json.dumps(forms))
    yield SimpleNamespace(without=without, fresh=fresh)
    without.stop()
    fresh.stop()


# --- the name ---


@pytest.mark.parametrize("name", ["heterocache", "HETEROCACHE", "HeteroCache"])
def test_every_spelling_in_python_names_the_backend(backend, tiny_model, name):
    assert AttentionConfig(backend=name).backend is backend
    for options in (
        {"attention_backend": name},
        {"attention_config": {"backend": name}},
        {"attention_config": AttentionConfig(backend=name)},
    ):
        args = EngineArgs(model=tiny_model, **options)
        chosen = args.attention_backend or args.attention_config.backend
        assert AttentionConfig(backend=chosen).backend is backend


def test_json_names_the_backend(backend):
    from pydantic import TypeAdapter

    parsed = TypeAdapter(AttentionConfig).validate_json('{"backend": "heterocache"}')
    assert parsed.backend is backend


def test_member_is_an_enum_member_like_others(backend):
    assert AttentionConfig(backend=backend).backend is backend
    assert backend is AttentionBackendEnum.HETEROCACHE is AttentionBackendEnum["HETEROCACHE"]
    assert AttentionBackendEnum(backend.value) is backend
    assert isinstance(backend, AttentionBackendEnum) and backend in list(AttentionBackendEnum)
    assert (backend.name, backend.value) == ("HETEROCACHE", BACKEND_PATH)
    assert backend.get_path() == BACKEND_PATH
    assert backend.get_class().get_name() == backend.name, "vLLM looks the member up by it"
    assert len({member.value for member in AttentionBackendEnum}) == len(AttentionBackendEnum)


def test_register_is_idempotent(backend):
    from vllm.platforms import current_platform

    platform = type(current_platform)
    before = dict(vars(platform)), dict(AttentionBackendEnum.__members__)
    for _ in range(3):
        register()
        plugin.register_early()
    assert (dict(vars(platform)), dict(AttentionBackendEnum.__members__)) == before
    assert AttentionBackendEnum._member_names_.count("HETEROCACHE") == 1


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_member_survives_pickling(backend, protocol):
    import cloudpickle

    assert pickle.loads(pickle.dumps(backend, protocol)) is backend
    assert pickle.loads(cloudpickle.dumps(backend, protocol)) is backend
    config = AttentionConfig(backend=backend)
    assert pickle.loads(pickle.dumps(config, protocol)).backend is backend


def test_member_survives_copying(backend):
    assert copy.copy(backend) is backend and copy.deepcopy(backend) is backend
    assert copy.deepcopy(AttentionConfig(backend=backend)).backend is backend


def test_fresh_process_unpickles_the_name_before_it_loads_plugins(interpreters):
    results = interpreters.fresh.results
    assert results["same"]
    assert results["hooked"], "the whole plugin is there, not the name alone"
    assert results["path"] == BACKEND_PATH


@pytest.mark.parametrize("form", CLI_FORMS)
def test_every_form_on_the_command_line_names_the_backend(interpreters, form):
    printed = interpreters.fresh.results["forms"][list(CLI_FORMS).index(form)]
    assert "AttentionBackendEnum.HETEROCACHE" in printed and worker_path() in printed


# --- without the name ---


def test_nothing_changes_where_the_backend_is_not_named(interpreters):
    without, loaded = interpreters.without.results, interpreters.fresh.results
    assert without["modules"] == [], "VLLM_PLUGINS kept the plugin out"
    assert loaded["hooked"]
    assert loaded["facts"] == without["facts"]
    assert without["facts"]["worker_cls"] not in WORKER_PATHS.values()
    assert without["facts"]["kv_transfer_config"] is None
    assert without["facts"]["managers"] == ["FullAttentionManager", "SlidingWindowManager"]


def test_another_backend_keeps_its_path_and_its_config(tiny_model):
    from vllm.platforms import current_platform

    selector = SimpleNamespace(use_mla=False, use_sparse=False, kv_cache_dtype="auto")
    stock = current_platform.get_attn_backend_cls(AttentionBackendEnum.CPU_ATTN, selector)
    assert stock == AttentionBackendEnum.CPU_ATTN.get_path()
    config = tiny_config(tiny_model, attention_backend="CPU_ATTN", additional_config={"x": 1})
    assert not is_selected(config) and not is_installed(config)
    assert config.additional_config == {"x": 1} and config.kv_transfer_config is None


def test_options_without_the_backend_are_warned_of_once(tiny_model, monkeypatch):
    said = []
    monkeypatch.setattr(plugin.logger, "warning", lambda text, *args: said.append(text % args))
    plugin._warn_once.cache_clear()
    tiny_config(tiny_model, additional_config={"x": 1})
    assert said == []
    for _ in range(2):
        config = tiny_config(tiny_model, additional_config={"heterocache": {"gpu_budget": 0.1}})
        assert not is_installed(config)
    (warning,) = said
    assert "'heterocache'" in warning and "add --attention-backend heterocache." in warning
    named_config(tiny_model)
    assert len(said) == 1


def test_name_is_unknown_where_the_plugin_is_not_loaded(interpreters):
    named = interpreters.without.results["named"]
    assert "Unknown attention backend: 'HETEROCACHE'" in named


def test_name_stays_unknown_to_a_vllm_that_is_not_supported(interpreters):
    results = interpreters.without.results
    assert "HETEROCACHE" not in results["members"]
    assert "Unknown attention backend: 'HETEROCACHE'" in results["unsupported"]
    assert results["stock"] == results["facts"], "those who do not name it are not disturbed"


@pytest.mark.parametrize("version", ["0.26.0", "0.31.2", "0.34.0", "1.32.0", "0.320"])
def test_other_versions_are_refused_in_words(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    refusal = rf"0\.32\.x or 0\.33\.x .*{version}; install 'vllm==0\.33\.\*'"
    with pytest.raises(RuntimeError, match=refusal):
        check_vllm_version()


def test_unsupported_version_is_logged_and_hooks_nothing(monkeypatch):
    said = []
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.34.0")
    monkeypatch.setattr(plugin, "hook_platform", lambda *hooks: pytest.fail("hooked"))
    monkeypatch.setattr(plugin.logger, "error", lambda text, *args: said.append(text % args))
    register()
    assert "supports vLLM 0.32.x or 0.33.x" in said[0] and "not available" in said[0]


# --- with the name ---


def test_naming_the_backend_installs_worker_and_connector(tiny_model):
    config = named_config(tiny_model)
    assert config.parallel_config.worker_cls == worker_path()
    transfer = config.kv_transfer_config
    assert transfer.kv_connector == "HeteroConnector"
    assert not transfer.is_kv_consumer, "vLLM would free blocks late"
    assert transfer.kv_connector_module_path == "vllm_heterocache.connectors.hetero"
    assert config.scheduler_config.scheduler_reserve_full_isl
    assert config.cache_config.block_size == 16
    assert config.additional_config["other_plugin"] == 7
    json.dumps(config.additional_config)


def test_both_connectors_are_installed_where_vllm_offloads(tiny_model, monkeypatch):
    monkeypatch.setattr(resolve, "check_connectors", lambda *args: None)  # for want of a GPU
    config = named_config(tiny_model, kv_offloading_size=2.0)
    for again in (config, pickle.loads(pickle.dumps(config))):
        plugin.configure(again)
        transfer = again.kv_transfer_config
        assert transfer.kv_connector == "HeteroMultiConnector"
        own, offloading = transfer.kv_connector_extra_config["connectors"]
        assert own["kv_connector"] == "HeteroConnector"
        assert offloading["kv_connector_extra_config"] == {"cpu_bytes_to_use": 2 << 30}
        names = list(HeteroMultiConnector._get_connector_classes_and_configs(again))
        assert [one.__name__ for one, _ in names] == [
            "HeteroConnector",
            "PackedOffloadingConnector",
        ]
        assert HeteroMultiConnector.get_required_kvcache_layout(again) == "BLHNC"


def test_connectors_of_vllm_are_installed_behind_ours_as_they_were_asked_for(tiny_model):
    nixl = {"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}
    offloading = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"spec_name": "Own"},
    }
    asked = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "engine_id": "here",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [nixl, offloading]},
    }
    transfer = named_config(tiny_model, kv_transfer_config=asked).kv_transfer_config
    assert (transfer.engine_id, transfer.kv_load_failure_policy) == ("here", "recompute")
    assert transfer.is_kv_consumer, "vLLM holds blocks until the steps in flight are done"
    own, *others = transfer.kv_connector_extra_config["connectors"]
    assert own["kv_connector"] == "HeteroConnector"
    names = ["PackedNixlConnector", "PackedOffloadingConnector"]
    assert [one["kv_connector"] for one in others] == names
    assert [one["kv_role"] for one in others] == ["kv_consumer", "kv_both"]
    assert others[1]["kv_connector_extra_config"] == {"spec_name": "Own"}
    alone = named_config(tiny_model, kv_transfer_config=nixl).kv_transfer_config
    _, only = alone.kv_connector_extra_config["connectors"]
    assert (only["kv_connector"], only["kv_role"]) == ("PackedNixlConnector", "kv_consumer")


def test_admission_always_reserves_whole_prompts(tiny_model):
    """The block manager learns from it how long a prefill is."""
    config = named_config(tiny_model, scheduler_reserve_full_isl=False)
    assert config.scheduler_config.scheduler_reserve_full_isl


@pytest.mark.cpu_worker
def test_paths_lead_to_the_classes():
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from vllm_heterocache.attention.backend import HeteroCacheBackend
    from vllm_heterocache.compat import CPUWorker
    from vllm_heterocache.worker.worker import HeteroCacheWorkerMixin

    assert resolve_obj_by_qualname(BACKEND_PATH) is HeteroCacheBackend
    worker = resolve_obj_by_qualname(WORKER_PATHS["cpu"])
    assert worker.__mro__[1] is HeteroCacheWorkerMixin, "it comes before vLLM's worker"
    assert issubclass(worker, CPUWorker)


class Platform:
    """A platform of vLLM by its answers."""

    device_name = "made-up"

    def __init__(self, kind, capability=0):
        self.kind, self.capability = kind, capability

    def is_cpu(self):
        return self.kind == "cpu"

    def is_cuda(self):
        return self.kind == "cuda"

    def has_device_capability(self, capability):
        return self.capability >= capability


@pytest.mark.parametrize(
    ("platform", "name"),
    [
        (Platform("cpu"), "cpu"),
        (Platform("cuda", 80), "cuda"),
        (Platform("cuda", 90), "cuda"),
        (Platform("cuda", 75), None),
        (Platform("rocm", 90), None),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_platforms_without_kernels_are_refused(monkeypatch, platform, name):
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    assert platform_name() == name
    if name is None:
        with pytest.raises(ValueError, match=r"compute capability 8\.0.*this is made-up"):
            check_platform()
    else:
        check_platform()


@pytest.mark.feature("V2 model runner on a CPU", refused=True)
@pytest.mark.parametrize("is_v2", [True, False])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_v2_runner_is_refused_on_the_cpu_alone(monkeypatch, kind, is_v2):
    monkeypatch.setattr("vllm.platforms.current_platform", Platform(kind, 90))
    config = SimpleNamespace(use_v2_model_runner=is_v2)
    if kind == "cpu" and is_v2:
        with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
            check_runner(config)
    else:
        check_runner(config)


OLD_RAY = "vllm.v1.executor.ray_executor.RayDistributedExecutor"


@pytest.mark.feature("Ray, vLLM 0.32's old executor", refused=True)
@pytest.mark.parametrize(
    ("executor", "variable", "is_refused"),
    [
        ("ray", "0", True),
        ("ray", "1", False),
        ("ray", None, False),
        ("mp", "0", False),
        (None, "0", False),
        (OLD_RAY, None, True),
        (type("RayDistributedExecutor", (), {}), None, True),
    ],
    ids=str,
)
def test_the_old_ray_executor_is_refused(monkeypatch, executor, variable, is_refused):
    """It is vLLM 0.32's, where the variable chooses; 0.33 has the new one alone."""
    from vllm import envs

    monkeypatch.delenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", raising=False)
    if variable is not None:
        monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", variable)
    parallel = SimpleNamespace(distributed_executor_backend=executor)
    config = SimpleNamespace(parallel_config=parallel)
    chosen_by_variable = executor == "ray" and variable == "0"
    if chosen_by_variable and "VLLM_USE_RAY_V2_EXECUTOR_BACKEND" not in envs.environment_variables:
        pytest.skip("this vLLM has no such variable")
    if is_refused:
        with pytest.raises(ValueError, match="unset VLLM_USE_RAY_V2_EXECUTOR_BACKEND"):
            check_executor(config)
    else:
        check_executor(config)


def test_start_up_asks_for_the_executor(tiny_model, monkeypatch):
    def refuse(vllm_config):
        raise ValueError("no such executor")

    monkeypatch.setattr(resolve, "check_executor", refuse)
    with pytest.raises(OptionError, match="no such executor"):
        named_config(tiny_model)


def test_configuring_a_second_time_changes_nothing(tiny_model, monkeypatch):
    """The engine process constructs the config again."""
    config = named_config(tiny_model)
    monkeypatch.setattr(plugin, "resolve", lambda *args: pytest.fail("resolved again"))
    for again in (config, pickle.loads(pickle.dumps(config))):
        before = copy.deepcopy(vars(again))
        transfer, digest = again.kv_transfer_config, again.compute_hash()
        plugin.configure(again)
        assert again.additional_config == before["additional_config"]
        assert again.kv_transfer_config is transfer
        assert again.kv_transfer_config.kv_connector == "HeteroConnector"
        assert again.parallel_config == before["parallel_config"]
        assert again.scheduler_config == before["scheduler_config"]
        assert again.cache_config == before["cache_config"]
        assert again.compute_hash() == digest


@pytest.mark.feature("Blocks of other sizes", refused=True)
def test_other_block_sizes_are_refused_not_overwritten(tiny_model):
    with pytest.raises(OptionError, match="block_size=32"):
        named_config(tiny_model, block_size=32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_budget": 1.5}, "gpu_budget=1.5 is refused"),
        ({"gpu_budgte": 0.5}, "did you mean 'gpu_budget'"),
        ({"profile": "/nowhere/profile.json", "gpu_budget": 0.5}, "/nowhere/profile.json"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_options_stop_the_start(tiny_model, options, message):
    with pytest.raises(OptionError, match=message):
        named_config(tiny_model, options)


def test_oracle_is_refused_on_cuda_without_eager_mode(tiny_model, monkeypatch):
    assert is_installed(named_config(tiny_model, {"policy": "oracle"}))
    monkeypatch.setattr(resolve, "platform_name", lambda: "cuda")
    monkeypatch.setattr(resolve, "check_kernels", lambda *_: None)  # the tiny model's heads
    with pytest.raises(OptionError, match="--enforce-eager"):
        named_config(tiny_model, {"policy": "oracle"})


def test_quest_on_a_model_of_its_full_layers_alone_is_refused(tiny_model):
    with pytest.raises(OptionError, match=r"2 of 2 layers whole.*full_layers"):
        named_config(tiny_model, {"policy": "quest"})
    options = {"policy": "quest", "gpu_budget": 0.6, "policy_options": {"full_layers": 1}}
    assert is_installed(named_config(tiny_model, options))


# --- profile and budgets ---


@pytest.fixture
def profile_file(tmp_path, tiny_model):
    """Measured scores of the tiny model: each head resembles every other one."""
    shape = (2, 2)
    similarity = np.full((3, *shape, 2), 0.9, np.float32)
    for distance in range(1, 3):
        similarity[distance, max(0, 2 - distance) :] = np.nan
    scores = np.arange(8, dtype=np.float32).reshape(2, *shape) / 8
    model = ModelIdentity("tiny", "LlamaForCausalLM", 2, 4, 2, 16)
    path = tmp_path / "profile.json"
    HeadProfile(model, {"top_share": 0.2}, {}, *scores, similarity).save(path)
    return path


def test_plan_travels_with_the_config(tiny_model, profile_file):
    options = {"profile": str(profile_file), "gpu_budget": 0.5, "cpu_pool_gib": 0.5}
    config = named_config(tiny_model, options)
    expected = configured_heads(HeadProfile.load(profile_file), HeteroCacheConfig(gpu_budget=0.5))
    profile_file.unlink()
    plugin.configure(config)  # the engine process has no file to read
    plan = sent_plan(config)
    assert plan.config.profile == str(profile_file) and plan.config.gpu_budget == 0.5
    assert plan.policy == HeteroCache()
    (assignment,) = plan.assignments
    assert assignment.num_full == 1
    for name in ("roles", "leaders", "weights"):
        assert np.array_equal(getattr(assignment, name), getattr(expected, name))


class Calls:
    """Counts calls of what start-up does once."""

    def __init__(self, monkeypatch) -> None:
        self.counts: Counter[str] = Counter()
        self._patch = monkeypatch
        self._watch(HeadProfile, "load")
        self._watch(HeadProfile, "from_json")
        self._watch(HeteroCache, "assign")
        self._watch(resolve, "make_policy")
        self._watch(serving_plan, "smallest_prompt")

    def _watch(self, owner: object, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            self.counts[name] += 1
            return original(*args, **kwargs)

        is_bound = inspect.ismethod(original)  # a class method
        self._patch.setattr(owner, name, staticmethod(counted) if is_bound else counted)


def test_start_up_decides_once_and_workers_only_read(tiny_model, profile_file, monkeypatch):
    options = {"profile": str(profile_file), "gpu_budget": 0.7, "cpu_pool_gib": 0.5}
    calls = Calls(monkeypatch)
    config = named_config(tiny_model, options, tensor_parallel_size=2)
    once = {"load": 1, "from_json": 1, "make_policy": 1, "smallest_prompt": 1}
    assert calls.counts == {**once, "assign": 2}, "one assignment for each rank"
    calls.counts.clear()
    plugin.configure(pickle.loads(pickle.dumps(config)))
    plan = ServingPlan.from_additional_config(config.additional_config)
    for tp_rank in range(2):
        assert plan.assignment(0, tp_rank, 2).roles.shape == (2, 1)
    assert not calls.counts


@pytest.mark.parametrize(
    ("ranks", "workers"),
    [
        ({}, 1),
        ({"tensor_parallel_size": 2}, 2),
        ({"pipeline_parallel_size": 2, "data_parallel_size": 3}, 6),
    ],
    ids=str,
)
def test_workers_are_told_how_many_share_a_host(tiny_model, profile_file, ranks, workers):
    """The engine processes of data-parallel replicas do not know of one another."""
    options = {"profile": str(profile_file), "gpu_budget": 0.7, "cpu_pool_gib": 0.5}
    config = named_config(tiny_model, options, **ranks)
    assert sent_plan(config).workers_per_host == workers


@pytest.mark.parametrize("min_prompt_tokens", [1, 200, 3000])
def test_prompts_are_compacted_once_they_are_long_enough_for_the_budgets(
    tiny_model, profile_file, min_prompt_tokens
):
    options = {"profile": str(profile_file), "gpu_budget": 0.5, "cpu_pool_gib": 0.5}
    config = named_config(tiny_model, {**options, "min_prompt_tokens": min_prompt_tokens})
    plan = sent_plan(config)
    feasible = smallest_prompt(plan.assignments, 0.5, plan.config.min_pages)
    assert feasible > 16
    assert plan.compact_min_tokens == max(min_prompt_tokens, feasible)


def test_host_pool_of_any_size_will_do_where_nothing_is_fetched(tiny_model, profile_file):
    options = {"profile": str(profile_file), "gpu_budget": 0.5, "cpu_pool_gib": 0.0001}
    config = named_config(tiny_model, {**options, "drift_threshold": 0})
    assert is_installed(config)


def test_host_pool_too_small_for_one_request_is_refused(tiny_model, profile_file):
    options = {"profile": str(profile_file), "gpu_budget": 0.5, "cpu_pool_gib": 0.0001}
    with pytest.raises(OptionError, match=r"cpu_pool_gib .*too small.*max_model_len=4096"):
        named_config(tiny_model, options)


# --- what calibration gets ---


def arguments_for_calibration(monkeypatch, make_config) -> dict:
    """What a start hands to calibration; no config comes of it."""
    found = []

    def noted(vllm_config):
        found.append(calibration_arguments(vllm_config))
        raise ValueError("noted")

    monkeypatch.setattr(plugin, "resolve", noted)
    with pytest.raises(OptionError, match="noted"):
        make_config()
    (arguments,) = found
    assert given_engine_args() == {}
    return json.loads(json.dumps(arguments))


def test_calibration_gets_the_arguments_of_the_engine(backend, tiny_model, monkeypatch, tmp_path):
    loading = {
        "download_dir": str(tmp_path),
        "hf_overrides": {"rope_theta": 5e5},
        "tokenizer_mode": "slow",
        "config_format": "hf",
        "code_revision": "v1",
        "cpu_offload_gb": 0.5,
        "model_loader_extra_config": {"a": 1},
        "dtype": "float32",
    }
    serving = {"max_num_seqs": 4, "enforce_eager": True, "enable_prefix_caching": False}
    found = arguments_for_calibration(
        monkeypatch, lambda: named_config(tiny_model, **loading, **serving)
    )
    ranks = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    assert found == {"load_format": "dummy", **loading, **ranks}


def test_arguments_of_a_servers_command_line_are_an_engines(backend, tiny_model, monkeypatch):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    line = ["--model", tiny_model, "--attention-backend", "heterocache", "--code-revision", "v1"]
    args = AsyncEngineArgs.from_cli_args(parser.parse_args([*line, "--max-num-seqs", "4"]))
    found = arguments_for_calibration(monkeypatch, args.create_engine_config)
    assert found["code_revision"] == "v1" and "max_num_seqs" not in found
    # the command line has a few defaults of its own
    assert len(found) < 8
    EngineArgs(model=tiny_model, **found)
