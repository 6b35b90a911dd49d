"""Reference of page copies between (or within) page pools."""

from __future__ import annotations

import torch


def page_gather_ref(
    source: torch.Tensor,
    source_ids: torch.Tensor,
    target: torch.Tensor,
    target_ids: torch.Tensor,
) -> None:
    """Copy page source_ids[i] of `source` to page target_ids[i] of `target`.

    Args:
        source, target: [num_pages, page_size, 2 * head_dim]; may be one tensor, as long as no
            copy writes a page that another one reads.
        source_ids, target_ids: [num_copies] integer page ids; target ids are distinct.
    """
    assert source_ids.shape == target_ids.shape and source.shape[1:] == target.shape[1:]
    target[target_ids.long()] = source[source_ids.long()].to(target.device)
