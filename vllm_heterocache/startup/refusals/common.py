"""What refusals share: their sentence, and whose a class is."""

from __future__ import annotations

from vllm_heterocache.refusal import Sentence

PACKAGE = "vllm_heterocache"


def sentence(option: str, reason: str, fix: str) -> Sentence:
    """Why what `option` says is refused, and what to do."""
    return Sentence(f"--attention-backend heterocache does not support {option}: {reason}", fix)


def is_ours(dotted_name: object) -> bool:
    """Whether a module or class of that name is in this package."""
    return isinstance(dotted_name, str) and dotted_name.split(".")[0] == PACKAGE
