"""Finds the head profile that the option `profile` asks for; "auto" calibrates once per model.

Cached profiles lie in HETEROCACHE_CACHE_DIR, or ~/.cache/vllm-heterocache. The file name holds a
digest of the model's identity and of how the model is loaded, so that a changed model is calibrated
again. Dummy weights use the cached profile of the real ones, and leave none behind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_heterocache.calibration.child import calibrate_in_child, calibration_arguments
from vllm_heterocache.calibration.model_identity import loading_facts, model_identity
from vllm_heterocache.heads.profile import HeadProfile, ModelIdentity
from vllm_heterocache.kv_cache_dtype import kv_cache_dtype
from vllm_heterocache.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")

MEASUREMENT = 1  # raise it when calibration measures something else, so that caches are renewed
_SET_FOLDER = "set HETEROCACHE_CACHE_DIR to a folder that can be written"
_log = logging.getLogger("vllm.heterocache")  # what vllm.logger.init_logger would return


def resolve_profile(option: str, vllm_config: Any) -> HeadProfile:
    """The profile for the model of vLLM's config: `option` is a path or "auto".

    "auto" calibrates where the cache has nothing. Raises Refusal for a file that is unreadable or
    of another model and for a cache that cannot be used, RuntimeError when calibration fails.
    """
    identity = model_identity(vllm_config.model_config)
    if option == "auto":
        return _cached_or_calibrated(vllm_config, identity)
    return HeadProfile.load_for(option, identity)


def cache_dir() -> Path:
    """Folder of cached profiles; it need not exist.

    Raises Refusal for a user without a home folder who did not choose one.
    """
    chosen = os.environ.get("HETEROCACHE_CACHE_DIR")
    try:
        if chosen:
            return Path(chosen).expanduser()  # no shell did, if a container's file sets it
        return Path.home() / ".cache" / "vllm-heterocache"
    except RuntimeError as error:
        raise Refusal(
            'profile is "auto", but this user has no home folder to keep profiles in', _SET_FOLDER
        ) from error


def make_cache_dir() -> None:
    """Make the folder, if it is not there yet.

    Raises Refusal where no file can be written in it.
    """
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: OSError) -> Refusal:
    return Refusal(
        f'profile is "auto", but the cache folder {folder} cannot be used ({error})', _SET_FOLDER
    )


def cache_path(identity: ModelIdentity, loading: dict[str, Any]) -> Path:
    """Where the profile of this model, loaded like this (see `loading_facts`), is cached."""
    model = {name: fact for name, fact in asdict(identity).items() if name != "layers" or fact}
    facts = json.dumps([MEASUREMENT, model, loading], sort_keys=True)
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", identity.name).strip("-.")
    return cache_dir() / f"{slug}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}.json"


def find_cached(identity: ModelIdentity, loading: dict[str, Any]) -> Path | None:
    """The file of the cached profile, None if there is none.

    Raises Refusal where nobody may look into the cache.
    """
    path = cache_path(identity, loading)
    try:
        return path if path.exists() else None
    except OSError as error:
        raise _unusable(path.parent, error) from error


def load_cached(identity: ModelIdentity, loading: dict[str, Any]) -> HeadProfile | None:
    """The cached profile, None if there is none or it does not fit this model. Raises as
    `find_cached`."""
    path = find_cached(identity, loading)
    if path is None:
        return None
    try:
        return HeadProfile.load_for(path, identity)
    except Refusal as refusal:
        problem = refusal.sentence.problem  # its fix is for those who name a file
        _log.warning("HeteroCache calibrates again: the cached %s", problem)
        return None


def save_cached(profile: HeadProfile) -> Path:
    """Put a fresh profile where `load_cached` looks, at once, and return the file.

    Raises OSError where the cache cannot be written.
    """
    path = cache_path(profile.model, profile.settings["loading"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        _write(path, profile.save)
    return path


def _lock(path: Path) -> Any:
    from filelock import FileLock

    return FileLock(path.with_suffix(".lock"))


def _write(path: Path, write: Callable[[Path], Result]) -> Result:
    """`write` a draft beside `path`, move it into place, and return what `write` did. No other
    process has the draft's name."""
    handle, name = tempfile.mkstemp(".tmp.json", f"{path.stem}.", path.parent)
    os.close(handle)
    draft = Path(name)
    try:
        result = write(draft)
        # mkstemp's files are their owner's alone; other files have what the umask leaves.
        umask = os.umask(0)
        os.umask(umask)
        draft.chmod(0o666 & ~umask)
        draft.replace(path)
        return result
    finally:
        draft.unlink(missing_ok=True)


def _cached_or_calibrated(vllm_config: Any, identity: ModelIdentity) -> HeadProfile:
    loading = loading_facts(vllm_config.model_config, kv_cache_dtype(vllm_config))
    path = cache_path(identity, loading)
    profile = load_cached(identity, loading)
    if profile is not None:
        _log.info("HeteroCache uses the cached head profile %s", path)
        return profile
    if vllm_config.load_config.load_format == "dummy":
        return _calibrated_on_dummy_weights(vllm_config, identity)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            # Another start may have calibrated while this one waited.
            profile = load_cached(identity, loading)
            if profile is None:
                profile = _calibrate(vllm_config, identity, path)
    except OSError as error:
        raise _unusable(path.parent, error) from error
    return profile


def _calibrated_on_dummy_weights(vllm_config: Any, identity: ModelIdentity) -> HeadProfile:
    """Random weights have random roles: a profile for this start alone."""
    folder = Path(tempfile.mkdtemp(prefix="heterocache-dummy-"))
    profile = _calibrate(vllm_config, identity, folder / "profile.json")
    shutil.rmtree(folder)  # a failure's message names the log in it
    return profile


def _calibrate(vllm_config: Any, identity: ModelIdentity, path: Path) -> HeadProfile:
    """Calibrate in a process of its own, with its log beside `path`, the file of the result."""
    log, started = path.with_suffix(".log"), time.monotonic()
    model = vllm_config.model_config.model_weights or vllm_config.model_config.model
    _log.info(
        "HeteroCache has no head profile of %s yet and calibrates it now, once, in a few minutes; "
        "its log is %s",
        identity.name,
        log,
    )

    def write(draft: Path) -> HeadProfile:
        status = calibrate_in_child(model, draft, calibration_arguments(vllm_config), log)
        if status:
            raise RuntimeError(_failure(model, f"exit status {status}", log))
        try:
            profile = HeadProfile.load(draft)
            profile.check_model(identity)
        except ValueError as error:
            raise RuntimeError(_failure(model, str(error), log)) from error
        return profile

    profile = _write(path, write)
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
