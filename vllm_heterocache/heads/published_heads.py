"""Head data that others have published, read as head profiles (docs/profiles.md).

A file tells one thing about the heads. What a file does not tell stays absent in the profile, and
the recipes refuse a profile that lacks what they need.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_heterocache.heads.cluster_files import is_cluster_file
from vllm_heterocache.heads.duo_attention import read_gates
from vllm_heterocache.heads.headwise_config import KEY, retrieval_shares
from vllm_heterocache.heads.profile import FORMAT, HeadProfile, ModelIdentity

if TYPE_CHECKING:
    import numpy as np


def read_published(path: str | Path, model: ModelIdentity) -> HeadProfile:
    """The profile of `model` that a published file gives; its content tells the format.

    A DuoAttention table or an RTPurbo config.json gives retrieval scores, a HeteroCache cluster
    file gives roles. No file says which weights it was measured on, so the profile has no
    fingerprint.

    Raises ValueError, naming the file, for a file that cannot be read, or is not of such a model.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); give the path of a file of head data"
        ) from error
    try:
        profile = _read(path, content.decode(), replace(model, weights_fingerprint=None))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be imported for {model.name!r}: {error}; give head data of this model, "
            f"or measure them with `heterocache calibrate`"
        ) from error
    provenance = {
        "file": path.name,
        "file_sha256": hashlib.sha256(content).hexdigest()[:16],
    }
    return replace(profile, provenance=profile.provenance | provenance)


def _read(path: Path, text: str, model: ModelIdentity) -> HeadProfile:
    if not text.lstrip().startswith("{"):
        return _from_gates(path, text, model)
    data = json.loads(text)
    if is_cluster_file(data):
        return _from_clusters(path, data, model)
    if KEY in data:
        return _from_headwise_config(data, model)
    if data.get("format") == FORMAT:
        raise ValueError("it is a head profile already, which the option `profile` takes as it is")
    raise ValueError(
        f"it is no table of gates (DuoAttention), and holds neither {KEY} (RTPurbo) nor "
        "classification_matrix and its like (HeteroCache clusters)"
    )


def _from_gates(path: Path, text: str, model: ModelIdentity) -> HeadProfile:
    gates = read_gates(text)
    _check_shape(gates.shape, model)
    provenance = {
        "source": "DuoAttention gates",
        "retrieval": "a KV head's gate, which is its need of the whole context",
        "measured_on": _duo_attention_model(path),
    }
    return _with_scores(gates, model, provenance)


def _from_headwise_config(data: dict[str, Any], model: ModelIdentity) -> HeadProfile:
    if model.num_q_heads is None:
        raise ValueError(f"{KEY} is of query heads, and the model does not tell their number")
    shares = retrieval_shares(data, model.num_layers, model.num_q_heads, model.num_kv_heads)
    provenance = {
        "source": "RTPurbo headwise_config",
        "retrieval": "the share of a KV head's query heads that are retrieval heads",
        "measured_on": _last_name(data.get("_name_or_path")),
    }
    return _with_scores(shares, model, provenance)


def _from_clusters(path: Path, data: dict[str, Any], model: ModelIdentity) -> HeadProfile:
    try:
        stored = HeadProfile.from_json(data, path.name)
    except ValueError as error:
        raise ValueError(f"its clusters are unusable ({error.__cause__})") from error
    _check_shape((stored.model.num_layers, stored.model.num_kv_heads), model)
    provenance = {"source": "HeteroCache clusters", "measured_on": stored.model.name}
    return HeadProfile(model, {}, provenance, assignment=stored.assignment)


def _with_scores(
    scores: np.ndarray, model: ModelIdentity, provenance: dict[str, Any]
) -> HeadProfile:
    if scores.min() == scores.max():
        raise ValueError(f"all heads have the score {scores.max():g}, so it ranks none")
    return HeadProfile(model, {}, provenance, retrieval=scores)


def _check_shape(shape: tuple[int, ...], model: ModelIdentity) -> None:
    if shape != (model.num_layers, model.num_kv_heads):
        raise ValueError(
            f"it has {shape[0]} layers of {shape[1]} KV heads, and the model has "
            f"{model.layers_in_words} of {model.num_kv_heads}"
        )


def _duo_attention_model(path: Path) -> str | None:
    """What DuoAttention's own config.json beside the table names; None where there is none."""
    try:
        beside = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return _last_name(beside.get("model_name")) if isinstance(beside, dict) else None


def _last_name(name: Any) -> str | None:
    """Of a path or a name on the hub."""
    return name.rstrip("/").split("/")[-1] or None if isinstance(name, str) else None
