"""The kernels' view of the roles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_heterocache.kernels.tables import HeadMaps
from vllm_heterocache.worker.tables.upload import upload

if TYPE_CHECKING:
    import torch

    from vllm_heterocache.heads.assignment import HeadAssignment


def head_maps(assignment: HeadAssignment, device: torch.device) -> HeadMaps:
    """The kernels' view of the roles: pivots that lead, and the satellites they lead."""
    shape = assignment.roles.shape
    leaders = assignment.leaders.ravel()
    satellites = np.flatnonzero(leaders >= 0)  # a finder is its own pivot, and follows itself
    pivots = np.unique(leaders[leaders >= 0])
    pivot_of_head = np.full(leaders.size, -1, np.int32)
    pivot_of_head[pivots] = np.arange(pivots.size)
    satellite_of_head = np.full(leaders.size, -1, np.int32)
    satellite_of_head[satellites] = np.arange(satellites.size)
    arrays = (
        pivot_of_head.reshape(shape),
        satellite_of_head.reshape(shape),
        pivots,
        satellites,
        pivot_of_head[leaders[satellites]],
    )
    return HeadMaps(*[upload(array.astype(np.int32), device) for array in arrays])
