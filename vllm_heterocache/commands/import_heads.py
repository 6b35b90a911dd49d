"""`heterocache import-heads MODEL FILE`: published head data as a head profile of this model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_heterocache.calibration.model_identity import check_folder, model_identity
from vllm_heterocache.commands.profile_report import absences
from vllm_heterocache.heads.published_heads import read_published
from vllm_heterocache.refusal import in_one_line

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_heterocache.heads.profile import HeadProfile, ModelIdentity


def profile_of(
    model: str, file: Path, revision: str | None = None, trust_remote_code: bool = False
) -> HeadProfile:
    """The profile that `file` gives of `model`. The model's configuration is read, its weights
    are not.

    Raises ValueError, in one sentence, for a model without a configuration that vLLM reads, and
    as `read_published`.
    """
    return read_published(file, _identity(model, revision, trust_remote_code))


def render(profile: HeadProfile) -> str:
    """Text: what the file told of the heads, what it did not tell, and what follows."""
    model, told = profile.model, profile.provenance
    measured_on = told["measured_on"] or "a model that the file does not name"
    lines = [
        f"{model.name}: {model.layers_in_words} x {model.num_kv_heads} KV heads",
        f"from {told['source']}, measured on {measured_on}",
    ]
    if profile.retrieval is not None:
        highest = int((profile.retrieval == profile.retrieval.max()).sum())
        lines.append(f"retrieval score: {told['retrieval']}")
        lines.append(
            f"{highest} of {profile.retrieval.size} heads have the highest score; where fewer stay "
            "whole, these are spread evenly over them"
        )
    return "\n".join(lines + absences(profile))


def _identity(model: str, revision: str | None, trust_remote_code: bool) -> ModelIdentity:
    from vllm_heterocache.compat import EngineArgs

    check_folder(model)
    args = EngineArgs(model=model, revision=revision, trust_remote_code=trust_remote_code)
    try:
        return model_identity(args.create_model_config())
    except (ValueError, OSError) as error:
        reason = in_one_line(error).rstrip(".")
        raise ValueError(
            f"the configuration of {model!r} cannot be read ({reason}); give a name on the hub, or "
            "a folder with a config.json"
        ) from error
