"""The channel between scheduler and workers: compaction orders out, answers and stats back.

Installed by the plugin in vLLM's KV-connector slot. It transfers no KV between engines.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_heterocache import metrics
from vllm_heterocache.compat import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.messages import CompactionAnswers, CompactionOrders
from vllm_heterocache.scheduler.ledger import CompactionLedger, ledger_of, watch_freed_blocks
from vllm_heterocache.startup.capacity import steady_state_line

if TYPE_CHECKING:
    from vllm_heterocache.worker.runtime import HeteroCacheRuntime

logger = init_logger("vllm.heterocache")


class HeteroConnector(KVConnectorBase_V1, SupportsHMA):
    """One instance in the scheduler, one in each worker."""

    def __init__(self, vllm_config, role: KVConnectorRole, kv_cache_config=None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._config = vllm_config
        self._block_pool: Any = None
        self._ledger: CompactionLedger | None = None
        self._runtime: HeteroCacheRuntime | None = None

    @property
    def requires_kv_delivery(self) -> bool:
        """No: vLLM would drop a preempted request's output that is still in flight."""
        return False

    # --- scheduler ---

    def bind_gpu_block_pool(self, gpu_block_pool) -> None:
        self._block_pool = gpu_block_pool
        self._ledger = ledger_of(gpu_block_pool)
        self._ledger.world_size = self._config.parallel_config.world_size
        options = HeteroCacheConfig.from_additional_config(self._config.additional_config)
        if options.debug_poison:
            watch_freed_blocks(gpu_block_pool)
        max_model_len = self._config.model_config.max_model_len
        logger.info(steady_state_line(gpu_block_pool.num_gpu_blocks, max_model_len, options))

    def on_new_request(self, request) -> None:
        if request.resumable:  # its prompt goes on growing while it decodes
            assert self._ledger is not None
            self._ledger.kept_dense.add(request.request_id)
            logger.warning(
                "HeteroCache: request %s takes streaming input and stays dense.",
                request.request_id,
            )

    def build_connector_meta(self, scheduler_output) -> KVConnectorMetadata:
        assert self._ledger is not None
        ledger = self._ledger
        return CompactionOrders(ledger.take_orders(), ledger.take_starts(), ledger.take_freed())

    def update_connector_output(self, connector_output) -> None:
        answers = connector_output.kv_connector_worker_meta
        if answers is not None:
            assert self._ledger is not None
            self._ledger.record(answers.done, answers.refused)

    def get_num_new_matched_tokens(self, request, num_computed_tokens) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request, blocks, num_external_tokens) -> None:
        assert num_external_tokens == 0

    def request_finished(self, request, block_ids) -> tuple[bool, dict[str, Any] | None]:
        assert self._ledger is not None
        self._ledger.kept_dense.discard(request.request_id)
        return False, None

    def request_finished_all_groups(self, request, block_ids) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids)

    # --- worker ---

    def bind_runtime(self, runtime: HeteroCacheRuntime) -> None:
        """Called by the worker once the KV pool exists."""
        self._runtime = runtime

    def start_load_kv(self, forward_context, **kwargs: Any) -> None:
        """Nothing to load: retrieval works in the steps between."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to load."""

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs: Any) -> None:
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
            return metrics.HeteroCacheStats(
                data={f"rank{self._runtime.rank}": self._runtime.snapshot()}
            )
        if self._ledger is None:
            return None
        pool, ledger = self._block_pool, self._ledger
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        snapshot = metrics.scheduler_snapshot(used - ledger.compact_blocks, ledger.tickets)
        return metrics.HeteroCacheStats(data={metrics.SCHEDULER: snapshot})

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None):
        return metrics.HeteroCacheStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        return metrics.HeteroCachePromMetrics(
            vllm_config, metric_types, labelnames, per_engine_labelvalues
        )

    def take_events(self) -> Iterable:
        return ()
