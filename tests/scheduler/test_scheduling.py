"""HeteroManager and HeteroConnector under vLLM's own scheduler, with workers played by the test.

The workers keep what every KV slot holds, so a block that is given away too early, published
wrongly, poisoned or reused while it is still read shows up as a wrong value at the next read.
"""

import copy
import functools
import itertools
import random
from collections import Counter as Tally
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from vllm_heterocache.compat import FullAttentionSpec, KVCacheSpecRegistry
from vllm_heterocache.kv_cache_spec import HeteroSpec
from vllm_heterocache.messages import CompactionAnswers
from vllm_heterocache.metrics import (
    Counters,
    HeteroCacheStats,
    PageCounts,
    counted_since,
    worker_snapshot,
)
from vllm_heterocache.plugin import register_spec
from vllm_heterocache.scheduler.prompt import PromptState
from vllm_heterocache.startup.capacity import steady_state_requests

PAGE = 16
NUM_SCHEDULES = 12  # of each kind
MAX_MODEL_LEN = 400
POISON = np.iinfo(np.int64).min
BUDGET, MIN_TOKENS = 0.3, 70
GEOMETRY = {"block_size": PAGE, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32}
HETERO = HeteroSpec(**GEOMETRY, gpu_budget=BUDGET, compact_min_tokens=MIN_TOKENS)


@pytest.fixture(scope="module")
def base_config(tiny_model):
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=tiny_model,
        skip_tokenizer_init=True,
        load_format="dummy",
        max_model_len=MAX_MODEL_LEN,
        attention_backend="heterocache",
        additional_config={"heterocache": {"gpu_budget": 1.0}},
    ).create_engine_config()
    KVCacheSpecRegistry._ensure_registered()
    register_spec()
    return config


def make_scheduler(
    base, num_blocks, spec=HETERO, world_size=1, budget=64, max_num_seqs=6, overlap=False,
    policy="fcfs", poison=True,
):  # fmt: skip
    """vLLM's scheduler on a pool of `num_blocks`; `overlap` for its asynchronous one."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config = copy.deepcopy(base)
    config.additional_config["heterocache"]["debug_poison"] = poison
    config.cache_config.num_gpu_blocks = num_blocks
    config.parallel_config.world_size = world_size
    scheduling = config.scheduler_config
    scheduling.max_num_batched_tokens = scheduling.max_num_scheduled_tokens = budget
    scheduling.max_num_seqs = max_num_seqs
    scheduling.policy = policy
    scheduling.async_scheduling = overlap
    if spec is not HETERO:
        config.kv_transfer_config = None
    return (AsyncScheduler if overlap else Scheduler)(
        config,
        KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        StructuredOutputManager(config),
        block_size=PAGE,
        log_stats=True,
    )


@dataclass
class Sequence:
    """What the workers know of a request."""

    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)  # what its slots hold
    order: object = None  # set once it decodes from page lists
    announced: int | None = None  # T of the compaction that its prefill will end in
    _dense: list[int] = field(default_factory=lambda: [0])

    def dense_values(self, stop: int) -> list[int]:
        """K and V that full attention computes: a function of all tokens up to there."""
        for token in self.tokens[len(self._dense) - 1 : stop]:
            self._dense.append(hash((self._dense[-1], token)) & (2**62 - 1))
        return self._dense[1 : stop + 1]


class Workers:
    """Every rank of an engine; they hold the same values, but answer in their own time."""

    def __init__(self, num_blocks, world_size=1, seed=0, refusing=0.0, max_delay=0):
        self.memory = np.full((num_blocks, PAGE), POISON)
        self.world_size, self.refusing, self.max_delay = world_size, refusing, max_delay
        self.rng = random.Random(seed)
        self.sequences: dict[str, Sequence] = {}
        self._last_snapshot = None
        events = "compacted", "refused", "split", "resumed", "hits", "poisoned"
        self.seen = dict.fromkeys(events, 0)
        self._labels = itertools.count(1)
        self._pending: list[tuple[int, int, str, object]] = []  # due, rank, kind, order
        self._step = 0

    def execute(self, step):
        """One step: read, check, write, compact; returns vLLM's ModelRunnerOutput."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        self._step += 1
        self._poison(step.kv_connector_metadata.poison)
        computed = self._update_states(step)
        self._announce(step)
        orders = {o.request_id: o for o in step.kv_connector_metadata.orders}
        assert orders.keys() <= step.num_scheduled_tokens.keys(), "an order without its batch"
        sampled = {}
        for name, num_new in step.num_scheduled_tokens.items():
            sequence, start = self.sequences[name], computed[name]
            end = start + num_new
            self._read(sequence, start)
            self._write(sequence, start, end)
            if name in orders:
                self._begin_compaction(sequence, orders[name], end)
            done = end == len(sequence.tokens)
            sampled[name] = [self.rng.randrange(3, 190)] if done else []
            sequence.tokens += sampled[name]
        output = KVConnectorOutput(
            kv_connector_worker_meta=self._answers(), kv_connector_stats=self._stats()
        )
        return ModelRunnerOutput(
            req_ids=list(sampled),
            req_id_to_index={name: index for index, name in enumerate(sampled)},
            sampled_token_ids=list(sampled.values()),
            kv_connector_output=output,
        )

    def _poison(self, block_ids) -> None:
        """Before the forward pass; that nothing alive was among them shows when it is read."""
        assert 0 not in block_ids, "the null block is poisoned"
        self.memory[block_ids] = POISON
        self.seen["poisoned"] += len(block_ids)

    def _announce(self, step) -> None:
        """Starts come with the first chunk of a prefill, and once."""
        first_chunks = {new.req_id for new in step.scheduled_new_reqs}
        first_chunks |= step.scheduled_cached_reqs.resumed_req_ids
        for start in step.kv_connector_metadata.starts:
            assert start.request_id in first_chunks
            sequence = self.sequences[start.request_id]
            assert sequence.announced is None and start.num_tokens == len(sequence.tokens)
            sequence.announced = start.num_tokens

    def _update_states(self, step) -> dict[str, int]:
        """Follow the scheduler as vLLM's model runner does; tokens computed before the step."""
        for name in step.finished_req_ids:
            self.sequences.pop(name, None)
        for name in step.preempted_req_ids or ():
            if name in self.sequences:
                self.sequences[name].order = None
        computed = {}
        for new in step.scheduled_new_reqs:
            self._start(Sequence(list(new.prompt_token_ids)), new.req_id, new.block_ids,
                        new.num_computed_tokens)  # fmt: skip
            computed[new.req_id] = new.num_computed_tokens
        cached = step.scheduled_cached_reqs
        for name, blocks, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if name in cached.resumed_req_ids:
                self.seen["resumed"] += 1
                self._start(self.sequences[name], name, blocks, num_computed)
            elif blocks is not None:
                self.sequences[name].blocks += blocks[0]
            computed[name] = num_computed
        return computed

    def _start(self, sequence, name, block_ids, num_computed) -> None:
        self.seen["hits"] += num_computed > 0
        sequence.blocks = list(block_ids[0])
        sequence.written = sequence.dense_values(num_computed)
        sequence.order = sequence.announced = None
        self.sequences[name] = sequence

    def _read(self, sequence, num_tokens) -> None:
        order = sequence.order
        begin = 0 if order is None else order.num_tokens // PAGE * PAGE
        table = sequence.blocks[begin // PAGE : -(-num_tokens // PAGE)]
        held = self.memory[table].ravel()[: num_tokens - begin].tolist()
        assert held == sequence.written[begin:num_tokens]
        if order is None:
            assert held == sequence.dense_values(num_tokens), "sparse values in dense attention"
        else:
            assert (self.memory[order.block_ids] == -order.ticket - 1).all()

    def _write(self, sequence, start, end) -> None:
        assert len(sequence.written) == start
        if sequence.order is None:
            values = sequence.dense_values(end)[start:]
        else:
            values = [-(10**9) - next(self._labels) for _ in range(start, end)]
        for position, value in zip(range(start, end), values, strict=True):
            block = sequence.blocks[position // PAGE]
            assert block != 0, "the null block is written"
            self.memory[block, position % PAGE] = value
        sequence.written += values

    def _begin_compaction(self, sequence, order, end) -> None:
        assert sequence.order is None and end == order.num_tokens == len(sequence.tokens)
        assert sequence.announced == order.num_tokens
        assert len(order.block_ids) == HETERO.num_compact_blocks(end) > 0
        refusing = [self.rng.random() < self.refusing for _ in range(self.world_size)]
        if self.rng.random() < 0.5:  # ranks mostly agree
            refusing = refusing[:1] * self.world_size
        kind = "refused" if all(refusing) else "split" if any(refusing) else "compacted"
        self.seen[kind] += 1
        if kind != "refused":
            self.memory[order.block_ids] = -order.ticket - 1
            sequence.order = order
        for rank, refuses in enumerate(refusing):
            due = self._step + self.rng.randint(0, self.max_delay)
            self._pending.append((due, rank, "refused" if refuses else "done", order))

    def _answers(self):
        """Answers that are due, also those of requests that have ended since."""
        due = [p for p in self._pending if p[0] <= self._step]
        self._pending = [p for p in self._pending if p[0] > self._step]
        by_rank = {}
        for _, rank, kind, order in due:
            if kind == "done":
                self._offload(order)
            answers = by_rank.setdefault(rank, CompactionAnswers())
            getattr(answers, kind)[order.ticket] = 1
        if not by_rank:
            return None
        return functools.reduce(lambda a, b: a.aggregate(b), by_rank.values())

    def _offload(self, order) -> None:
        """Until a rank says that it is done, it copies from the dense blocks."""
        sequence = self.sequences.get(order.request_id)
        if sequence is not None and sequence.order is order:
            num_full = order.num_tokens // PAGE
            held = self.memory[sequence.blocks[:num_full]].ravel().tolist()
            assert held == sequence.written[: num_full * PAGE]

    def _stats(self) -> HeteroCacheStats:
        held = {
            s.order.ticket: PageCounts(len(s.order.block_ids) * 4, 7, 0)
            for s in self.sequences.values()
            if s.order is not None
        }
        counters = Counters(requests_compacted=self.seen["compacted"])
        snapshot = worker_snapshot(counters, held, 4)
        counted = counted_since(snapshot, self._last_snapshot)
        self._last_snapshot = snapshot
        return HeteroCacheStats(data={"rank0": counted})


class Engine:
    """Scheduler and workers, stepped as vLLM's engine core steps them."""

    def __init__(self, scheduler, workers):
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(PAGE, sha256)
        self.scheduler, self.workers = scheduler, workers
        self.pool = scheduler.kv_cache_manager.block_pool
        (self.manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
        self.most_running = 0
        self.stats = HeteroCacheStats()  # joined over time, as vLLM's log joins them
        self._depth = scheduler.vllm_config.max_concurrent_batches
        self._in_flight = deque()

    @property
    def free(self) -> int:
        return self.pool.get_num_free_blocks()

    def add(self, name, prompt, max_tokens=20, priority=0, resumable=False):
        from vllm import SamplingParams
        from vllm.v1.request import Request

        if isinstance(prompt, int):
            prompt = random.Random(name).choices(range(3, 190), k=prompt)
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        request = Request(
            name, prompt, params, None,
            block_hasher=self._hasher, priority=priority, resumable=resumable,
        )  # fmt: skip
        self.scheduler.add_request(request)
        return request

    def abort(self, name):
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.check()

    def step(self, in_between=lambda: None):
        """Schedule a step; process the oldest one once the pipeline is full."""
        if self.scheduler.has_requests():
            step = self.scheduler.schedule()
            self.check()
            self.most_running = max(self.most_running, len(self.scheduler.running))
            self._in_flight.append((step, self.workers.execute(step)))
            self.check_dead_blocks()
        in_between()
        if self._in_flight and (
            len(self._in_flight) == self._depth or not self.scheduler.has_requests()
        ):
            outputs = self.scheduler.update_from_output(*self._in_flight.popleft())
            self.check()
            for output in outputs.values():
                if output.scheduler_stats and output.scheduler_stats.kv_connector_stats:
                    data = output.scheduler_stats.kv_connector_stats
                    self.stats.aggregate(HeteroCacheStats(data=data))

    def run(self, max_steps=5000):
        for _ in range(max_steps):
            if not self.scheduler.has_requests() and not self._in_flight:
                return
            self.step()
        raise AssertionError("requests never end")

    def check(self):
        if not self.scheduler.deferred_frees:
            self.manager.check_integrity()

    def check_dead_blocks(self):
        """A block that is free and no prefix cache holds nothing but poison."""
        if self.scheduler.vllm_config.additional_config["heterocache"]["debug_poison"]:
            free = self.pool.free_block_queue.get_all_free_blocks()
            dead = [block.block_id for block in free if block.block_hash is None]
            assert (self.workers.memory[dead] == POISON).all()

    def assert_empty(self):
        assert self.free == self.pool.num_gpu_blocks - 1
        manager, ledger = self.manager, self.manager.ledger
        assert manager.prompts == {} and not any(manager.req_to_blocks.values())
        assert ledger.tickets == [] and ledger.take_orders() == [] and ledger.take_starts() == []


def make_engine(base, num_blocks, seed=0, refusing=0.0, max_delay=0, world_size=1, **options):
    scheduler = make_scheduler(base, num_blocks, world_size=world_size, **options)
    return Engine(scheduler, Workers(num_blocks, world_size, seed, refusing, max_delay))


@pytest.mark.feature("Chunked prefill")
@pytest.mark.parametrize("overlap", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("num_tokens", [111, 192, 333])
def test_chunked_prompt_is_compacted_and_its_blocks_come_back(base_config, overlap, num_tokens):
    engine = make_engine(base_config, 60, overlap=overlap, budget=50)
    request = engine.add("a", num_tokens, max_tokens=30)
    start = engine.free
    while request.num_output_tokens < 4:
        engine.step()
    tail = -(-request.num_computed_tokens // PAGE) - num_tokens // PAGE
    assert start - engine.free == HETERO.num_compact_blocks(num_tokens) + tail
    assert engine.workers.seen["compacted"] == 1
    engine.run()
    assert request.num_output_tokens == 30
    engine.assert_empty()


@pytest.mark.feature("Prefix caching")
def test_shared_prefix_is_computed_once(base_config):
    engine = make_engine(base_config, 60, budget=400)
    prefix = random.Random(0).choices(range(3, 190), k=200)
    engine.add("a", prefix + [5] * 20)
    for _ in range(3):
        engine.step()
    engine.add("b", prefix + [6] * 20)
    step_tokens = []
    execute = engine.workers.execute
    engine.workers.execute = lambda s: step_tokens.append(s.num_scheduled_tokens) or execute(s)
    engine.step()
    assert step_tokens == [{"a": 1, "b": 220 - 192}]
    engine.run()
    assert engine.workers.seen["compacted"] == 2
    engine.assert_empty()


def test_as_many_requests_run_at_once_as_the_start_up_line_says(base_config):
    """241 tokens: 15 whole blocks kept as 5, and a partial one that the output fills."""
    num_blocks, num_tokens = 100, 241
    promised, stock = steady_state_requests(num_blocks, num_tokens, BUDGET, PAGE)
    assert (promised, stock) == (14, 6)
    engine = make_engine(base_config, num_blocks, budget=300, max_num_seqs=50)
    requests = [engine.add(str(i), num_tokens, max_tokens=15) for i in range(30)]
    engine.run()
    assert engine.most_running == promised
    assert all(r.num_output_tokens == 15 and r.num_preemptions == 0 for r in requests)
    engine.assert_empty()

    scheduler = make_scheduler(
        base_config, num_blocks, FullAttentionSpec(**GEOMETRY), budget=300, max_num_seqs=50
    )
    engine = Engine(scheduler, None)
    for i in range(30):
        engine.add(str(i), num_tokens)
    for _ in range(10):
        scheduler.schedule()
    assert len(scheduler.running) == stock


@pytest.mark.feature("Preemption")
def test_preemption_in_decode_replays_prompt_and_output(base_config):
    """Dense requests outgrow the pool; the youngest, compacted, has to go and return."""
    engine = make_engine(base_config, 34, budget=400)
    older = [engine.add(str(i), 60, max_tokens=150) for i in range(2)]  # they grow to 14 blocks
    younger = engine.add("younger", 200, max_tokens=190)  # 13 + 4 blocks, then 4 and its output
    engine.run()
    assert [r.num_preemptions for r in (*older, younger)] == [0, 0, 1]
    assert engine.workers.seen["resumed"] == 1 and engine.workers.seen["compacted"] == 2
    assert [r.num_output_tokens for r in (*older, younger)] == [150, 150, 190]
    engine.assert_empty()


@pytest.mark.feature("Streaming input, which stays dense")
def test_streaming_input_stays_dense_through_its_turns_and_preemption(base_config):
    # Without poison: the reset below makes cached blocks dead that were freed long before.
    engine = make_engine(base_config, 60, budget=64, poison=False)
    session = engine.add("session", 100, max_tokens=5, resumable=True)
    engine.run()
    held = engine.pool.num_gpu_blocks - 1 - engine.free
    assert session.status.name == "WAITING_FOR_STREAMING_REQ" and held > 0
    engine.add("session", 90, max_tokens=5, resumable=True)  # admitted again, with its blocks
    for _ in range(2):
        engine.step()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.run()
    assert session.num_preemptions == 1 and session.num_tokens > 190
    assert engine.manager.prompts["session"].state is PromptState.KEPT_DENSE
    engine.add("session", 1)  # not resumable: the input ends
    engine.run()
    assert engine.workers.seen["compacted"] == engine.workers.seen["refused"] == 0
    engine.assert_empty()
    engine.add("session", 200)
    engine.run()
    assert engine.workers.seen["compacted"] == 1
    engine.assert_empty()


@pytest.mark.feature("Aborted requests")
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("overlap", [False, True], ids=["sync", "async"])
def test_request_may_be_aborted_at_any_time(base_config, steps, overlap):
    """With a budget of 50 tokens the prompt takes three steps, and the answer two more."""
    engine = make_engine(base_config, 30, budget=50, overlap=overlap, max_delay=2)
    engine.add("a", 140)
    for _ in range(steps - 1):
        engine.step()
    engine.step(in_between=lambda: engine.abort("a"))
    engine.run()
    engine.assert_empty()
    # Blocks held back for a step in flight may die after the last step; the next one says so.
    engine.add("b", 170)
    engine.run()
    engine.assert_empty()


@pytest.mark.parametrize("is_aborted", [False, True], ids=["ends", "aborted"])
@pytest.mark.parametrize("overlap", [False, True], ids=["sync", "async"])
def test_held_pages_drop_to_zero_with_the_last_request(base_config, overlap, is_aborted):
    engine = make_engine(base_config, 60, budget=400, overlap=overlap)
    requests = [engine.add(str(i), 200 + 40 * i, max_tokens=12) for i in range(2)]
    while min(request.num_output_tokens for request in requests) < 4:
        engine.step()
    totals = engine.stats.reduce()
    assert totals["heterocache_pages_compact"] == (4 + 5) * 4
    assert totals["heterocache_pages_dense"] == 2 * 4
    assert totals["heterocache_pages_host"] == 14
    if is_aborted:
        for request in requests:
            engine.abort(request.request_id)
    engine.run()
    totals = engine.stats.reduce()
    held = {n for key, n in totals.items() if key.startswith("heterocache_pages_")}
    assert held == {0}
    assert totals["heterocache_requests_compacted"] == 2


def run_random_schedule(base, seed, mode):
    rng = random.Random(seed)
    num_blocks = rng.choice([36, 45, 60])
    engine = make_engine(
        base, num_blocks, seed, refusing=0.3, max_delay=4, world_size=2,
        budget=rng.choice([48, 100, 333]), overlap=mode == "async",
        policy="priority" if mode == "priority" else "fcfs", poison=seed % 4 > 0,
    )  # fmt: skip
    stems = [rng.choices(range(3, 190), k=MAX_MODEL_LEN) for _ in range(3)]
    names, requests = itertools.count(), []

    def arrive():
        stem = rng.choice(stems)[: rng.randrange(0, 250)]
        prompt = stem + rng.choices(range(3, 190), k=rng.randrange(1, 100))
        name = f"r{next(names)}"
        max_tokens = rng.randrange(1, MAX_MODEL_LEN - len(prompt))
        requests.append(engine.add(name, prompt, max_tokens, priority=rng.randrange(3)))

    def disturb():
        if rng.random() < 0.02 and engine.scheduler.requests:
            engine.abort(rng.choice(list(engine.scheduler.requests)))

    for _ in range(200):
        if rng.random() < 0.12:
            arrive()
        engine.step(disturb)
    engine.run()
    engine.assert_empty()
    for request in requests:
        if request.status.name != "FINISHED_ABORTED":
            assert request.num_output_tokens == request.max_tokens
    seen = engine.workers.seen
    return Tally(seen) + Tally(preempted=sum(r.num_preemptions for r in requests))


@pytest.mark.parametrize(
    "mode",
    [
        "sync",
        pytest.param("async", marks=pytest.mark.feature("Asynchronous scheduling")),
        pytest.param("priority", marks=pytest.mark.feature("Priority scheduling")),
    ],
)
def test_random_schedules_read_what_was_written_and_leak_nothing(base_config, mode):
    """Arrivals, chunks, shared prefixes, aborts, refusals, slow ranks, and too small a pool."""
    seen = Tally()
    for seed in range(NUM_SCHEDULES):
        seen += run_random_schedule(base_config, seed, mode)
    for event in ("compacted", "refused", "split", "preempted", "resumed", "hits", "poisoned"):
        assert seen[event] >= NUM_SCHEDULES // 2, (event, seen)
