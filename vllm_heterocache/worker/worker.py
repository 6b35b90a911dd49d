"""Worker side: vLLM's worker with the HeteroCache runtime around each step."""

from __future__ import annotations

import logging
from abc import abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm_heterocache import compat
from vllm_heterocache.calibration.probe import AttentionProbe
from vllm_heterocache.compat.drafters import is_first_group_drafted_from
from vllm_heterocache.compat.engine import (
    as_elements,
    attention_layers,
    decode_batch_limits,
    kernel_block_bytes,
    kv_heads_of_rank,
    layer_scales,
    left_request_ids,
    own_connector,
    own_metadata,
    pack_kv_cache,
    packed_pool,
    query_rotations,
    rank_of,
    replace_kv_cache_spec,
    request_ids_reader,
)
from vllm_heterocache.compat.layer_kinds import served_layers
from vllm_heterocache.compat.nixl import begins_receiving
from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.kv_cache_spec import DrafterSpec, HeteroSpec, drafter_specs
from vllm_heterocache.startup.capacity import host_pool_blocks
from vllm_heterocache.startup.host_memory import available_host_bytes
from vllm_heterocache.startup.layers import (
    check_drafter_layers,
    check_layer_ids,
    check_layers,
    check_recurrent_layers,
    check_sliding_layers,
)
from vllm_heterocache.startup.serving_plan import ServingPlan
from vllm_heterocache.worker.assemble import assemble_runtime
from vllm_heterocache.worker.loaded_layers import geometry_of, hetero_spec, sink_logits
from vllm_heterocache.worker.observe.moved_queries import query_mover
from vllm_heterocache.worker.observe.prompt_observer import window_places
from vllm_heterocache.worker.observe.reference_queries import UNMOVED_POSITIONS
from vllm_heterocache.worker.rank import Rank
from vllm_heterocache.worker.runtime import LARGE_BYTE
from vllm_heterocache.worker.tables.head_maps import head_maps

logger = logging.getLogger("vllm.heterocache")

ROTATIONS_UNKNOWN = (
    "HeteroCache: this model's layers do not say how they rotate queries (RoPE), so that matched "
    f"tokens are fitted to the queries of the last {UNMOVED_POSITIONS} prompt tokens alone."
)

if TYPE_CHECKING:
    import torch

    from vllm_heterocache.compat import KVCacheConfig, SchedulerOutput, WorkerBase
    from vllm_heterocache.kernels.tables import HeadMaps
    from vllm_heterocache.worker.host.host_pool import HostPool
    from vllm_heterocache.worker.host.swap import SwapManager
    from vllm_heterocache.worker.observe.moved_queries import MoveQueries
    from vllm_heterocache.worker.ops.interface import Geometry, Memory, Ops
    from vllm_heterocache.worker.runtime import HeteroCacheRuntime
else:
    WorkerBase = object


class HeteroCacheWorkerMixin(WorkerBase):
    """What the plugin adds to a vLLM worker class; mixed in before it."""

    device: torch.device  # once vLLM has initialized it
    heterocache_rank: Rank  # once the model is loaded
    heterocache: HeteroCacheRuntime | None = None  # while there is a KV pool
    _shares_pool: bool  # whether vLLM serves other layers in blocks of the same pool

    # What differs between platforms.

    @abstractmethod
    def make_ops(self, geometry: Geometry, memory: Memory) -> Ops:
        """The operations over this worker's memory."""

    @abstractmethod
    def make_swap(self, pool: torch.Tensor, host: HostPool, maps: HeadMaps) -> SwapManager:
        """What moves pages between the pool and the host."""

    @abstractmethod
    def finish_device_work(self) -> None:
        """Wait until everything that the device was given is done."""

    # vLLM's worker interface.

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        runner: Any = self.model_runner
        layers, sliding, recurrent, of_drafter = attention_layers(
            self.vllm_config, runner.get_model()
        )
        check_sliding_layers(sliding, self.vllm_config)
        check_recurrent_layers(recurrent, self.model_config)
        check_drafter_layers(of_drafter, self.vllm_config)
        self._layers = list(layers.values())
        self._layer_names = list(layers)
        sections: Any = self.vllm_config.additional_config
        plan = ServingPlan.from_additional_config(sections)
        self.heterocache_rank = self._make_rank(plan)
        self._request_ids = request_ids_reader(self.model_runner)
        for index, layer in enumerate(self._layers):
            layer.impl.layer_index = index
            replace_kv_cache_spec(
                layer, lambda stock, _: hetero_spec(stock, plan, bool(of_drafter))
            )
        self._shares_pool = bool(sliding or recurrent or of_drafter)
        if of_drafter:
            self._give_drafter_blocks(layers, of_drafter)

    def _give_drafter_blocks(self, layers: dict[str, Any], of_drafter: dict[str, Any]) -> None:
        """Raises ValueError where a block of the pool has no room for the drafter's layers."""
        get_stock = {name: layer.get_kv_cache_spec for name, layer in of_drafter.items()}

        def make_specs(vllm_config: Any) -> dict[str, DrafterSpec]:
            """Anew each time: vLLM chooses the size of blocks once the model is loaded."""
            stock = {name: get_spec(vllm_config) for name, get_spec in get_stock.items()}
            target = {name: one.get_kv_cache_spec(vllm_config) for name, one in layers.items()}
            return drafter_specs(stock, target)

        def make_spec(layer_name: str, _: Any, vllm_config: Any) -> DrafterSpec:
            return make_specs(vllm_config)[layer_name]

        make_specs(self.vllm_config)  # what has no room is refused before vLLM profiles
        for name, layer in of_drafter.items():
            replace_kv_cache_spec(layer, partial(make_spec, name))

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """vLLM makes a KV-cache group of each kind of spec, in the order of these."""
        specs = super().get_kv_cache_spec()
        if not is_first_group_drafted_from(self.vllm_config):
            return specs
        drafter = {name: spec for name, spec in specs.items() if isinstance(spec, DrafterSpec)}
        return {**drafter, **specs}

    def _make_rank(self, plan: ServingPlan) -> Rank:
        """Raises ValueError unless the layers of the plan are served here, with its heads."""
        model: Any = self.model_config  # its dtype is a torch.dtype by now
        parallel = self.parallel_config
        pp_rank, tp_rank = rank_of(parallel)
        tp_size = parallel.tensor_parallel_size
        assignment = plan.assignment(pp_rank, tp_rank, tp_size)
        layers = dict(zip(self._layer_names, self._layers, strict=True))
        group = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
        layer_ids = [compat.extract_layer_index(name) for name in self._layer_names]
        check_layer_ids(layer_ids, served_layers(model))
        check_layers(layers, assignment.roles.shape, group, model.get_head_size())
        max_rows, max_queries = decode_batch_limits(self.vllm_config)
        window = window_places(plan.policy, max_queries)
        return Rank(
            plan,
            assignment,
            head_maps(assignment, self.device),
            geometry_of(self._layers, max_rows, max_queries, window, model.dtype),
            layer_ids,
            kv_heads_of_rank(model.get_total_num_kv_heads(), tp_size, tp_rank),
            model.get_total_num_hidden_layers(),
            self.rank,
            self.scheduler_config.max_num_seqs,
            self.vllm_config.max_concurrent_batches,
        )

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        packed = pack_kv_cache(kv_cache_config, self._layer_names)
        super().initialize_from_config(packed)  # type: ignore[misc]  # WorkerBase lacks it
        first = self._layers[0]
        pool = as_elements(packed_pool(first.kv_cache), first.kv_cache_dtype)
        kernel_blocks = pool.unflatten(0, (-1, len(self._layers), first.num_kv_heads))
        num_kernel_blocks = len(kernel_blocks)
        runtime = assemble_runtime(
            self.heterocache_rank,
            pool,
            num_kernel_blocks,
            self._host_blocks(num_kernel_blocks, pool[0].nbytes),
            self.make_ops,
            self.make_swap,
            self._request_ids,
            layer_scales(self._layers, self.device),
            self._move_queries(),
            sink_logits(self._layers),
        )
        if self._shares_pool:
            runtime.poison_byte = LARGE_BYTE
        self._bind(runtime, kernel_blocks)
        logger.info("%s", pools_line(runtime, self.model_config.max_model_len))

    def _move_queries(self) -> MoveQueries | None:
        """What moves reference queries behind their prompt, if there are such."""
        if not self.heterocache_rank.plan.config.share_of_matched:
            return None
        rotations = query_rotations(self.get_model(), self._layer_names)
        if rotations is None:
            logger.warning("%s", ROTATIONS_UNKNOWN)
            return None
        return query_mover(rotations)

    def _host_blocks(self, num_blocks: int, page_bytes: int) -> int:
        plan = self.heterocache_rank.plan
        return host_pool_blocks(
            plan.config,
            self.heterocache_rank.assignment,
            # The led heads of as many prompts as the GPU pool holds when all are compacted.
            wanted_blocks=int(num_blocks / plan.config.gpu_budget),
            page_bytes=page_bytes,
            available_bytes=available_host_bytes() // plan.workers_per_host,
        )

    def _bind(
        self, runtime: HeteroCacheRuntime | None, kernel_blocks: torch.Tensor | None = None
    ) -> None:
        """Hand the runtime to all that need it; None takes it back, and the pools with it (vLLM
        keeps layers and connector in globals).

        Args:
            kernel_blocks: [num_kernel_blocks, L, H, PAGE_SIZE, 2 * head_dim], the pool.
        """
        self.heterocache = runtime
        for index, layer in enumerate(self._layers):
            layer.impl.runtime = runtime
            layer.impl.kernel_blocks = None if kernel_blocks is None else kernel_blocks[:, index]
        connector: Any = compat.get_kv_transfer_group()
        own_connector(connector).bind_runtime(runtime)

    def kernel_block_bytes(self) -> int:
        """Bytes of a kernel block of the KV pool: a page of every layer and KV head that is served
        here. A block of other groups fits in a block."""
        specs = self.get_kv_cache_spec().values()
        return kernel_block_bytes(spec for spec in specs if isinstance(spec, HeteroSpec))

    def table_bytes_per_block(self) -> int:
        """Memory beside the KV pool that each of its kernel blocks needs."""
        block_bytes = self.kernel_block_bytes()
        return self.heterocache_rank.table_bytes_per_block(block_bytes)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        of_all = scheduler_output.kv_connector_metadata
        metadata: Any = own_metadata(of_all)
        if metadata is not None:  # else vLLM warms up, with requests of its own
            gone = left_request_ids(scheduler_output)
            self._runtime.begin_step(gone, metadata.starts, metadata.orders, metadata.poison)
            if begins_receiving(of_all):
                # Blocks arrive in no order with the device's work. What former owners of these
                # blocks left under way ends before.
                self.finish_device_work()
        return super().execute_model(scheduler_output)

    def shutdown(self) -> None:
        try:
            if self.heterocache is not None:
                self.heterocache.swap.close()
                self._bind(None)
        finally:
            super().shutdown()

    @property
    def _runtime(self) -> HeteroCacheRuntime:
        assert self.heterocache is not None, "there is no KV pool"
        return self.heterocache

    # Called by name through collective_rpc.

    def heterocache_start_probe(self, spec: dict[str, Any]) -> None:
        """Collect attention rows of the next prefill (calibration)."""
        rank = self.heterocache_rank
        self._runtime.probe = AttentionProbe(
            spec,
            rank.layer_ids,
            rank.kv_head_ids,
            rank.geometry.num_q_heads,
            rank.geometry.scale,
            self._runtime.ops.memory.sink_logits,
            rank.geometry.soft_cap,
        )

    def heterocache_finish_probe(self, path_prefix: str) -> None:
        """Write what the probe collected to `{path_prefix}.rank{rank}.npz`."""
        probe, self._runtime.probe = self._runtime.probe, None
        assert probe is not None, "no probe was started"
        probe.save(f"{path_prefix}.rank{self.rank}.npz")

    def heterocache_set_drift(self, drift_threshold: float) -> None:
        """Change the threshold of a running engine; prompts compacted so far keep what they have
        (benchmarks).

        Raises ValueError where there is no host pool to fetch from. A rank none of whose heads
        is led needs none.
        """
        if drift_threshold > 0 and not self.heterocache_rank.plan.config.watches_drift:
            raise ValueError("the engine was started with drift_threshold=0: it has no host pool.")
        retriever = self._runtime.retriever
        retriever.rule = retriever.rule._replace(threshold=drift_threshold)

    def heterocache_block_bytes(self) -> tuple[int, int]:
        """Bytes of one kernel block on this worker: (its KV, the plugin's tables for it)."""
        pool, num_blocks = self._runtime.ops.memory.pool, self._runtime.num_blocks
        return pool.nbytes // num_blocks, self.table_bytes_per_block()

    def heterocache_head_roles(self) -> tuple[list[int], list[int], list[list[int]]]:
        """Global layers and KV heads of this worker, and their roles (HeadRole) [L, H]."""
        rank = self.heterocache_rank
        return list(rank.layer_ids), list(rank.kv_head_ids), rank.assignment.roles.tolist()

    def heterocache_check_integrity(self) -> None:
        """Raise AssertionError unless every page is accounted for."""
        self._runtime.check_integrity()


def pools_line(runtime: HeteroCacheRuntime, max_model_len: int) -> str:
    """The start-up line of a worker: both pools, and how many requests have host pages at once."""
    host = runtime.host_pool
    line = (
        f"HeteroCache: {runtime.num_blocks:,} KV blocks of {runtime.table.pages_per_block} pages, "
        f"host pool of {host.num_blocks:,} blocks of {host.num_satellites} pages "
        f"({host.pages.nbytes / 2**30:.2f} GiB)."
    )
    if not host.num_blocks:
        return line
    requests = host.num_blocks // max(1, max_model_len // PAGE_SIZE)
    return (
        f"{line} It has room for {requests:,} requests of {max_model_len:,} tokens at once; "
        "further ones are compacted without retrieval."
    )
