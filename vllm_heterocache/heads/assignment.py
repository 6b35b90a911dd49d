"""Roles, leaders and budget weights of the KV heads of a model, or of one rank of it.

L layers, H KV heads; the flat index of head h of layer l is l * H + h.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_heterocache.heads.json_arrays import rounded


class HeadRole(enum.IntEnum):
    """Role of a KV head (HeteroCache, arXiv 2601.13684, section on head typing)."""

    PIVOT = 0  # whole KV on the GPU, leads satellites
    SATELLITE = 1  # budget on the GPU, whole KV on the host, led by a pivot
    ANCHOR = 2  # budget on the GPU, not led
    VOLATILE = 3  # whole KV on the GPU, leads nobody
    # of this project: budget and quantised keys on the GPU, whole KV on the host, leads itself
    FINDER = 4

    @property
    def is_full(self) -> bool:
        return self in (HeadRole.PIVOT, HeadRole.VOLATILE)

    @property
    def meaning(self) -> str:
        """For tables and pictures."""
        return ("whole, leads", "budget, led", "budget", "whole", "budget, leads itself")[self]


@dataclass(frozen=True, eq=False)
class HeadAssignment:
    """Role, leader and budget weight of every KV head."""

    roles: np.ndarray  # [L, H] int8, HeadRole values
    # [L, H] int32, flat index of the leading pivot, of finders their own, -1 for none
    leaders: np.ndarray
    weights: np.ndarray  # [L, H] float32, > 0 for compressed heads, 0 for full ones

    @property
    def num_heads(self) -> int:
        return self.roles.size

    @property
    def full(self) -> np.ndarray:
        """[L, H] bool: heads whose whole KV stays on the GPU."""
        return (self.roles == HeadRole.PIVOT) | (self.roles == HeadRole.VOLATILE)

    @property
    def num_full(self) -> int:
        return int(self.full.sum())

    @property
    def floor(self) -> float:
        """Share of full heads: a GPU budget must exceed it."""
        return self.num_full / self.num_heads

    @property
    def num_led(self) -> int:
        """Heads that others or they themselves lead: their whole KV lies on the host."""
        return int((self.leaders >= 0).sum())

    @property
    def finders(self) -> np.ndarray:
        """[num_finders] flat indices."""
        return np.flatnonzero(self.roles == HeadRole.FINDER)

    def count(self, role: HeadRole) -> int:
        return int((self.roles == role).sum())

    def cluster_sizes(self) -> np.ndarray:
        """[L, H] int64: satellites that each head leads."""
        led = self.leaders[self.roles == HeadRole.SATELLITE]
        return np.bincount(led, minlength=self.num_heads).reshape(self.roles.shape)

    def validate(self) -> None:
        """Raise ValueError unless exactly satellites and finders are led, a satellite by a pivot
        not after it, a finder by itself."""
        if not self.roles.shape == self.leaders.shape == self.weights.shape:
            raise ValueError("roles, leaders and weights of a head assignment differ in shape")
        if not np.isin(self.roles, list(HeadRole)).all():
            raise ValueError("a head assignment holds an unknown role")
        finders = self.finders
        if not np.array_equal(self.leaders.reshape(-1)[finders], finders):
            raise ValueError("a finder must lead itself")
        led = self.leaders.reshape(-1) >= 0
        led[finders] = False
        if not np.array_equal(led, self.roles.reshape(-1) == HeadRole.SATELLITE):
            raise ValueError("every satellite needs a leader and no other head may have one")
        leaders, num_kv_heads = self.leaders.reshape(-1)[led], self.roles.shape[1]
        if (leaders >= self.num_heads).any() or (
            self.roles.reshape(-1)[leaders] != HeadRole.PIVOT
        ).any():
            raise ValueError("the leader of a satellite must be a pivot")
        if (leaders // num_kv_heads > np.flatnonzero(led) // num_kv_heads).any():
            raise ValueError("the leader of a satellite must not lie in a later layer")
        if not np.isfinite(self.weights).all() or not np.array_equal(self.weights > 0, ~self.full):
            raise ValueError("weights must be positive for compressed heads and 0 for full heads")

    def to_json(self) -> dict[str, Any]:
        """Rows of one layer each: role names, [layer, head] of the leader or null, weights."""
        num_kv_heads = self.roles.shape[1]
        leaders = [
            [None if i < 0 else list(divmod(i, num_kv_heads)) for i in row]
            for row in self.leaders.tolist()
        ]
        roles = [[HeadRole(r).name.lower() for r in row] for row in self.roles.tolist()]
        return {"roles": roles, "leaders": leaders, "weights": rounded(self.weights)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> HeadAssignment:
        roles = [[HeadRole[name.upper()] for name in row] for row in data["roles"]]
        num_kv_heads = len(roles[0])
        leaders = [
            [-1 if pair is None else pair[0] * num_kv_heads + pair[1] for pair in row]
            for row in data["leaders"]
        ]
        return cls(
            np.array(roles, np.int8),
            np.array(leaders, np.int32),
            np.array(data["weights"], np.float32),
        )
