"""Worker side: vLLM's worker with the HeteroCache runtime around each step."""

from __future__ import annotations

from dataclasses import fields

import psutil
from vllm.logger import init_logger

from vllm_heterocache import compat
from vllm_heterocache.attention_probe import AttentionProbe
from vllm_heterocache.block_manager import HeteroSpec
from vllm_heterocache.compat import CPUWorker, FullAttentionSpec
from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.host_pool_size import host_pool_pages, num_satellites
from vllm_heterocache.plan import rank_assignment
from vllm_heterocache.runtime import HeteroCacheRuntime, LayerGroup

logger = init_logger("vllm.heterocache")


class HeteroCacheWorkerMixin:
    """What the plugin adds to a vLLM worker class; mixed in before it."""

    heterocache: HeteroCacheRuntime

    def load_model(self, *args, **kwargs) -> None:
        super().load_model(*args, **kwargs)
        config = HeteroCacheConfig.from_additional_config(self.vllm_config.additional_config)
        layers = compat.attention_layers(self.vllm_config)
        first = next(iter(layers.values()))
        group = LayerGroup(
            layer_names=list(layers),
            layer_ids=[compat.extract_layer_index(name) for name in layers],
            num_q_heads=first.num_heads,
            num_kv_heads=first.num_kv_heads,
            head_dim=first.head_size,
            scale=first.impl.scale,
            dtype=first.kv_cache_torch_dtype,
            device=self.device,
        )
        self._kv_head_ids = compat.kv_heads_of_rank(
            self.model_config.get_total_num_kv_heads(),
            self.parallel_config.tensor_parallel_size,
            compat.get_tensor_model_parallel_rank(),
        )
        self.heterocache = HeteroCacheRuntime(
            config,
            rank_assignment(config, group.layer_ids, self._kv_head_ids),
            group,
            self.rank,
            self.scheduler_config.max_num_seqs,
            lambda num_reqs: compat.batch_request_ids(self.model_runner, num_reqs),
        )
        for index, layer in enumerate(layers.values()):
            layer.impl.runtime, layer.impl.layer_index = self.heterocache, index
            layer.get_kv_cache_spec = _hetero_spec(layer.get_kv_cache_spec, config)

    def initialize_from_config(self, kv_cache_config) -> None:
        runtime = self.heterocache
        names = runtime.group.layer_names
        super().initialize_from_config(compat.pack_kv_cache(kv_cache_config, names))
        context = self.vllm_config.compilation_config.static_forward_context
        kv_caches = [context[name].kv_cache for name in names]
        pool = compat.packed_pool(kv_caches[0])
        # The satellites of as many prompts as the GPU pool holds when all are compacted.
        steady_blocks = int(kv_cache_config.num_blocks / runtime.config.gpu_budget)
        host_pages = host_pool_pages(
            runtime.config,
            runtime.assignment,
            wanted_pages=num_satellites(runtime.assignment) * steady_blocks,
            page_bytes=pool[0].nbytes,
            available_bytes=psutil.virtual_memory().available,
        )
        runtime.bind_pool(pool, kv_caches, host_pages)
        compat.get_kv_transfer_group().bind_runtime(runtime)
        logger.info(
            "HeteroCache: %d KV blocks of %d pages, host pool of %d pages (%.2f GiB).",
            kv_cache_config.num_blocks,
            runtime.assignment.num_heads,
            host_pages,
            runtime.host_pool.pages.nbytes / 2**30,
        )

    def execute_model(self, scheduler_output):
        gone = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        metadata = scheduler_output.kv_connector_metadata
        self.heterocache.begin_step(gone, [] if metadata is None else metadata.orders)
        return super().execute_model(scheduler_output)

    # Called by name through collective_rpc.

    def heterocache_start_probe(self, spec: dict) -> None:
        """Collect attention rows of the next prefill (calibration)."""
        group = self.heterocache.group
        self.heterocache.probe = AttentionProbe(
            spec, group.layer_ids, self._kv_head_ids, group.num_q_heads, group.scale
        )

    def heterocache_finish_probe(self, path_prefix: str) -> None:
        """Write what the probe collected to `{path_prefix}.rank{rank}.npz`."""
        probe, self.heterocache.probe = self.heterocache.probe, None
        probe.save(f"{path_prefix}.rank{self.rank}.npz")

    def heterocache_check_integrity(self) -> None:
        """Raise AssertionError unless every page is accounted for."""
        self.heterocache.check_integrity()


class HeteroCacheCPUWorker(HeteroCacheWorkerMixin, CPUWorker):
    """The worker of vLLM's CPU platform."""


def _hetero_spec(get_stock_spec, config: HeteroCacheConfig):
    """A layer's `get_kv_cache_spec` that turns its stock spec into a HeteroSpec."""

    def get_kv_cache_spec(vllm_config) -> HeteroSpec:
        stock = get_stock_spec(vllm_config)
        assert type(stock) is FullAttentionSpec
        values = {f.name: getattr(stock, f.name) for f in fields(stock)}
        return HeteroSpec(
            **values,
            gpu_budget=config.gpu_budget,
            compact_min_tokens=config.compact_min_tokens,
        )

    return get_kv_cache_spec
