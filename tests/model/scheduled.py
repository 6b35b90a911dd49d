"""vLLM's scheduler with our manager and connector, and workers that the tests play.

The workers keep what every KV slot holds, so a block that is given away too early, published
wrongly, poisoned or reused while it is still read shows up as a wrong value at the next read.
"""

import copy
import functools
import itertools
import random
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from vllm_heterocache.compat import KVCacheSpecRegistry
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

PAGE = 16
MAX_MODEL_LEN = 400
POISON = np.iinfo(np.int64).min
BUDGET, MIN_TOKENS = 0.3, 70
GEOMETRY = {"block_size": PAGE, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32}
HETERO = HeteroSpec(**GEOMETRY, gpu_budget=BUDGET, compact_min_tokens=MIN_TOKENS)
LARGE_BLOCKS = replace(HETERO, block_size=3 * PAGE)


def scheduler_config(model, **options):
    """vLLM's config for `make_scheduler`, with its specs registered."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        load_format="dummy",
        max_model_len=MAX_MODEL_LEN,
        attention_backend="heterocache",
        additional_config={"heterocache": {"gpu_budget": 1.0}},
        **options,
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
    if not isinstance(spec, HeteroSpec):
        config.kv_transfer_config = None
    return (AsyncScheduler if overlap else Scheduler)(
        config,
        KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        StructuredOutputManager(config),
        block_size=spec.block_size,
        hash_block_size=spec.block_size,
        log_stats=True,
    )


@dataclass
class Sequence:
    """What the workers know of a request."""

    tokens: list[int]
    blocks: list[int] = field(default_factory=list)  # kernel blocks
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

    def __init__(self, num_blocks, world_size=1, seed=0, refusing=0.0, max_delay=0, spec=HETERO):
        self.spec = spec
        self.memory = np.full((num_blocks * spec.kernel_blocks, PAGE), POISON)
        self.null_blocks = set(range(spec.kernel_blocks))
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
        assert self.null_blocks.isdisjoint(block_ids), "the null block is poisoned"
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
                self.sequences[name].blocks += self.spec.kernel_block_ids(blocks[0])
            computed[name] = num_computed
        return computed

    def _start(self, sequence, name, block_ids, num_computed) -> None:
        self.seen["hits"] += num_computed > 0
        sequence.blocks = self.spec.kernel_block_ids(block_ids[0])
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
            assert block not in self.null_blocks, "the null block is written"
            self.memory[block, position % PAGE] = value
        sequence.written += values

    def _begin_compaction(self, sequence, order, end) -> None:
        assert sequence.order is None and end == order.num_tokens == len(sequence.tokens)
        assert sequence.announced == order.num_tokens
        num_blocks = self.spec.num_compact_blocks(end)
        assert len(order.block_ids) == num_blocks * self.spec.kernel_blocks > 0
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


class WorkersBesideAnother(Workers):
    """Workers with a connector of vLLM's beside ours."""

    def __init__(self, num_blocks, seed, **options):
        super().__init__(num_blocks, seed=seed, max_delay=2, **options)
        self.received: set[str] = set()  # requests whose KV has come since the last step

    def execute(self, step):
        from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import (
            MultiKVConnectorWorkerMetadata,
        )

        own, of_other = step.kv_connector_metadata.metadata
        self._poison(own.poison)  # before vLLM's worker begins with the step
        self._begin(of_other)
        of_ours = copy.copy(step)
        of_ours.kv_connector_metadata = replace(own, poison=[])
        output = super().execute(of_ours)
        connector = output.kv_connector_output
        connector.finished_recving = self.received or None
        self.received = set()
        answers = connector.kv_connector_worker_meta, self._end(of_other, connector)
        connector.kv_connector_worker_meta = MultiKVConnectorWorkerMetadata(answers)
        return output

    def _begin(self, metadata) -> None:
        """What the other connector's worker does before the forward pass."""

    def _end(self, metadata, connector_output):
        """What the other connector's worker says after the forward pass: written into vLLM's
        output, and returned as its answers."""

    def _due(self) -> int:
        """The step at whose beginning a copy that begins now reads and writes its blocks."""
        return self._step + self.rng.randrange(12)

    def _stats(self):
        return None


class Engine:
    """Scheduler and workers, stepped as vLLM's engine core steps them."""

    def __init__(self, scheduler, workers):
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        init_none_hash(sha256)
        (self.manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
        self._hasher = get_request_block_hasher(self.manager.block_size, sha256)
        self.scheduler, self.workers = scheduler, workers
        self.pool = scheduler.kv_cache_manager.block_pool
        self.most_running = 0
        self.stats = HeteroCacheStats()  # joined over time, as vLLM's log joins them
        self.told: dict[str, dict] = {}  # what a KV connector told of requests that ended
        self._depth = scheduler.vllm_config.max_concurrent_batches
        self._in_flight = deque()

    @property
    def free(self) -> int:
        return self.pool.get_num_free_blocks()

    def add(self, name, prompt, max_tokens=20, priority=0, resumable=False, transfer=None):
        """`transfer`: what a KV connector is told of the request."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        if isinstance(prompt, int):
            prompt = random.Random(name).choices(range(3, 190), k=prompt)
        extra = None if transfer is None else {"kv_transfer_params": transfer}
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
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
                told = {one.request_id: one.kv_transfer_params for one in output.outputs}
                self.told |= {name: params for name, params in told.items() if params}
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
            dead = self.workers.spec.kernel_block_ids(
                block.block_id for block in free if block.block_hash is None
            )
            assert (self.workers.memory[dead] == POISON).all()

    def assert_empty(self):
        assert self.free == self.pool.num_gpu_blocks - 1
        manager, ledger = self.manager, self.manager.ledger
        assert manager.prompts == {} and not any(manager.req_to_blocks.values())
        assert ledger.tickets == [] and ledger.take_orders() == [] and ledger.take_starts() == []


def make_engine(
    base, num_blocks, seed=0, refusing=0.0, max_delay=0, world_size=1, spec=HETERO, **options
):
    scheduler = make_scheduler(base, num_blocks, spec, world_size=world_size, **options)
    return Engine(scheduler, Workers(num_blocks, world_size, seed, refusing, max_delay, spec))
