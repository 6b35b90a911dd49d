"""Worker side: vLLM's worker with the HeteroCache runtime around each step."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import fields

import psutil
import torch
from vllm.logger import init_logger

from vllm_heterocache import compat
from vllm_heterocache.calibration.probe import AttentionProbe
from vllm_heterocache.compat import FullAttentionSpec
from vllm_heterocache.compat.engine import (
    attention_layers,
    kv_block_bytes,
    kv_heads_of_rank,
    left_request_ids,
    max_decode_rows,
    pack_kv_cache,
    packed_pool,
    request_ids_reader,
)
from vllm_heterocache.config import PAGE_SIZE, HeteroCacheConfig
from vllm_heterocache.kernels.tables import HeadMaps, drift_counters
from vllm_heterocache.kv_cache_spec import HeteroSpec
from vllm_heterocache.policies.policy import Shard
from vllm_heterocache.startup.host_pool_size import host_pool_blocks
from vllm_heterocache.startup.serving_plan import rank_assignment, recomputed_tokens, serving_policy
from vllm_heterocache.worker.host.host_pool import CpuPool
from vllm_heterocache.worker.host.swap import SwapManager
from vllm_heterocache.worker.ops.interface import Geometry, Memory, Ops
from vllm_heterocache.worker.runtime import HeteroCacheRuntime
from vllm_heterocache.worker.step_selection import step_bytes_per_block, step_tables
from vllm_heterocache.worker.tables.head_maps import head_maps
from vllm_heterocache.worker.tables.page_table import PageTable

logger = init_logger("vllm.heterocache")

# Most prompts whose last queries are kept at a time, and the memory for them.
MAX_QUERY_WINDOWS = 64
MAX_QUERY_BYTES = 128 << 20


class HeteroCacheWorkerMixin:
    """What the plugin adds to a vLLM worker class; mixed in before it."""

    heterocache: HeteroCacheRuntime

    # What differs between platforms.

    @abstractmethod
    def make_ops(self, geometry: Geometry, memory: Memory) -> Ops:
        """The operations over this worker's memory."""

    @abstractmethod
    def make_swap(self, pool: torch.Tensor, host: CpuPool, maps: HeadMaps) -> SwapManager:
        """What moves pages between the pool and the host."""

    # vLLM's worker interface.

    def load_model(self, *args, **kwargs) -> None:
        super().load_model(*args, **kwargs)
        config = HeteroCacheConfig.from_additional_config(self.vllm_config.additional_config)
        layers = attention_layers(self.vllm_config)
        layer_ids = [compat.extract_layer_index(name) for name in layers]
        self._kv_head_ids = kv_heads_of_rank(
            self.model_config.get_total_num_kv_heads(),
            self.parallel_config.tensor_parallel_size,
            compat.get_tensor_model_parallel_rank(),
        )
        self._layer_names = list(layers)
        num_layers = self.model_config.get_total_num_hidden_layers()
        shard = Shard(layer_ids, self._kv_head_ids, num_layers)
        window = max(1, serving_policy(config).observed_queries)
        max_rows = max_decode_rows(self.vllm_config)
        self.heterocache = HeteroCacheRuntime(
            config,
            rank_assignment(config, shard),
            _geometry(layers, max_rows, window, self.model_config.dtype.itemsize),
            layer_ids,
            num_layers,
            self.rank,
            self.vllm_config.max_concurrent_batches,
            request_ids_reader(self.model_runner),
            self.parallel_config.pipeline_parallel_size,
        )
        self._maps = head_maps(self.heterocache.assignment, self.device)
        leads = (self._maps.pivot_of_head >= 0).any(dim=1).tolist()
        for index, layer in enumerate(layers.values()):
            layer.impl.runtime, layer.impl.layer_index = self.heterocache, index
            layer.impl.leads = leads[index]
            layer.get_kv_cache_spec = _hetero_spec(layer.get_kv_cache_spec, config)

    def initialize_from_config(self, kv_cache_config) -> None:
        names = self._layer_names
        super().initialize_from_config(pack_kv_cache(kv_cache_config, names))
        context = self.vllm_config.compilation_config.static_forward_context
        pool = packed_pool(context[names[0]].kv_cache)
        self._bind_pool(pool, kv_cache_config.num_blocks)
        compat.get_kv_transfer_group().bind_runtime(self.heterocache)

    def _bind_pool(self, pool: torch.Tensor, num_blocks: int) -> None:
        runtime, maps = self.heterocache, self._maps
        geometry, config = runtime.geometry, runtime.config
        num_satellites = maps.satellite_heads.numel()
        host_blocks = host_pool_blocks(
            config,
            runtime.assignment,
            # The satellites of as many prompts as the GPU pool holds when all are compacted.
            wanted_blocks=int(num_blocks / config.gpu_budget),
            page_bytes=pool[0].nbytes,
            available_bytes=psutil.virtual_memory().available // config.workers_per_host,
        )
        table = PageTable(
            self.scheduler_config.max_num_seqs,
            num_blocks,
            maps,
            geometry.group,
            config.gpu_budget,
            pool.device,
            has_means=config.keeps_means,
        )
        num_queries = geometry.num_query_windows * geometry.window
        memory = Memory(
            pool,
            table.tensors,
            maps,
            counters=drift_counters(pool.device),
            last_queries=pool.new_zeros(num_queries, *geometry.query_shape),
            step=step_tables(runtime.policy, pool, num_blocks, geometry, config.gpu_budget),
        )
        host = CpuPool(host_blocks, num_satellites, PAGE_SIZE, geometry.head_dim, pool.dtype)
        swap = self.make_swap(pool, host, maps)
        runtime.bind_pool(num_blocks, table, self.make_ops(geometry, memory), host, swap)
        logger.info(
            "HeteroCache: %d KV blocks of %d pages, host pool of %d blocks of %d pages (%.2f GiB).",
            num_blocks,
            table.pages_per_block,
            host_blocks,
            num_satellites,
            host.pages.nbytes / 2**30,
        )

    def table_bytes_per_block(self) -> int:
        """Memory beside the KV pool that each of its blocks needs: page tables and summaries."""
        runtime = self.heterocache
        geometry, gpu_budget = runtime.geometry, runtime.config.gpu_budget
        block_bytes = kv_block_bytes(self.get_kv_cache_spec())
        tables = PageTable.bytes_per_block(self._maps, geometry.group, gpu_budget)
        return tables + step_bytes_per_block(runtime.policy, block_bytes, geometry, gpu_budget)

    def execute_model(self, scheduler_output):
        gone = left_request_ids(scheduler_output)
        metadata = scheduler_output.kv_connector_metadata
        if metadata is None:
            self.heterocache.begin_step(gone)
        else:
            self.heterocache.begin_step(gone, metadata.starts, metadata.orders, metadata.poison)
        return super().execute_model(scheduler_output)

    def shutdown(self) -> None:
        try:
            self.heterocache.close()
        finally:
            super().shutdown()

    # Called by name through collective_rpc.

    def heterocache_start_probe(self, spec: dict) -> None:
        """Collect attention rows of the next prefill (calibration)."""
        runtime = self.heterocache
        self.heterocache.probe = AttentionProbe(
            spec,
            runtime.layer_ids,
            self._kv_head_ids,
            runtime.geometry.num_q_heads,
            runtime.geometry.scale,
        )

    def heterocache_finish_probe(self, path_prefix: str) -> None:
        """Write what the probe collected to `{path_prefix}.rank{rank}.npz`."""
        probe, self.heterocache.probe = self.heterocache.probe, None
        probe.save(f"{path_prefix}.rank{self.rank}.npz")

    def heterocache_set_drift(self, drift_threshold: float) -> None:
        """Change the threshold of a running engine; prompts compacted so far keep what they have
        (benchmarks).

        Raises ValueError where there is no host pool to fetch from. A rank none of whose heads
        is a satellite needs none.
        """
        if drift_threshold > 0 and not self.heterocache.config.watches_drift:
            raise ValueError("the engine was started with drift_threshold=0: it has no host pool.")
        retriever = self.heterocache.retriever
        retriever.rule = retriever.rule._replace(threshold=drift_threshold)

    def heterocache_block_bytes(self) -> tuple[int, int]:
        """Bytes of one block on this worker: (its KV, the plugin's tables for it)."""
        pool, num_blocks = self.heterocache.ops.memory.pool, self.heterocache.num_blocks
        return pool.nbytes // num_blocks, self.table_bytes_per_block()

    def heterocache_head_roles(self) -> tuple[list[int], list[int], list[list[int]]]:
        """Global layers and KV heads of this worker, and their roles (HeadRole) [L, H]."""
        roles = self.heterocache.assignment.roles.tolist()
        return list(self.heterocache.layer_ids), list(self._kv_head_ids), roles

    def heterocache_check_integrity(self) -> None:
        """Raise AssertionError unless every page is accounted for."""
        self.heterocache.check_integrity()


def _geometry(layers: dict, max_rows: int, window: int, itemsize: int) -> Geometry:
    """Of this rank; `itemsize` is the bytes of one element of a query."""
    first = next(iter(layers.values()))
    query_bytes = len(layers) * first.num_heads * first.head_size * itemsize
    return Geometry(
        num_layers=len(layers),
        num_q_heads=first.num_heads,
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_size,
        scale=first.impl.scale,
        max_rows=max_rows,
        num_query_windows=num_query_windows(max_rows, window * query_bytes),
        window=window,
    )


def num_query_windows(max_rows: int, window_bytes: int) -> int:
    """Prompts whose last queries are kept at a time, at `window_bytes` each."""
    return max(1, min(max_rows, MAX_QUERY_WINDOWS, MAX_QUERY_BYTES // window_bytes))


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
            recomputed_tokens=recomputed_tokens(config, vllm_config.model_config.max_model_len),
            frees_prompt=serving_policy(config).frees_prompt,
        )

    return get_kv_cache_spec
