"""Reference of soft-capped logits (kernel: soft_cap.py)."""

from __future__ import annotations

import torch


def soft_capped_ref(logits: torch.Tensor, soft_cap: float) -> torch.Tensor:
    """`soft_cap * tanh(logits / soft_cap)`, as Gemma 2 limits logits; 0: they stay as they are.

    Logits are already scaled. Their order stays, so that choices by the largest logit do without.
    What a stand-in token is worth (its bias) is added behind the cap, and a sink's logit is not
    capped.

    Args:
        logits: any shape and float dtype.
        soft_cap: 0 or above.
    """
    return logits if not soft_cap else soft_cap * torch.tanh(logits / soft_cap)
