"""The process that calibrates for a start of vLLM: its arguments, its progress and its end."""

from __future__ import annotations

import enum
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

POLL_S = 1.0
SAY_EVERY_S = 15.0
END_S = 10.0  # a process that is told to end may take
# The calibration run is an engine of its own, not a rank of the engine that waits for it. It reads
# what it measures back to the host, which vLLM's check for hidden waits is not meant for.
ENGINE_ENVIRONMENT = frozenset(
    "VLLM_GPU_SYNC_CHECK "
    "RANK LOCAL_RANK GROUP_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT VLLM_PORT "
    "VLLM_DP_RANK VLLM_DP_RANK_LOCAL VLLM_DP_SIZE VLLM_DP_MASTER_IP VLLM_DP_MASTER_PORT".split()
)
# Engine arguments that are not handed on. All others are: loading may need any of them.
MUST_DIFFER = frozenset(
    # what calibration sets: one dense prompt at a time, read with the tokenizer
    "model model_weights additional_config attention_backend attention_config compilation_config "
    "cudagraph_capture_sizes max_cudagraph_capture_size enable_prefix_caching enforce_eager "
    "max_model_len max_num_batched_tokens max_num_seqs skip_tokenizer_init "
    # one replica on one host
    "nnodes node_rank master_addr master_port enable_elastic_ep elastic_ep_max_dp_size "
    # what belongs to serving alone
    "async_scheduling ec_manager_config ec_transfer_config enable_lora enable_sleep_mode "
    "kv_events_config kv_offloading_size kv_transfer_config logging_config log_config_file "
    "logits_processors otlp_traces_endpoint profiler_config scheduler_cls "
    "speculative_config structured_outputs_config weight_transfer_config worker_cls "
    "worker_extension_cls "
    # a secret, which goes through the environment
    "hf_token".split()
)
_log = logging.getLogger("vllm.heterocache")


def calibration_arguments(vllm_config: Any) -> dict[str, Any]:
    """Arguments of vLLM's LLM() that load the model as the engine of `vllm_config` will, JSON-able.

    Raises ValueError, naming the argument, where one is no JSON, such as a function.
    """
    from vllm_heterocache.compat.engine_args import given_engine_args

    given = {
        name: value
        for name, value in given_engine_args().items()
        if name not in MUST_DIFFER and not name.startswith(("data_parallel", "_api"))
    }
    parallel = vllm_config.parallel_config
    given["tensor_parallel_size"] = _num_ranks(vllm_config)
    given["pipeline_parallel_size"] = parallel.pipeline_parallel_size
    executor = given.get("distributed_executor_backend")
    many_ranks = given["tensor_parallel_size"] * given["pipeline_parallel_size"] > 1
    if not (many_ranks and isinstance(executor, str)):
        given.pop("distributed_executor_backend", None)
    return {name: _plain(name, value) for name, value in given.items()}


def _num_ranks(vllm_config: Any) -> int:
    """Tensor-parallel ranks of the calibration. Experts may need the GPUs of every local replica.

    Ranks that would share KV heads are left out: calibration needs each head on one rank.
    """
    parallel, heads = vllm_config.parallel_config, vllm_config.model_config.get_total_num_kv_heads()
    ranks = parallel.tensor_parallel_size
    if parallel.enable_expert_parallel:
        ranks *= max(1, parallel.data_parallel_size_local)
    return max(n for n in range(1, min(ranks, heads) + 1) if heads % n == 0)


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (str, bool, int, float, type(None))):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(name, one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(name, one) for one in (sorted(value) if isinstance(value, set) else value)]
    if isinstance(value, Path):
        return str(value)
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        return {key: _plain(name, one) for key, one in parts.items() if one is not None}
    raise ValueError(
        f'profile is "auto", but the engine argument {name} is {value!r}, which cannot be handed '
        "to calibration; give it as JSON, or set profile to the file of a head profile."
    )


def calibrate_in_child(model: str, output: Path, arguments: dict[str, Any], log: Path) -> int:
    """Run `heterocache calibrate` with these arguments of LLM(); return its exit status.

    The child and its engine end with this process, however it ends.
    """
    from vllm_heterocache.compat.engine_args import given_engine_args

    command = [sys.executable, "-m", "vllm_heterocache.commands.cli", "calibrate", model]
    command += ["-o", str(output), "--llm", json.dumps(arguments), "--end-with-stdin"]
    environment = {k: v for k, v in os.environ.items() if k not in ENGINE_ENVIRONMENT}
    token = given_engine_args().get("hf_token")
    if isinstance(token, str):
        environment["HF_TOKEN"] = token
    return run_logged(command, environment, log)


def run_logged(command: Sequence[str], environment: dict[str, str], log: Path) -> int:
    """Run a command with its output in `log`, say how far it is, and return its exit status.

    Its standard input is open as long as this process lives (see `end_with_stdin`).
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    started = said = time.monotonic()
    try:
        while True:
            try:
                return process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                now = time.monotonic()
                if now - said >= SAY_EVERY_S:
                    said = now
                    _log.info("HeteroCache calibrates: %s, %.0f s", progress_in(log), now - started)
    finally:
        _end(process)


def progress_in(log: Path) -> str:
    """How far the calibration is that writes this log: the last state of its progress bar."""
    states = re.findall(r"Calibrating:.*?(\d+)/(\d+) ", log.read_text(errors="replace"))
    if not states:
        return "the model is being loaded"
    return "{} of {} prompts are measured".format(*states[-1])


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(2 * END_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_with_stdin() -> None:
    """End this process and its group once standard input is closed: its starter is gone.

    SIGTERM first, which vLLM's processes obey; SIGKILL END_S later.
    """

    def leave(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os.killpg(0, signal.SIGTERM)
        time.sleep(END_S)
        os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=watch, daemon=True).start()
