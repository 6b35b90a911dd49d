"""The structure that docs/design.md describes, held by import-linter.

The contracts are in pyproject.toml.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "vllm_heterocache"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package beside its contracts, with kernels/ as a package of its own.

    In the repository kernels/ is a symlink without __init__.py, which import-linter passes over.
    """
    folder = tmp_path_factory.mktemp("architecture")
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=skipped)
    (folder / PACKAGE / "kernels" / "__init__.py").touch()
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return run(folder, "-c", code, "--no-cache")


def test_the_contracts_are_kept(copy):
    done = lint(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_the_contracts_see_every_module(copy):
    code = f"""
import grimp
graph = grimp.build_graph({PACKAGE!r}, cache_dir=None)
print(*sorted(graph.modules))
"""
    seen = set(run(copy, "-c", code).stdout.split())
    names = set()
    for file in (ROOT / PACKAGE).rglob("*.py"):
        names.add(".".join(file.relative_to(ROOT).with_suffix("").parts))
    for file in (ROOT / "kernels").glob("*.py"):
        names.add(f"{PACKAGE}.kernels.{file.stem}")
    assert seen == {name.removesuffix(".__init__") for name in names} | {f"{PACKAGE}.kernels"}


@pytest.mark.parametrize(
    ("module", "imported", "contract"),
    [
        ("scheduler/ledger.py", "vllm_heterocache.worker.requests", "Scheduler side and worker"),
        ("worker/compaction.py", "vllm_heterocache.scheduler.ledger", "Scheduler side and worker"),
        ("scheduler/ledger.py", "torch", "needs no torch"),
        ("startup/resolve.py", "vllm_heterocache.evaluation.command", "never imports the evalu"),
        ("kernels/tables.py", "vllm_heterocache.config", "Kernels import nothing"),
        ("policies/snapkv.py", "vllm.config", "Only compat"),
        ("heads/budget.py", "vllm_heterocache.startup.resolve", "No circle"),
    ],
)
def test_a_contract_that_is_broken_is_named(copy, tmp_path, module, imported, contract):
    broken = tmp_path / "broken"
    shutil.copytree(copy, broken)
    file = broken / PACKAGE / module
    text = file.read_text()
    file.write_text(
        text.replace("\nimport ", f"\nimport {imported}\nimport ", 1)
        if "\nimport " in text
        else text + f"\nimport {imported}\n"
    )
    done = lint(broken)
    assert done.returncode != 0
    (said,) = [line for line in done.stdout.splitlines() if "BROKEN" in line and contract in line]
    assert said
