"""Finds the head profile that the option `profile` asks for; "auto" calibrates once per model.

Cached profiles lie in HETEROCACHE_CACHE_DIR, or ~/.cache/vllm-heterocache. The file name holds the
model's shape and a fingerprint of its weights, so that a changed model is calibrated again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_heterocache.heads.profile import HeadProfile, ModelIdentity

if TYPE_CHECKING:
    from collections.abc import Sequence

MEASUREMENT = 1  # raise it when calibration measures something else, so that caches are renewed
SAMPLE_BYTES = 4096  # read at the start, middle and end of each weight file
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
# The calibration run is an engine of its own, not a rank of the engine that waits for it.
ENGINE_ENVIRONMENT = frozenset(
    "RANK LOCAL_RANK GROUP_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT VLLM_PORT "
    "VLLM_DP_RANK VLLM_DP_RANK_LOCAL VLLM_DP_SIZE VLLM_DP_MASTER_IP VLLM_DP_MASTER_PORT".split()
)
_log = logging.getLogger("vllm.heterocache")  # what vllm.logger.init_logger would return


def resolve_profile(option: str, model_config: Any, flags: Sequence[str] = ()) -> HeadProfile:
    """The profile for a model: `option` is a path or "auto", `model_config` vLLM's ModelConfig.

    `flags` (see `calibration_flags`) go to `heterocache calibrate` when "auto" finds nothing in
    the cache. Raises ValueError for a file that is unreadable or of another model, RuntimeError
    when calibration fails.
    """
    identity = model_identity(model_config)
    if option == "auto":
        return _cached_or_calibrated(model_config.model, identity, flags)
    profile = HeadProfile.load(option)
    profile.check_model(identity)
    return profile


def calibration_flags(vllm_config: Any) -> list[str]:
    """Options of `heterocache calibrate` that load the model as `vllm_config` will.

    Ranks that would share KV heads are left out: calibration needs each head on one rank.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache, load_format = vllm_config.cache_config, vllm_config.load_config.load_format
    tp_size = min(parallel.tensor_parallel_size, model.get_total_num_kv_heads())
    executor = parallel.distributed_executor_backend
    many_ranks = tp_size * parallel.pipeline_parallel_size > 1
    in_checkpoint = getattr(model.hf_config, "quantization_config", None) is not None
    values = {
        "tokenizer": model.tokenizer if model.tokenizer != model.model else None,
        "revision": model.revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": None if in_checkpoint else model.quantization,
        "load-format": load_format if load_format != "auto" else None,
        "tensor-parallel-size": tp_size,
        "pipeline-parallel-size": parallel.pipeline_parallel_size,
        "distributed-executor-backend": (
            executor if many_ranks and isinstance(executor, str) else None
        ),
        "gpu-memory-utilization": cache.gpu_memory_utilization,
        "kv-cache-memory-bytes": cache.kv_cache_memory_bytes,
    }
    flags = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return flags + ["--trust-remote-code"] * model.trust_remote_code


def model_identity(model_config: Any) -> ModelIdentity:
    """Who the model is, from vLLM's ModelConfig; a local path is reduced to its last name."""
    model = model_config.model
    path = Path(model)
    if path.exists():
        name, fingerprint = path.resolve().name, weights_fingerprint(path)
    else:
        # transformers notes the commit that a hub name resolved to
        commit = getattr(model_config.hf_config, "_commit_hash", None)
        name, fingerprint = model, commit or model_config.revision
    return ModelIdentity(
        name=name,
        architecture=model_config.architecture,
        num_layers=model_config.get_total_num_hidden_layers(),
        num_q_heads=model_config.model_arch_config.total_num_attention_heads,
        num_kv_heads=model_config.get_total_num_kv_heads(),
        head_dim=model_config.get_head_size(),
        weights_fingerprint=fingerprint,
    )


def weights_fingerprint(path: Path) -> str:
    """16 hex digits over config.json and names, sizes and samples of the weight files in `path`.

    `path` may also be one weight file. Cheap: it reads SAMPLE_BYTES at three places of each file.
    """
    digest = hashlib.sha256()
    files = [path]
    if path.is_dir():
        config = path / "config.json"
        digest.update(config.read_bytes() if config.exists() else b"")
        files = sorted(file for pattern in WEIGHT_FILES for file in path.glob(pattern))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as data:
            for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):
                data.seek(start)
                digest.update(data.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def cache_dir() -> Path:
    """Folder of cached profiles; it need not exist.

    Raises RuntimeError for a user without a home folder who did not choose one.
    """
    chosen = os.environ.get("HETEROCACHE_CACHE_DIR")
    if chosen:
        return Path(chosen)
    try:
        return Path.home() / ".cache" / "vllm-heterocache"
    except RuntimeError as error:
        raise RuntimeError(
            'profile is "auto", but this user has no home folder to keep profiles in; set '
            "HETEROCACHE_CACHE_DIR to a folder that can be written."
        ) from error


def cache_path(identity: ModelIdentity) -> Path:
    """Where the profile of this model is cached."""
    facts = json.dumps([MEASUREMENT, asdict(identity)], sort_keys=True)
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", identity.name).strip("-.")
    return cache_dir() / f"{slug}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}.json"


def load_cached(identity: ModelIdentity) -> HeadProfile | None:
    """The cached profile, None if there is none or it does not fit this model."""
    path = cache_path(identity)
    if not path.exists():
        return None
    try:
        profile = HeadProfile.load(path)
        profile.check_model(identity)
    except ValueError as error:
        _log.warning("HeteroCache calibrates again: the cached head profile is unusable: %s", error)
        return None
    return profile


def _cached_or_calibrated(model: str, identity: ModelIdentity, flags: Sequence[str]) -> HeadProfile:
    from filelock import FileLock

    profile = load_cached(identity)
    if profile is not None:
        return profile
    path = cache_path(identity)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            # Another start may have calibrated while this one waited.
            profile = load_cached(identity)
            if profile is None:
                profile = _calibrate(model, identity, flags, path)
    except OSError as error:
        raise RuntimeError(
            f'profile is "auto", but the cache folder {path.parent} cannot be used ({error}); set '
            "HETEROCACHE_CACHE_DIR to a folder that can be written."
        ) from error
    return profile


def _calibrate(
    model: str, identity: ModelIdentity, flags: Sequence[str], path: Path
) -> HeadProfile:
    """Run `heterocache calibrate` in a process of its own and move its result into place."""
    log, draft = path.with_suffix(".log"), path.with_name(f"{path.stem}.{os.getpid()}.tmp.json")
    run = [sys.executable, "-m", "vllm_heterocache.commands.cli", "calibrate"]
    command = [*run, model, "-o", str(draft)]
    environment = {k: v for k, v in os.environ.items() if k not in ENGINE_ENVIRONMENT}
    _log.info(
        "HeteroCache has no head profile of %s yet and calibrates it now, once, in a few minutes; "
        "its log is %s",
        identity.name,
        log,
    )
    started = time.monotonic()
    try:
        with log.open("wb") as output:
            done = subprocess.run(
                [*command, *flags], env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        if done.returncode:
            raise RuntimeError(_failure(model, f"exit status {done.returncode}", log))
        try:
            profile = HeadProfile.load(draft)
            profile.check_model(identity)
        except ValueError as error:
            raise RuntimeError(_failure(model, str(error), log)) from error
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    _log.info(
        "HeteroCache calibrated %s in %.0f s; its head profile is %s",
        identity.name,
        time.monotonic() - started,
        path,
    )
    return profile


def _failure(model: str, reason: str, log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "it printed nothing"
    return (
        f'profile is "auto", but calibrating {model} failed ({reason}: {last}); the whole log is '
        f"{log}; to make a profile by hand, run `heterocache calibrate {model} -o FILE` and set "
        "profile to FILE."
    )
