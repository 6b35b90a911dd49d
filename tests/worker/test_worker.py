"""A worker between loading its model and shutting down: before, with and after a KV pool."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from world import World, mixed_assignment

from vllm_heterocache import compat
from vllm_heterocache.attention.backend import HeteroCacheImpl
from vllm_heterocache.attention.metadata import HeteroCacheMetadata, HeteroCacheMetadataBuilder
from vllm_heterocache.compat import (
    CommonAttentionMetadata,
    EngineArgs,
    FullAttentionSpec,
    KVConnectorRole,
)
from vllm_heterocache.connectors.hetero import HeteroConnector
from vllm_heterocache.kv_cache_spec import DrafterSpec, HeteroSpec
from vllm_heterocache.messages import CompactionOrders
from vllm_heterocache.startup.serving_plan import ServingPlan
from vllm_heterocache.worker import worker as worker_module
from vllm_heterocache.worker.worker import HeteroCacheWorkerMixin

pytestmark = pytest.mark.cpu_worker

NAMES = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]
BLOCKS, HEADS, GROUP, DIM, PAGE = 12, 2, 2, 16, 16
OPTIONS = {"policy": "snapkv", "policy_options": {"window": 24}, "gpu_budget": 0.5}


@pytest.fixture(scope="module")
def vllm_config(tiny_model):
    return EngineArgs(
        model=tiny_model,
        skip_tokenizer_init=True,
        load_format="dummy",
        max_model_len=512,
        max_num_seqs=4,
        attention_backend="heterocache",
        additional_config={"heterocache": OPTIONS},
    ).create_engine_config()


def make_layer(block_size: int = PAGE) -> SimpleNamespace:
    """An attention module, as far as the worker looks at it."""
    stock = FullAttentionSpec(
        block_size=block_size, num_kv_heads=HEADS, head_size=DIM, dtype=torch.bfloat16
    )
    return SimpleNamespace(
        impl=HeteroCacheImpl(HEADS * GROUP, DIM, DIM**-0.5, HEADS, None, None, "auto"),
        kv_cache_dtype="auto",
        num_heads=HEADS * GROUP,
        num_kv_heads=HEADS,
        head_size=DIM,
        head_size_v=DIM,
        get_kv_cache_spec=lambda vllm_config: stock,
    )


class StockWorker:
    """What the mixin needs of vLLM's worker."""

    def __init__(self, vllm_config, layers: dict[str, SimpleNamespace]) -> None:
        self.vllm_config, self.layers = vllm_config, layers
        self.model_config = vllm_config.model_config
        self.parallel_config = vllm_config.parallel_config
        self.scheduler_config = vllm_config.scheduler_config
        self.device, self.rank = torch.device("cpu"), 0
        self.model_runner = SimpleNamespace(
            input_batch=SimpleNamespace(req_ids=[]), get_model=lambda: None
        )
        self.is_shut_down = False
        self.waited_for = []  # what was begun of a step when the worker waited for the device

    def load_model(self) -> None:
        """The layers are there already."""

    def get_kv_cache_spec(self) -> dict[str, HeteroSpec]:
        return {
            name: layer.get_kv_cache_spec(self.vllm_config) for name, layer in self.layers.items()
        }

    def initialize_from_config(self, kv_cache_config) -> None:
        first = next(iter(self.layers.values()))
        block_size = first.get_kv_cache_spec(self.vllm_config).block_size
        shape = (kv_cache_config.num_blocks, len(self.layers), HEADS, block_size, 2 * DIM)
        is_fp8 = first.kv_cache_dtype.startswith("fp8")
        pool = torch.zeros(shape, dtype=torch.uint8 if is_fp8 else torch.bfloat16)
        for index, layer in enumerate(self.layers.values()):
            layer.kv_cache = pool[:, index]

    def execute_model(self, scheduler_output) -> torch.Tensor:
        """Build metadata as a runner does; table slots of its two decode rows."""
        metadata = make_builder(self).build(0, two_decodes())
        return metadata.decodes.row_to_table_slot

    def shutdown(self) -> None:
        self.is_shut_down = True
        for layer in self.layers.values():
            layer.kv_cache = None


def cpu_worker() -> type:
    """Imported when it is needed: vLLM's CPU worker takes CUDA's streams from torch."""
    from vllm_heterocache.worker.cpu_worker import HeteroCacheCPUWorker

    return HeteroCacheCPUWorker


class Worker(HeteroCacheWorkerMixin, StockWorker):
    def make_ops(self, *args):
        return cpu_worker().make_ops(self, *args)

    def make_swap(self, *args):
        return cpu_worker().make_swap(self, *args)

    def finish_device_work(self):
        self.waited_for.append(self.heterocache._step)


@pytest.fixture
def connector(vllm_config) -> HeteroConnector:
    return HeteroConnector(vllm_config, KVConnectorRole.WORKER)


@pytest.fixture
def worker(vllm_config, connector, monkeypatch) -> Worker:
    """With its model loaded; vLLM's layers and connector are in reach of nobody else."""
    layers = {name: make_layer() for name in NAMES}
    monkeypatch.setattr(compat, "get_kv_transfer_group", lambda: connector)
    found = layers, {}, {}, {}
    monkeypatch.setattr(worker_module, "attention_layers", lambda config, model: found)
    monkeypatch.setattr(worker_module, "rank_of", lambda parallel_config: (0, 0))
    monkeypatch.setattr(worker_module, "pack_kv_cache", lambda config, names: config)
    worker = Worker(vllm_config, layers)
    worker.load_model()
    return worker


def test_a_model_with_another_attention_in_a_layer_is_not_loaded(worker):
    foreign = worker.layers[NAMES[1]]
    foreign.impl = SimpleNamespace()
    with pytest.raises(ValueError, match=f"layer {NAMES[1]} brings its own attention"):
        worker.load_model()


def make_builder(worker: Worker) -> HeteroCacheMetadataBuilder:
    compilation = SimpleNamespace(static_forward_context=worker.layers)
    config = SimpleNamespace(
        compilation_config=compilation,
        parallel_config=worker.parallel_config,
        speculative_config=None,
    )
    spec = worker.get_kv_cache_spec()[NAMES[0]]
    return HeteroCacheMetadataBuilder(spec, NAMES, config, worker.device)


def two_decodes() -> CommonAttentionMetadata:
    starts, seq_lens = torch.tensor([0, 1, 2]).int(), torch.tensor([1, 1]).int()
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        num_reqs=2,
        num_actual_tokens=2,
        max_query_len=1,
        max_seq_len=1,
        block_table_tensor=torch.zeros(2, 1, dtype=torch.int32),
        slot_mapping=torch.zeros(2, dtype=torch.int64),
        is_prefilling=torch.zeros(2, dtype=torch.bool),
        seq_lens_cpu_upper_bound=seq_lens,
    )


def attend(worker: Worker, metadata: HeteroCacheMetadata | None) -> torch.Tensor:
    """What the first layer answers; the memory of the answer holds NaN before."""
    query = torch.ones(2, HEADS * GROUP, DIM, dtype=torch.bfloat16)
    kv = torch.ones(2, HEADS, DIM, dtype=torch.bfloat16)
    output = torch.full_like(query, torch.nan)
    impl = worker.layers[NAMES[0]].impl
    impl.do_kv_cache_update(None, kv, kv, None, torch.tensor([0, 1]))
    return impl.forward(None, query, kv, kv, None, metadata, output)


def assert_there_is_no_runtime(worker: Worker, connector: HeteroConnector) -> None:
    assert worker.heterocache is None
    assert [layer.impl.runtime for layer in worker.layers.values()] == [None, None]
    assert make_builder(worker).build(0, two_decodes()) is None
    assert not attend(worker, None).any(), "zeros, and not what lay there before"
    some = HeteroCacheMetadata(decodes=None, prefills=None, kept=[])
    assert not attend(worker, some).any()
    connector.wait_for_save()
    assert connector.build_connector_worker_meta() is None
    assert connector.get_kv_connector_stats() is None


def test_before_there_is_a_pool_the_backend_answers_zeros_and_nobody_has_a_runtime(
    worker, connector
):
    """vLLM measures the model's memory then, and that of CUDA graphs."""
    assert_there_is_no_runtime(worker, connector)


def test_layers_tell_vllm_the_lengths_of_the_plan(worker, vllm_config):
    plan = ServingPlan.from_additional_config(vllm_config.additional_config)
    for spec in worker.get_kv_cache_spec().values():
        assert type(spec) is HeteroSpec
        assert (spec.block_size, spec.num_kv_heads, spec.head_size) == (PAGE, HEADS, DIM)
        assert spec.gpu_budget == 0.5 and spec.frees_prompt
        assert spec.compact_min_tokens == plan.compact_min_tokens == 1024
        assert spec.recomputed_tokens == plan.recomputed_tokens == 24


def test_the_rank_is_as_the_plan_says(worker):
    rank = worker.heterocache_rank
    assert rank.layer_ids == [0, 1] and rank.kv_head_ids == [0, 1] and rank.model_layers == 2
    assert rank.geometry.window == 24 and rank.geometry.max_rows >= 4
    assert rank.plan.policy.name == "snapkv" and rank.assignment is rank.plan.assignments[0]
    assert worker.table_bytes_per_block() > 0, "asked for before there is a pool"


def test_with_a_pool_layers_and_connector_have_one_runtime(worker, connector):
    worker.initialize_from_config(SimpleNamespace(num_blocks=BLOCKS))
    runtime = worker.heterocache
    assert all(layer.impl.runtime is runtime for layer in worker.layers.values())
    assert [layer.impl.layer_index for layer in worker.layers.values()] == [0, 1]
    pool = runtime.ops.memory.pool
    assert pool.shape == (BLOCKS * len(NAMES) * HEADS, PAGE, 2 * DIM)
    assert pool.data_ptr() == worker.layers[NAMES[0]].kv_cache.data_ptr()
    metadata = make_builder(worker).build(0, two_decodes())
    assert metadata.decodes.row_to_table_slot.tolist() == [runtime.table.dense_slot] * 2
    assert attend(worker, metadata).eq(1).all(), "each row is one token, whose value is 1"
    assert connector.get_kv_connector_stats().data.keys() == {"rank0"}


def test_a_block_of_several_pages_is_as_many_kernel_blocks_behind_one_another(worker, monkeypatch):
    layers = {name: make_layer(3 * PAGE) for name in NAMES}
    found = layers, {}, {}, {}
    monkeypatch.setattr(worker_module, "attention_layers", lambda config, model: found)
    worker.layers = layers
    worker.load_model()
    of_block = sum(spec.page_size_bytes for spec in worker.get_kv_cache_spec().values())
    assert worker.kernel_block_bytes() == of_block // 3
    worker.initialize_from_config(SimpleNamespace(num_blocks=BLOCKS))
    assert worker.heterocache.num_blocks == 3 * BLOCKS
    for layer in layers.values():
        layer.kv_cache[5] = 1  # the whole block; vLLM zeroes new blocks so
    for layer in layers.values():
        blocks = layer.impl.kernel_blocks
        assert blocks.shape == (3 * BLOCKS, HEADS, PAGE, 2 * DIM)
        is_set = blocks.eq(1).flatten(1)
        assert is_set.all(1).nonzero().flatten().tolist() == [15, 16, 17]
        assert is_set.any(1).sum() == 3
    page = layers[NAMES[1]].impl.kernel_blocks[16, 1]  # of layer 1 and head 1
    place = (16 * len(NAMES) + 1) * HEADS + 1
    assert page.data_ptr() == worker.heterocache.ops.memory.pool[place].data_ptr()


def test_an_fp8_pool_has_the_scales_of_the_layers_and_queries_of_the_models_dtype(worker):
    for number, layer in enumerate(worker.layers.values(), 1):
        layer.kv_cache_dtype = layer.impl.kv_cache_dtype = "fp8_e5m2"
        layer._k_scale, layer._v_scale = torch.tensor(0.5 * number), torch.tensor([0.25, 4.0])
        layer._q_scale = torch.tensor(1.0)
    worker.initialize_from_config(SimpleNamespace(num_blocks=BLOCKS))
    memory = worker.heterocache.ops.memory
    assert memory.pool.dtype == torch.float8_e5m2
    assert memory.pool.shape == (BLOCKS * len(NAMES) * HEADS, PAGE, 2 * DIM)
    assert memory.last_queries.dtype == torch.bfloat16
    assert memory.kv_scales.key.tolist() == [[0.5] * HEADS, [1.0] * HEADS]
    assert memory.kv_scales.value.tolist() == [[0.25, 4.0]] * 2
    assert worker.heterocache_block_bytes()[0] == len(NAMES) * HEADS * PAGE * 2 * DIM


def test_steps_of_vllms_warm_up_are_of_no_request(worker):
    """They come without metadata of the connector, and graphs are captured right behind them."""
    worker.initialize_from_config(SimpleNamespace(num_blocks=BLOCKS))
    asked = []
    worker.heterocache.request_ids = lambda *rows: asked.append(rows) or []
    cached = SimpleNamespace(resumed_req_ids=set())
    step = SimpleNamespace(
        finished_req_ids={"warm-up"},
        preempted_req_ids=None,
        scheduled_new_reqs=[],
        scheduled_cached_reqs=cached,
        kv_connector_metadata=None,
    )
    dense = worker.heterocache.table.dense_slot
    assert worker.execute_model(step).tolist() == [dense] * 2
    make_builder(worker).build(0, two_decodes())  # a capture
    assert not asked
    step.kv_connector_metadata = CompactionOrders()
    worker.execute_model(step)
    assert asked == [(2, None)]


@pytest.mark.parametrize("arriving", [{}, {"a": object()}], ids=["nothing", "blocks"])
def test_the_device_ends_its_work_before_blocks_of_another_engine_arrive(worker, arriving):
    """Former owners of these blocks have left by then, and freed blocks are poisoned."""
    worker.initialize_from_config(SimpleNamespace(num_blocks=BLOCKS))
    worker.heterocache.request_ids = lambda *rows: []
    others = SimpleNamespace(), SimpleNamespace(reqs_to_recv=arriving)
    step = SimpleNamespace(
        finished_req_ids=set(),
        preempted_req_ids=None,
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
        kv_connector_metadata=SimpleNamespace(metadata=(CompactionOrders(), *others)),
    )
    worker.execute_model(step)
    assert worker.waited_for == [worker.heterocache._step] * len(arriving)
    assert worker.heterocache._step is not None


@pytest.mark.parametrize(
    ("host_blocks", "expected"), [(100, "3 requests of 512 tokens"), (31, "0 requests of 512")]
)
def test_the_start_up_line_says_how_many_requests_have_host_pages(host_blocks, expected):
    world = World(mixed_assignment(), host_blocks=host_blocks)
    line = worker_module.pools_line(world.runtime, 512)
    assert f"host pool of {host_blocks} blocks" in line and expected in line
    without = World(mixed_assignment(), host_blocks=0, options={"drift_threshold": 0})
    assert "requests" not in worker_module.pools_line(without.runtime, 512)


def test_after_shutdown_nothing_refers_to_the_runtime_or_the_pools(worker, connector):
    """vLLM keeps layers and connector in globals, for the next engine of the process."""
    worker.initialize_from_config(SimpleNamespace(num_blocks=BLOCKS))
    runtime, closed = worker.heterocache, []
    runtime.swap.close = lambda: closed.append(True)
    kept = [runtime, runtime.table, runtime.host_pool, runtime.ops, runtime.ops.memory.pool]
    left = [weakref.ref(one) for one in kept]
    worker.shutdown()
    assert closed == [True] and worker.is_shut_down
    assert_there_is_no_runtime(worker, connector)
    del runtime, kept
    gc.collect()
    assert [reference() for reference in left] == [None] * len(left)
    worker.shutdown()  # vLLM may do so twice
    assert closed == [True]


def test_a_worker_that_never_loaded_its_model_shuts_down(vllm_config):
    worker = Worker(vllm_config, {})
    worker.shutdown()
    assert worker.is_shut_down


DRAFTER = [f"draft_model.model.layers.{index}.attn" for index in range(1)]


@pytest.fixture
def with_drafter(worker, monkeypatch):
    """A function that loads the worker's model again, with a drafter of this method."""

    def load(method: str) -> Worker:
        layers = {name: make_layer() for name in NAMES}
        drafter = {name: make_layer() for name in DRAFTER}
        worker.layers = layers | drafter
        found = layers, {}, {}, drafter
        monkeypatch.setattr(worker_module, "attention_layers", lambda *args: found)
        monkeypatch.setattr(worker_module, "check_drafter_layers", lambda *args: None)
        worker.vllm_config.speculative_config = SimpleNamespace(method=method)
        monkeypatch.setattr(worker_module, "decode_batch_limits", lambda config: (4, 4))
        worker.load_model()
        return worker

    yield load
    worker.vllm_config.speculative_config = None


@pytest.mark.parametrize(
    ("method", "names"), [("draft_model", DRAFTER + NAMES), ("eagle", NAMES + DRAFTER)]
)
def test_a_drafters_layers_have_specs_of_their_own_and_no_place_in_the_plan(
    with_drafter, method, names
):
    worker = with_drafter(method)
    specs = worker.get_kv_cache_spec()
    assert list(specs) == names
    assert all(type(specs[name]) is HeteroSpec and specs[name].has_drafter for name in NAMES)
    drafter = specs[DRAFTER[0]]
    assert type(drafter) is DrafterSpec and drafter.block_size == len(NAMES) * PAGE
    assert worker.heterocache_rank.layer_ids == [0, 1]
    assert worker.kernel_block_bytes() == len(NAMES) * specs[NAMES[0]].page_size_bytes
