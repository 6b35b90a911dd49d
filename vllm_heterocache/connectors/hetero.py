"""The channel between scheduler and workers: compaction orders out, answers and stats back.

Installed by the plugin in vLLM's KV-connector slot. It transfers no KV between engines.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm_heterocache import metrics
from vllm_heterocache.compat import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm_heterocache.compat.engine import kv_cache_managers, watch_dead_blocks
from vllm_heterocache.compat.other_groups import (
    kept_state,
    limit_cached_tokens,
    other_group,
    retain_hits,
)
from vllm_heterocache.messages import CompactionAnswers, CompactionOrders
from vllm_heterocache.scheduler.kv_cache_manager import HeteroManager
from vllm_heterocache.startup.capacity import nothing_compacted, steady_state_line
from vllm_heterocache.startup.serving_plan import ServingPlan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm_heterocache.compat import Request, SchedulerOutput, VllmConfig
    from vllm_heterocache.compat.other_groups import OtherGroup
    from vllm_heterocache.worker.runtime import HeteroCacheRuntime

logger = logging.getLogger("vllm.heterocache")


class HeteroConnector(KVConnectorBase_V1, SupportsHMA):
    """One instance in the scheduler, one in each worker."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: Any = None,
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._config = vllm_config
        self._manager: HeteroManager | None = None
        self._groups: list[OtherGroup] = []  # beside the manager's
        self._runtime: HeteroCacheRuntime | None = None
        self._has_warned = False  # of streaming input
        self._last_snapshot: dict[str, Any] | None = None  # what was counted up to the last stats

    @property
    def requires_kv_delivery(self) -> bool:
        """No: vLLM would drop a preempted request's output that is still in flight."""
        return False

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """No: page tables and host pool do not follow a KV cache that goes and comes back."""
        return False

    # --- scheduler ---

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        manager, others = kv_cache_managers(kv_cache_manager, HeteroManager)
        self._manager = manager
        for other in others:
            limit_cached_tokens(other, manager.cacheable_tokens)
            retain_hits(other, manager.longest_hit)
        manager.ledger.world_size = self._config.parallel_config.world_size
        pool, max_model_len = manager.block_pool, self._config.model_config.max_model_len
        sections: Any = self._config.additional_config
        plan = ServingPlan.from_additional_config(sections)
        if plan.config.debug_poison:
            watch_dead_blocks(pool, manager.note_dead)
        self._groups = groups = [other_group(other, self._config) for other in others]
        block_size, num_blocks = manager.block_size, pool.num_gpu_blocks
        logger.info(steady_state_line(num_blocks, max_model_len, plan, groups, block_size))
        warning = nothing_compacted(max_model_len, plan, block_size)
        if warning is not None:
            logger.warning("%s", warning)

    def on_new_request(self, request: Request) -> None:
        if request.resumable:  # its prompt goes on growing while it decodes
            assert self._manager is not None
            self._manager.keep_dense(request.request_id)
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "HeteroCache: request %s takes streaming input and stays dense, as all such "
                    "requests will.",
                    request.request_id,
                )

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        assert self._manager is not None
        ledger = self._manager.ledger
        starts = ledger.take_starts(scheduler_output.num_scheduled_tokens)
        return CompactionOrders(ledger.take_orders(), starts, ledger.take_dead())

    def update_connector_output(self, connector_output: Any) -> None:
        answers = connector_output.kv_connector_worker_meta
        if answers is not None:
            assert self._manager is not None
            self._manager.ledger.record(answers.done, answers.refused)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """None; vLLM asks before the first chunk, and so learns where to keep states."""
        request.shared_prefix_boundary = kept_state(self._groups, request, num_computed_tokens)
        return 0, False

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        assert num_external_tokens == 0

    def request_finished(
        self, request: Request, block_ids: Any
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self._manager is not None
        self._manager.end_request(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: Any
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids)

    # --- worker ---

    def bind_runtime(self, runtime: HeteroCacheRuntime | None) -> None:
        """Called by the worker once the KV pool exists, and with None before the pool goes."""
        self._runtime, self._last_snapshot = runtime, None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing to load: retrieval works in the steps between."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to load."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing to save layer by layer: these calls are skipped under full CUDA graphs."""

    def wait_for_save(self) -> None:
        """Called once a step, after the forward pass was enqueued."""
        if self._runtime is not None:
            self._runtime.after_forward()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        if self._runtime is None:
            return None
        done, refused = self._runtime.take_answers()
        if not done and not refused:
            return None
        return CompactionAnswers(dict.fromkeys(done, 1), dict.fromkeys(refused, 1))

    # --- metrics ---

    def get_kv_connector_stats(self) -> metrics.HeteroCacheStats | None:
        if self.role == KVConnectorRole.WORKER:
            if self._runtime is None:
                return None
            snapshot = self._runtime.snapshot()
            counted = metrics.counted_since(snapshot, self._last_snapshot)
            self._last_snapshot = snapshot
            return metrics.HeteroCacheStats(data={f"rank{self._runtime.rank.index}": counted})
        if self._manager is None:
            return None
        manager, pool = self._manager, self._manager.block_pool
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        num_dense = (used - len(manager.compact_blocks)) * manager.kv_cache_spec.kernel_blocks
        snapshot = metrics.scheduler_snapshot(num_dense, manager.ledger.tickets)
        return metrics.HeteroCacheStats(data={metrics.SCHEDULER: snapshot})

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> metrics.HeteroCacheStats:
        return metrics.HeteroCacheStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> metrics.HeteroCachePromMetrics:
        return metrics.HeteroCachePromMetrics(
            vllm_config, metric_types, labelnames, per_engine_labelvalues
        )

    def take_events(self) -> Iterable:
        return ()
