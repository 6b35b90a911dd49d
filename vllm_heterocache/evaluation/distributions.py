"""Next-token distributions as far as an engine tells them, and how far two are apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Distributions:
    """The next-token distributions of N output positions, as far as they are known.

    ids: int32 [N, K], the K most likely tokens, the likeliest first.
    logprobs: float32 [N, K], their log-probabilities.
    chosen: float32 [N], the log-probability of the token that stands there.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    chosen: np.ndarray


def bucketed_kl(full: Distributions, other: Distributions, row: int) -> tuple[float, float]:
    """KL of one position over the tokens that both sides know and a bucket of the rest.

    Returns:
        (KL in nats, full attention's probability in the bucket)
    """
    _, mine, theirs = np.intersect1d(full.ids[row], other.ids[row], return_indices=True)
    p = np.exp(full.logprobs[row, mine].astype(np.float64))
    q = np.exp(other.logprobs[row, theirs].astype(np.float64))
    # What is left of 1 can be 0 or below by rounding; it is at least the smallest double here.
    tiny = np.finfo(np.float64).tiny
    rest_p, rest_q = max(1 - p.sum(), 0.0), max(1 - q.sum(), 1e-9)
    p, q = np.append(p, rest_p), np.append(q, rest_q)
    kl = np.where(p > 0, p * (np.log(np.maximum(p, tiny)) - np.log(np.maximum(q, tiny))), 0.0)
    return max(float(kl.sum()), 0.0), rest_p
