"""Cluster files of the reference repository (github ponytaill/HeteroCache)."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole

# The two spellings of the role names in the reference repository's cluster files.
ROLES = {
    "anchor": "ANCHOR",
    "volatile": "VOLATILE",
    "pivot": "PIVOT",
    "satellite": "SATELLITE",
    "Stable_Unique": "ANCHOR",
    "Decaying_Unique": "VOLATILE",
    "Similar_Leader": "PIVOT",
    "Similar_Member": "SATELLITE",
}
KEYS = {"meta", "classification_matrix", "allocation_matrix", "leader_member_relations"}


def is_cluster_file(data: Any) -> bool:
    return isinstance(data, dict) and data.keys() >= KEYS


def assignment_of(data: dict[str, Any]) -> HeadAssignment:
    """The roles, leaders and weights of a cluster file. Raises what unexpected content raises."""
    codes = {v: HeadRole[ROLES[k]] for k, v in data["meta"]["type_map"].items()}
    roles = np.array([[codes[c] for c in row] for row in data["classification_matrix"]], np.int8)
    num_kv_heads = roles.shape[1]
    leaders = np.full(roles.shape, -1, np.int32)
    for layer, clusters in enumerate(data["leader_member_relations"]):
        for pivot, members in clusters.items():
            leaders[layer, members] = layer * num_kv_heads + int(pivot)
    # the reference marks full heads with -1
    weights = np.maximum(np.array(data["allocation_matrix"], np.float32), 0)
    return HeadAssignment(roles, leaders, weights)
