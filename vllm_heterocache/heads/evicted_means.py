"""What evicted pages leave behind: pages of mean keys and values (docs/design.md).

After the estimation zone of RetroInfer (arXiv 2505.02922), with runs of pages for its clusters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_heterocache.config import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

# Evicted pages that one mean stands for, where the head's budget has room for as many means.
RUN_PAGES = 16
# The first layers of a model have no means, this share of all: their attention is so wide that
# means mislead it (docs/quality.md).
WITHOUT_MEANS = 0.25


def mean_pages(
    budgets: np.ndarray,
    num_pages: int,
    min_pages: int,
    layer_ids: Sequence[int],
    model_layers: int,
) -> np.ndarray:
    """[L, H] int32: how many of its pages each head gives to the means of those it evicts.

    A page holds 16 means, so m pages and a list of n divide the other P - n pages into 16 * m
    runs, of RUN_PAGES or less, or of more where the list would fall under `min_pages`. A head
    that evicts less than one page a run has no means.

    Args:
        budgets: [L, H] int, pages of each head.
        num_pages: P, full pages of the prompt.
        min_pages: fewest pages that a list is to keep.
        layer_ids: [L] indices of the layers in the model.
        model_layers: layers of the model.
    """
    # m >= (P - budget + m) / (16 * RUN_PAGES), for whole m
    wanted = -(-(num_pages - budgets) // (PAGE_SIZE * RUN_PAGES - 1))
    means = np.minimum(wanted, np.maximum(budgets - min_pages, 0))
    num_evicted = num_pages - budgets + means
    is_late = layers_with_means(layer_ids, model_layers)
    has_means = (num_evicted >= PAGE_SIZE * means) & is_late[:, None]
    return np.where(has_means, means, 0).astype(np.int32)


def layers_with_means(layer_ids: Sequence[int], model_layers: int) -> np.ndarray:
    """[L] bool."""
    return np.asarray(layer_ids) >= WITHOUT_MEANS * model_layers
