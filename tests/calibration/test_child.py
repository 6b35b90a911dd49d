import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch

from vllm_heterocache.calibration import child
from vllm_heterocache.calibration.child import calibration_arguments, progress_in, run_logged
from vllm_heterocache.compat import engine_args


def config(tp=1, pp=1, kv_heads=2, experts=False, local_replicas=1):
    return SimpleNamespace(
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: kv_heads),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            enable_expert_parallel=experts,
            data_parallel_size_local=local_replicas,
        ),
    )


@pytest.fixture
def given(monkeypatch):
    """Engine arguments that were given; change them in the test."""
    values = {}
    monkeypatch.setattr(engine_args, "given_engine_args", lambda: values)
    return values


RANKS = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}


def test_what_loading_may_need_is_handed_on(given):
    loading = {
        "tokenizer": "other/tokenizer",
        "tokenizer_mode": "slow",
        "tokenizer_revision": "v1",
        "revision": "v1",
        "code_revision": "v1",
        "download_dir": "/models",
        "hf_overrides": {"rope_theta": 1e6},
        "config_format": "mistral",
        "load_format": "runai_streamer",
        "model_loader_extra_config": {"concurrency": 4},
        "cpu_offload_gb": 4.0,
        "quantization": "fp8",
        "enable_expert_parallel": True,
        "trust_remote_code": True,
        "gpu_memory_utilization": 0.5,
        "an_argument_of_a_later_version": [1],
    }
    given.update(loading)
    assert calibration_arguments(config()) == {**loading, **RANKS}


def test_what_calibration_sets_itself_is_not_handed_on(given):
    given.update(
        max_model_len=100_000,
        max_num_seqs=64,
        attention_backend="heterocache",
        additional_config={"heterocache": {}},
        skip_tokenizer_init=True,
        worker_extension_cls="a_module_beside.the_callers_script",
        speculative_config={"method": "ngram", "num_speculative_tokens": 3},
        data_parallel_size=8,
        data_parallel_rank=3,
        _api_process_count=8,
        hf_token="secret",
    )
    assert calibration_arguments(config()) == RANKS


@pytest.mark.parametrize(
    ("setup", "ranks"),
    [
        ({"tp": 2}, 2),
        ({"tp": 8}, 2),  # ranks that would share KV heads are left out
        ({"tp": 2, "local_replicas": 4, "kv_heads": 8}, 2),
        # experts lie on the GPUs of all replicas
        ({"tp": 2, "local_replicas": 4, "kv_heads": 8, "experts": True}, 8),
        ({"tp": 1, "local_replicas": 4, "kv_heads": 6, "experts": True}, 3),
        ({"tp": 2, "local_replicas": 4, "kv_heads": 4, "experts": True}, 4),
    ],
    ids=str,
)
def test_every_kv_head_has_one_rank(given, setup, ranks):
    assert calibration_arguments(config(**setup))["tensor_parallel_size"] == ranks


def test_executor_is_handed_on_for_many_ranks(given):
    given["distributed_executor_backend"] = "ray"
    assert calibration_arguments(config(pp=2))["distributed_executor_backend"] == "ray"
    assert "distributed_executor_backend" not in calibration_arguments(config())
    given["distributed_executor_backend"] = object
    assert "distributed_executor_backend" not in calibration_arguments(config(pp=2))


def test_values_are_written_as_json(given):
    given.update(dtype=torch.float16, cpu_offload_params={"b", "a"}, limits={"image": (1, 2)})
    found = calibration_arguments(config())
    assert found["dtype"] == "float16" and found["cpu_offload_params"] == ["a", "b"]
    assert found["limits"] == {"image": [1, 2]}


def test_a_function_is_refused_by_name(given):
    given["hf_overrides"] = lambda config: config
    with pytest.raises(ValueError, match=r"engine argument hf_overrides .* set profile to"):
        calibration_arguments(config())


def test_command_line_takes_the_arguments_and_no_secret(given, monkeypatch, tmp_path):
    from vllm_heterocache.commands.cli import build_parser

    calls = []
    monkeypatch.setattr(child, "run_logged", lambda *call: calls.append(call) or 0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("VLLM_DP_RANK", "1")
    monkeypatch.setenv("VLLM_GPU_SYNC_CHECK", "error")
    monkeypatch.setenv("VLLM_PLUGINS", "heterocache")
    given["hf_token"] = "secret"
    arguments = {"hf_overrides": {"rope_theta": 1e6}, "trust_remote_code": True}
    output, log = tmp_path / "x.json", tmp_path / "x.log"
    assert child.calibrate_in_child("org/model", output, arguments, log) == 0
    ((command, environment, where),) = calls
    assert where == log and "secret" not in " ".join(command)
    assert command[:3] == [sys.executable, "-m", "vllm_heterocache.commands.cli"]
    args = build_parser().parse_args(command[3:])
    assert (args.model, args.output, args.llm) == ("org/model", output, arguments)
    assert environment["HF_TOKEN"] == "secret" and environment["VLLM_PLUGINS"] == "heterocache"
    assert not {"RANK", "VLLM_DP_RANK", "VLLM_GPU_SYNC_CHECK"} & environment.keys()


# --- the process


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def test_output_and_status_are_the_childs(tmp_path):
    log = tmp_path / "log"
    status = run_logged(python("print('said'); raise SystemExit(3)"), dict(os.environ), log)
    assert status == 3 and log.read_text() == "said\n"


def test_progress_is_that_of_the_last_state(tmp_path):
    log = tmp_path / "log"
    log.write_text("INFO loading 3/4 shards\n")
    assert "loaded" in progress_in(log)
    log.write_text(
        "Calibrating:   0%|          | 0/15 [00:00<?, ?prompt/s]\r"
        "Calibrating:  27%|\u2588\u2588\u258b       | 4/15 [00:40<01:50, 10.05s/prompt]\r"
    )
    assert "4 of 15" in progress_in(log)


def test_progress_is_logged_while_the_child_runs(tmp_path, monkeypatch, caplog, logged):
    monkeypatch.setattr(child, "POLL_S", 0.05)
    monkeypatch.setattr(child, "SAY_EVERY_S", 0.1)
    code = """
        import time
        print("Calibrating:  27%|##  | 4/15 [00:40<01:50, 10.05s/prompt]", flush=True)
        time.sleep(1)
    """
    with caplog.at_level(logging.INFO, "vllm.heterocache"):
        assert run_logged(python(code), dict(os.environ), tmp_path / "log") == 0
    assert "4 of 15" in logged()[-1]


CHILD = """
    import subprocess, sys, time
    from vllm_heterocache.calibration.child import end_with_stdin
    end_with_stdin()
    engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(engine.pid, flush=True)
    time.sleep(60)
"""
PARENT = """
    import os, signal, sys
    from pathlib import Path
    from vllm_heterocache.calibration.child import run_logged
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    run_logged([sys.executable, "-c", sys.argv[1]], dict(os.environ), Path(sys.argv[2]))
"""


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_child_and_its_engine_end_with_the_start_that_waits(tmp_path, how):
    log = tmp_path / "log"
    parent = subprocess.Popen([*python(PARENT), textwrap.dedent(CHILD), str(log)])
    try:
        wait_for(lambda: log.exists() and log.read_text().endswith("\n"))
        engine = int(log.read_text())
        assert is_running(engine)
        parent.send_signal(how)
        parent.wait(20)
        wait_for(lambda: not is_running(engine))
    finally:
        parent.kill()
        parent.wait()
