"""The channel between scheduler and workers, made as vLLM makes it."""

import inspect
import pickle
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from vllm_heterocache import compat
from vllm_heterocache.compat import KVConnectorRole, SlidingWindowSpec
from vllm_heterocache.compat.other_groups import OtherGroup
from vllm_heterocache.connectors import hetero
from vllm_heterocache.connectors.hetero import HeteroConnector
from vllm_heterocache.kv_cache_spec import HeteroSpec
from vllm_heterocache.messages import (
    CompactionAnswers,
    CompactionOrder,
    CompactionOrders,
    PrefillStart,
)
from vllm_heterocache.metrics import Counters, HeteroCacheStats, PageCounts, worker_snapshot
from vllm_heterocache.scheduler.prompt import PromptState

NUM_BLOCKS = 50
STEP = SimpleNamespace(num_scheduled_tokens={"a": 100, "b": 16})
SPEC = HeteroSpec(
    block_size=16, num_kv_heads=2, head_size=16, dtype=torch.float32,
    gpu_budget=0.3, compact_min_tokens=70,
)  # fmt: skip


@pytest.fixture(scope="module")
def vllm_config(tiny_model):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=tiny_model,
        skip_tokenizer_init=True,
        load_format="dummy",
        max_model_len=512,
        attention_backend="heterocache",
        additional_config={"heterocache": {"gpu_budget": 1.0, "min_prompt_tokens": 99}},
    ).create_engine_config()


def make(vllm_config, role: str):
    """A connector as vLLM's factory makes it in the scheduler and in the workers."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.kv_cache_interface import KVCacheConfig

    return KVConnectorFactory.create_connector(
        vllm_config, KVConnectorRole[role], KVCacheConfig(NUM_BLOCKS, [], [])
    )


def make_kv_cache_manager(num_blocks=NUM_BLOCKS, others=()):
    """What vLLM's scheduler makes, and binds the connector to."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    groups = [KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate((SPEC, *others))]
    return KVCacheManager(
        KVCacheConfig(num_blocks, [], groups),
        max_model_len=512,
        scheduler_block_size=16,
        hash_block_size=16,
        enable_caching=False,
    )


@pytest.fixture
def scheduler_side(vllm_config, monkeypatch):
    monkeypatch.setattr(vllm_config.parallel_config, "world_size", 2)
    side, kv = make(vllm_config, "SCHEDULER"), make_kv_cache_manager()
    side.bind_kv_cache_manager(kv)
    (manager,) = kv.coordinator.single_type_managers
    return SimpleNamespace(connector=side, kv=kv, manager=manager, ledger=manager.ledger)


class FakeRuntime:
    rank = SimpleNamespace(index=1)

    def __init__(self):
        self.done, self.refused, self.forwards = [], [], 0

    def after_forward(self):
        self.forwards += 1

    def take_answers(self):
        answers = self.done, self.refused
        self.done, self.refused = [], []
        return answers

    def snapshot(self):
        return worker_snapshot(Counters(drift_checks=3), {0: PageCounts(8, 5, 1)}, 4)


@pytest.fixture
def worker_side(vllm_config):
    side, runtime = make(vllm_config, "WORKER"), FakeRuntime()
    side.bind_runtime(runtime)
    return SimpleNamespace(connector=side, runtime=runtime)


def output_with(answers):
    return SimpleNamespace(kv_connector_worker_meta=answers)


@pytest.mark.parametrize("role", ["SCHEDULER", "WORKER"])
def test_vllm_makes_it_from_the_installed_config(vllm_config, role):
    side = make(vllm_config, role)
    assert type(side) is HeteroConnector and side.role == KVConnectorRole[role]


def test_it_implements_the_whole_interface_and_keeps_the_hybrid_cache_manager():
    assert not inspect.isabstract(HeteroConnector)
    assert issubclass(HeteroConnector, compat.SupportsHMA)
    # A method that this vLLM does not know would never be called. 0.33 asks about sleep mode.
    bases = (compat.KVConnectorBase_V1, compat.SupportsHMA)
    ours = {name for name in vars(HeteroConnector) if not name.startswith("_")} - {"bind_runtime"}
    ours -= {"supports_sleep_mode"}
    assert all(any(hasattr(base, name) for base in bases) for name in ours), ours


def test_it_can_be_called_as_vllm_calls_it():
    """Same parameters as the base class, so that a call by position or by name binds."""
    for name, method in vars(HeteroConnector).items():
        base = getattr(compat.KVConnectorBase_V1, name, None)
        if name.startswith("_") or not inspect.isfunction(method) or base is None:
            continue
        theirs = [p for p in inspect.signature(base).parameters.values() if p.kind != p.VAR_KEYWORD]
        arguments = {p.name: None for p in theirs if p.default is p.empty}
        inspect.signature(method).bind(**arguments)
        assert list(inspect.signature(method).parameters)[: len(arguments)] == list(arguments)


def test_full_cuda_graphs_are_kept():
    assert not HeteroConnector.requires_piecewise_for_cudagraph({})


def test_orders_go_out_with_the_next_step_and_only_once(scheduler_side):
    ledger = scheduler_side.ledger
    ticket = ledger.open("a", 100, [3, 4])
    metadata = scheduler_side.connector.build_connector_meta(STEP)
    arrived = pickle.loads(pickle.dumps(metadata))
    assert arrived == CompactionOrders([CompactionOrder(ticket, "a", 100, [3, 4])])
    assert scheduler_side.connector.build_connector_meta(STEP) == CompactionOrders([])


def test_starts_go_out_with_the_next_step_and_only_once(scheduler_side):
    ledger = scheduler_side.ledger
    ledger.announce("a", 100)
    ticket = ledger.open("a", 100, [3, 4])  # a prompt of one chunk
    ledger.announce("b", 200)
    arrived = pickle.loads(pickle.dumps(scheduler_side.connector.build_connector_meta(STEP)))
    assert arrived.starts == [PrefillStart("a", 100), PrefillStart("b", 200)]
    assert arrived.orders == [CompactionOrder(ticket, "a", 100, [3, 4])]
    assert scheduler_side.connector.build_connector_meta(STEP) == CompactionOrders()


def test_starts_wait_until_their_prompts_are_loaded_from_the_host(scheduler_side):
    scheduler_side.ledger.announce("b", 200)
    scheduler_side.ledger.announce("loading", 300)
    assert scheduler_side.connector.build_connector_meta(STEP).starts == [PrefillStart("b", 200)]
    later = SimpleNamespace(num_scheduled_tokens={"loading": 20})
    assert scheduler_side.connector.build_connector_meta(later).starts == [
        PrefillStart("loading", 300)
    ]


@pytest.mark.parametrize("poison", [False, True])
def test_freed_blocks_are_poisoned_with_the_next_step_if_asked_for(vllm_config, poison):
    config = deepcopy(vllm_config)
    config.additional_config["heterocache"]["debug_poison"] = poison
    side, kv = make(config, "SCHEDULER"), make_kv_cache_manager()
    side.bind_kv_cache_manager(kv)
    pool = kv.block_pool
    pool.free_blocks(pool.get_new_blocks(3)[1:])
    assert side.build_connector_meta(STEP).poison == ([2, 3] if poison else [])
    assert side.build_connector_meta(STEP).poison == []


def test_answers_come_back_from_every_rank(scheduler_side):
    side, ledger = scheduler_side.connector, scheduler_side.ledger
    tickets = [ledger.open(name, 100, [block]) for name, block in (("a", 1), ("b", 2))]
    side.update_connector_output(output_with(CompactionAnswers({tickets[0]: 1}, {tickets[1]: 1})))
    assert not ledger.is_done(tickets[0]) and not ledger.is_refused(tickets[1])
    side.update_connector_output(output_with(None))
    side.update_connector_output(output_with(CompactionAnswers({tickets[0]: 1}, {tickets[1]: 1})))
    assert ledger.is_done(tickets[0]) and ledger.is_refused(tickets[1])


def test_worker_reports_each_answer_once_and_says_nothing_otherwise(worker_side):
    side, runtime = worker_side.connector, worker_side.runtime
    assert side.build_connector_worker_meta() is None
    runtime.done, runtime.refused = [4, 7], [5]
    answers = pickle.loads(pickle.dumps(side.build_connector_worker_meta()))
    assert answers == CompactionAnswers({4: 1, 7: 1}, {5: 1})
    assert side.build_connector_worker_meta() is None
    runtime.refused = [9]
    assert side.build_connector_worker_meta() == CompactionAnswers({}, {9: 1})


def test_answers_of_ranks_add_up_in_vllms_aggregator():
    from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

    def output(answers, stats):
        connector_output = KVConnectorOutput(
            kv_connector_worker_meta=answers, kv_connector_stats=HeteroCacheStats(data=stats)
        )
        return ModelRunnerOutput([], {}, kv_connector_output=connector_output)

    outputs = [
        output(CompactionAnswers({1: 1, 2: 1}, {}), {"rank0": {"x": 1}}),
        output(None, {"rank1": {"x": 2}}),
        output(CompactionAnswers({1: 1}, {2: 1}), {"rank2": {"x": 3}}),
    ]
    joined = KVOutputAggregator(3).aggregate(outputs).kv_connector_output
    assert joined.kv_connector_worker_meta == CompactionAnswers({1: 2, 2: 1}, {2: 1})
    assert joined.kv_connector_stats.data == {f"rank{i}": {"x": i + 1} for i in range(3)}


def test_runtime_works_after_each_forward_pass(worker_side):
    worker_side.connector.wait_for_save()
    worker_side.connector.wait_for_save()
    assert worker_side.runtime.forwards == 2


def test_it_is_silent_before_the_kv_pool_exists(vllm_config):
    """vLLM's profiling run comes before the pool."""
    worker, scheduler = make(vllm_config, "WORKER"), make(vllm_config, "SCHEDULER")
    worker.wait_for_save()
    assert worker.build_connector_worker_meta() is None
    assert worker.get_kv_connector_stats() is None and scheduler.get_kv_connector_stats() is None


def test_it_transfers_no_kv_and_holds_no_blocks(scheduler_side):
    side = scheduler_side.connector
    request = SimpleNamespace(num_prompt_tokens=900, shared_prefix_boundary=32)
    assert side.get_num_new_matched_tokens(request, 32) == (0, False)
    assert request.shared_prefix_boundary == 32
    side._groups = [OtherGroup(48, num_states=2), OtherGroup(96)]
    side.get_num_new_matched_tokens(request, 32)
    assert request.shared_prefix_boundary == 8 * 96, "a state at the end of a drafter's block"
    request.shared_prefix_boundary = 3 * 96
    side.get_num_new_matched_tokens(request, 96)
    assert request.shared_prefix_boundary == 2 * 96, "less the block that vLLM drops"
    side.get_num_new_matched_tokens(request, 2 * 96)
    assert request.shared_prefix_boundary == 8 * 96, "what is shared was found"
    request = SimpleNamespace(request_id="a")
    assert side.request_finished(request, [1]) == (False, None)
    assert side.request_finished_all_groups(request, ([1],)) == (False, None)
    assert list(side.take_events()) == []
    assert side.get_finished(set()) == (None, None)


@pytest.mark.feature("Streaming input, which stays dense")
def test_requests_with_streaming_input_are_kept_dense_until_they_end(scheduler_side):
    side, manager = scheduler_side.connector, scheduler_side.manager
    side.on_new_request(SimpleNamespace(request_id="a", resumable=False))
    assert manager.prompts == {}
    streaming = SimpleNamespace(request_id="b", resumable=True)
    side.on_new_request(streaming)
    assert manager.prompts["b"].state is PromptState.KEPT_DENSE
    side.request_finished_all_groups(streaming, ([1],))
    assert manager.prompts == {}


def test_streaming_input_is_warned_of_once(scheduler_side, monkeypatch):
    lines = []
    monkeypatch.setattr(hetero.logger, "warning", lambda *args: lines.append(args[0] % args[1:]))
    for name in "abc":
        request = SimpleNamespace(request_id=name, resumable=True)
        scheduler_side.connector.on_new_request(request)
    (line,) = lines
    assert "request a" in line and "streaming input" in line


def test_stats_of_both_sides_say_what_is_held(scheduler_side, worker_side):
    from vllm import SamplingParams
    from vllm.v1.request import Request

    # 100 tokens: 7 blocks, 6 of them full; ceil(.3 * 6) = 2 compact ones
    request = Request("a", [5] * 100, SamplingParams(max_tokens=9), None)
    assert scheduler_side.kv.allocate_slots(request, 100, full_sequence_must_fit=True)
    assert NUM_BLOCKS - 1 - scheduler_side.kv.block_pool.get_num_free_blocks() == 7 + 2
    (order,) = scheduler_side.ledger.take_orders()
    scheduler = scheduler_side.connector.get_kv_connector_stats()
    assert scheduler.data == {"scheduler": {"dense_blocks": 7, "tickets": [str(order.ticket)]}}
    worker = worker_side.connector.get_kv_connector_stats()
    assert worker.data.keys() == {"rank1"} and worker.data["rank1"]["drift_checks"] == 3
    totals = worker.aggregate(scheduler).reduce()
    assert totals["heterocache_pages_dense"] == 7 * 4
    assert totals["heterocache_pages_host"] == 5


def test_each_count_of_a_worker_is_sent_once(worker_side):
    side = worker_side.connector
    sent = [side.get_kv_connector_stats().data["rank1"] for _ in range(2)]
    assert [part["drift_checks"] for part in sent] == [3, 0]
    assert sent[1]["requests"] == sent[0]["requests"], "pages held are sent with every step"
    side.bind_runtime(FakeRuntime())  # a new KV pool, whose worker counts from zero
    assert side.get_kv_connector_stats().data["rank1"]["drift_checks"] == 3


def test_start_up_line_is_logged_with_the_pool(vllm_config, monkeypatch):
    lines = []
    monkeypatch.setattr(hetero.logger, "info", lambda *args: lines.append(args[0]))
    side = make(vllm_config, "SCHEDULER")
    assert lines == []
    side.bind_kv_cache_manager(make_kv_cache_manager(77))
    (line,) = lines
    assert "77 KV blocks" in line and "requests of 512 tokens" in line and "99 tokens" in line


def test_a_start_that_compacts_nothing_is_warned_of(vllm_config, monkeypatch, logged):
    make(vllm_config, "SCHEDULER").bind_kv_cache_manager(make_kv_cache_manager())
    assert not any("compacts no prompt" in message for message in logged())
    monkeypatch.setitem(vllm_config.additional_config["heterocache"], "gpu_budget", 0.5)
    monkeypatch.setattr(vllm_config.model_config, "max_model_len", 98)
    make(vllm_config, "SCHEDULER").bind_kv_cache_manager(make_kv_cache_manager())
    assert sum("prompts below 99 tokens" in message for message in logged()) == 1


def test_groups_of_vllm_publish_no_more_than_the_manager_allows(vllm_config, monkeypatch):
    lines, published = [], []
    monkeypatch.setattr(hetero.logger, "info", lambda *args: lines.append(args[0]))
    window = SlidingWindowSpec(
        block_size=16, num_kv_heads=2, head_size=16, dtype=torch.float32, sliding_window=100
    )
    kv = make_kv_cache_manager(77, others=[window])
    manager, other = kv.coordinator.single_type_managers
    monkeypatch.setattr(
        other,
        "cache_blocks",
        lambda request, num_tokens, replay_boundaries: published.append(
            (num_tokens, replay_boundaries)
        ),
    )
    monkeypatch.setattr(manager, "cacheable_tokens", lambda request, num_tokens: num_tokens - 9)
    make(vllm_config, "SCHEDULER").bind_kv_cache_manager(kv)
    left = manager.kv_cache_spec.recomputed_tokens
    request = SimpleNamespace(num_prompt_tokens=300, shared_prefix_boundary=160)
    other.cache_blocks(request, 50, replay_boundaries=[299])
    assert published == [(41, (299, 300 - left, 160 - left))]
    assert lines[0].endswith("Layers with a window of 100 tokens keep 8 more blocks a request.")
