"""Which model a profile is measured on, and how that model is loaded.

A model has one identity, however it is reached: by its name on the hub, or as a folder of the
hub's cache, which vLLM puts in place of the name where HF_HUB_OFFLINE is set.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_heterocache.compat.layer_kinds import served_layers
from vllm_heterocache.heads.profile import ModelIdentity
from vllm_heterocache.kv_cache_dtype import FP8_ELEMENTS
from vllm_heterocache.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterable

SAMPLE_BYTES = 4096
# Spread evenly over each weight file. A change of one kind of weights in every layer (8 % of the
# bytes and more) escapes all of them in fewer than one case of a hundred.
SAMPLES = 64
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json",
                   "added_tokens.json", "special_tokens_map.json")  # fmt: skip
# Of vLLM's ModelConfig: they choose the code and the configuration that a model is loaded with.
LOADING_OPTIONS = ("code_revision", "config_format", "hf_config_path", "hf_overrides",
                   "model_class_overrides", "tokenizer_mode")  # fmt: skip


def model_identity(model_config: Any) -> ModelIdentity:
    """Who the model is, from vLLM's ModelConfig; a local path is reduced to its last name."""
    name, fingerprint = _name_and_fingerprint(model_config)
    layers = served_layers(model_config)
    are_all = len(layers) == model_config.get_total_num_hidden_layers()
    return ModelIdentity(
        name=name,
        architecture=model_config.architecture,
        num_layers=len(layers),
        num_q_heads=model_config.model_arch_config.total_num_attention_heads,
        num_kv_heads=model_config.get_total_num_kv_heads(),
        head_dim=model_config.get_head_size(),
        weights_fingerprint=fingerprint,
        layers=None if are_all else tuple(layers),
    )


def loading_facts(model_config: Any, kv_cache_dtype: str) -> dict[str, Any]:
    """What else a measurement depends on, JSON-able: how the model is loaded, and its tokenizer.

    The time stamps of a local model's weights are among the facts, as the fingerprint reads
    samples alone. They are no part of the identity: a copied model is the same model.

    Args:
        kv_cache_dtype: the name of the KV cache's dtype (kv_cache_dtype.py).
    """
    quantized = in_checkpoint(model_config)
    facts = {
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "kv_cache_dtype": FP8_ELEMENTS.get(kv_cache_dtype),  # keys are rounded
        "quantization": None if quantized else model_config.quantization,
        "quantization_config": None if quantized else model_config.quantization_config,
        "tokenizer": _tokenizer(model_config),
        "weights_written": _written(Path(model_config.model)) if _is_local(model_config) else None,
    }
    facts |= {name: getattr(model_config, name) for name in LOADING_OPTIONS}
    return {name: _as_text(value) for name, value in facts.items() if value not in (None, {}, "")}


def in_checkpoint(model_config: Any) -> bool:
    """Whether the weights were quantised before they were stored."""
    return getattr(model_config.hf_config, "quantization_config", None) is not None


def check_folder(model: str) -> None:
    """Raise Refusal where `model` can be a folder alone, and there is none.

    vLLM would ask the hub for a name like that.
    """
    on_hub = re.fullmatch(r"\w[\w.-]*(/[\w.:-]+)?(/[\w.-]+\.gguf)?", model)
    if on_hub or "://" in model or Path(model).exists():
        return
    raise Refusal(
        f"the model {model!r} is no folder here",
        "correct the path, or give the model's name on the hub",
    )


def hub_snapshot(model: str) -> tuple[str, str] | None:
    """Name and commit of a folder `models--ORG--NAME/snapshots/COMMIT`; None for any other."""
    folder = Path(model).absolute()
    kind, *name = folder.parent.parent.name.split("--")
    if folder.parent.name != "snapshots" or kind != "models" or not name:
        return None
    return "/".join(name), folder.name


def weights_fingerprint(path: Path) -> str:
    """16 hex digits over config.json and names, sizes and samples of the weight files in `path`.

    `path` may also be one weight file. Cheap: of each file it reads SAMPLES pieces of SAMPLE_BYTES.
    """
    config = path / "config.json"
    digest = hashlib.sha256(config.read_bytes() if config.exists() else b"")
    for file in _weight_files(path):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        last = max(0, size - SAMPLE_BYTES)
        with file.open("rb") as data:
            for start in sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)}):
                data.seek(start)
                digest.update(data.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _name_and_fingerprint(model_config: Any) -> tuple[str, str | None]:
    if model_config.model_weights:
        # vLLM has put a local folder, without weights, in the place of an object store's address.
        return model_config.model_weights, model_config.revision
    snapshot = hub_snapshot(model_config.model)
    if snapshot is not None:
        return snapshot
    if _is_local(model_config):
        path = Path(model_config.model)
        return path.resolve().name, weights_fingerprint(path)
    # transformers notes the commit too, and not every format of configurations goes through it.
    noted = getattr(model_config.hf_config, "_commit_hash", None)
    return model_config.model, noted or _commit(model_config.model, model_config.revision)


def _is_local(model_config: Any) -> bool:
    model = model_config.model
    return not model_config.model_weights and not hub_snapshot(model) and Path(model).exists()


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a model on the hub stands for: as vLLM resolved it, or as the
    hub's cache notes it; `revision` itself where neither knows."""
    from huggingface_hub import try_to_load_from_cache

    resolved = getattr(revision, "resolved", None)
    if resolved is not None:
        return str(resolved)
    for file in ("config.json", "params.json", "tokenizer_config.json"):
        try:
            found = try_to_load_from_cache(name, file, revision=revision)
        except ValueError:  # no name that the hub would take
            break
        snapshot = hub_snapshot(str(Path(found).parent)) if isinstance(found, str) else None
        if snapshot is not None:
            return snapshot[1]
    return revision


def _tokenizer(model_config: Any) -> list[str | None]:
    """Name on the hub and commit, or a digest of a local folder's files."""
    tokenizer = str(model_config.tokenizer)
    snapshot = hub_snapshot(tokenizer)
    if snapshot is not None:
        return list(snapshot)
    if not Path(tokenizer).exists():
        return [tokenizer, _commit(tokenizer, model_config.tokenizer_revision)]
    digest = hashlib.sha256()
    for file in _files(Path(tokenizer), TOKENIZER_FILES):
        digest.update(f"{file.name} ".encode() + file.read_bytes())
    return [digest.hexdigest()[:16], None]


def _written(path: Path) -> str:
    """Digest of the times of the weight files: whole seconds, as images and archives keep them."""
    times = [[file.name, file.stat().st_mtime_ns // 10**9] for file in _weight_files(path)]
    return hashlib.sha256(str(times).encode()).hexdigest()[:16]


def _weight_files(path: Path) -> list[Path]:
    return _files(path, WEIGHT_FILES) if path.is_dir() else [path]


def _files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({file for one in patterns for file in folder.glob(one) if file.is_file()})


def _as_text(value: Any) -> Any:
    """What JSON lacks by its name, a function's without the address that every process changes."""
    if isinstance(value, (str, list, dict)):
        return value
    return getattr(value, "__qualname__", None) or str(value)
