"""The former place of `ForcedTokens`; this module goes with the next release."""

from __future__ import annotations

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "ForcedTokens":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        "vllm_heterocache.forced_tokens:ForcedTokens has moved; write "
        "vllm_heterocache.evaluation.forced_tokens:ForcedTokens",
        DeprecationWarning,
        stacklevel=2,
    )
    from vllm_heterocache.evaluation.forced_tokens import ForcedTokens

    return ForcedTokens
