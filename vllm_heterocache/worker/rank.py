"""What a worker knows of its rank once its model is loaded, before there is a KV pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole
from vllm_heterocache.kernels.tables import HeadMaps
from vllm_heterocache.startup.serving_plan import ServingPlan
from vllm_heterocache.worker.ops.interface import Geometry
from vllm_heterocache.worker.step_selection import step_bytes_per_block
from vllm_heterocache.worker.tables.finder_keys import FinderKeys
from vllm_heterocache.worker.tables.page_table import PageTable


@dataclass(frozen=True)
class Rank:
    """One tensor- and pipeline-parallel rank: its heads, their roles, and its sizes."""

    plan: ServingPlan
    assignment: HeadAssignment  # of this rank's heads
    maps: HeadMaps
    geometry: Geometry
    layer_ids: Sequence[int]  # of the model, in layer order
    kv_head_ids: Sequence[int]  # of the model
    model_layers: int
    index: int  # vLLM's rank
    max_num_seqs: int
    steps_in_flight: int  # vLLM's max_concurrent_batches

    def __post_init__(self) -> None:
        shape = len(self.layer_ids), len(self.kv_head_ids)
        assert self.assignment.roles.shape == shape
        assert shape == (self.geometry.num_layers, self.geometry.num_kv_heads)

    @property
    def leads(self) -> list[bool]:
        """[L] whether a head of the layer is a pivot that leads satellites."""
        return [bool(sizes.any()) for sizes in self.assignment.cluster_sizes()]

    @property
    def finds(self) -> list[bool]:
        """[L] whether a head of the layer is a finder."""
        return (self.assignment.roles == HeadRole.FINDER).any(axis=1).tolist()

    @property
    def finder_keys(self) -> FinderKeys | None:
        return FinderKeys.of(self.assignment, self.geometry.head_dim, self.geometry.dtype)

    @property
    def staging_depth(self) -> int:
        """Buffers of each small per-step input, more than steps can be in flight."""
        return self.steps_in_flight + 2

    def table_bytes_per_block(self, block_bytes: int) -> int:
        """Memory beside the KV pool that each of its blocks needs: page tables and summaries.

        Args:
            block_bytes: K and V of a block on this rank.
        """
        gpu_budget = self.plan.config.gpu_budget
        policy = self.plan.policy
        share = policy.biased_share(self.plan.config)
        tables = PageTable.bytes_per_block(
            self.maps, self.geometry.group, gpu_budget, share, self.finder_keys
        )
        return tables + step_bytes_per_block(policy, block_bytes, self.geometry, gpu_budget)
