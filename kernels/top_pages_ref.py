"""Reference of the one order in which pages are ranked by their scores."""

from __future__ import annotations

import torch

from vllm_heterocache.kernels.values import Protected

KEY_SHIFT = 11  # low bits of a score that do not count: scores within 0.02 % are equal
MAX_KEY = (1 << 20) - 1  # above the key of every score, infinity included
SIGNED_SHIFT = 12  # as KEY_SHIFT, where scores may be negative
SIGNED_OFFSET = 1 << 19  # the key of zero


def score_keys_ref(scores: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the scores.

    Args:
        scores: fp32, not negative.

    Returns:
        int32 of the same shape, 0 <= key < MAX_KEY.
    """
    return scores.contiguous().view(torch.int32) >> KEY_SHIFT


def signed_keys_ref(scores: torch.Tensor) -> torch.Tensor:
    """Integers in the order of scores of any sign; those within 0.05 % may be equal.

    Args:
        scores: fp32, not NaN.

    Returns:
        int32 of the same shape, 0 <= key < MAX_KEY.
    """
    bits = scores.contiguous().view(torch.int32)
    # of negative numbers, the larger the bits the lower the number
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SIGNED_SHIFT) + SIGNED_OFFSET


def protect_ref(keys: torch.Tensor, protected: Protected) -> torch.Tensor:
    """A copy of the keys [P] of a prompt's pages in which the protected pages stand above all
    others."""
    keys = keys.clone()
    keys[: protected.sinks] = MAX_KEY
    keys[max(keys.shape[0] - protected.recent, 0) :] = MAX_KEY
    return keys


def top_mask_ref(keys: torch.Tensor, k: int) -> torch.Tensor:
    """Mark the k largest keys of a vector; of equal ones the first.

    Args:
        keys: [n] integer.
        k: 0 <= k <= n.

    Returns:
        [n] bool.
    """
    best = keys.sort(descending=True, stable=True).indices[:k]
    return torch.zeros_like(keys, dtype=torch.bool).index_fill_(0, best, True)
