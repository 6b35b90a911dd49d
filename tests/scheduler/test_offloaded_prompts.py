"""vLLM's offloading beside ours, under vLLM's own scheduler, with late copies played by the test.

A copy reads and writes its blocks when it ends, not when it begins. So a block that is reused while
a copy reads it shows up as a wrong value once it is loaded.
"""

import copy
import random
from types import SimpleNamespace

import pytest
from scheduled import PAGE, Engine, WorkersBesideAnother, make_scheduler, scheduler_config

from vllm_heterocache.connectors.multi import HeteroMultiConnector

BLOCK_BYTES = 2 * PAGE * 2 * 16 * 4
PREFIX = 150


@pytest.fixture(scope="module")
def offloading_config(tiny_model):
    return scheduler_config(
        tiny_model,
        kv_transfer_config={
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "cpu_bytes_to_use": 300 * BLOCK_BYTES,
                "spec_name": "CPUOffloadingSpec",
            },
        },
    )


class LateCopies(WorkersBesideAnother):
    """Workers that also copy blocks to the host and back."""

    def __init__(self, num_blocks, seed):
        super().__init__(num_blocks, seed)
        self.host: dict[int, object] = {}
        self.waiting: dict[int, object] = {}  # stores that begin with the next step
        self.under_way: dict[int, tuple[int, object, bool]] = {}  # due, job, is a store
        self.ended: dict[int, int] = {}
        self.num_loads = self.num_stores = 0

    def _end(self, jobs, connector_output):
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
            OffloadingWorkerMetadata,
        )

        self.waiting.update(jobs.store_jobs)
        ended, self.ended = self.ended, {}
        return OffloadingWorkerMetadata(completed_jobs=ended)

    def _begin(self, jobs):
        """As vLLM's worker does at the beginning of a step."""
        for job_id in jobs.jobs_to_flush or ():
            if job_id in jobs.store_jobs:
                self.waiting[job_id] = jobs.store_jobs.pop(job_id)
        for job_id, job in self.waiting.items():
            self.under_way[job_id] = (self._due(), job, True)
        self.waiting = {}
        for job_id in jobs.jobs_to_flush or ():
            self._finish(job_id)
        for job_id, job in jobs.load_jobs.items():
            self.under_way[job_id] = (self._due(), job, False)
        for job_id in [j for j, (due, *_) in self.under_way.items() if due <= self._step]:
            self._finish(job_id)

    def _finish(self, job_id):
        if job_id not in self.under_way:
            return
        _, job, is_store = self.under_way.pop(job_id)
        pairs = zip(job.src_spec.block_ids.tolist(), job.dst_spec.block_ids.tolist(), strict=True)
        for source, target in pairs:
            if is_store:
                self.host[target] = self.memory[source].copy()
            else:
                self.memory[target] = self.host[source]
        self.ended[job_id] = 1
        self.num_stores += is_store
        if not is_store:
            self.num_loads += 1
            self.received.add(job.req_id)


def make_engine(config, num_blocks, seed=0, **options):
    engine = Engine(make_scheduler(config, num_blocks, **options), LateCopies(num_blocks, seed))
    engine.stats = SimpleNamespace(aggregate=lambda stats: None)
    assert type(engine.scheduler.connector) is HeteroMultiConnector
    return engine


@pytest.mark.parametrize("overlap", [False, True], ids=["sync", "async"])
def test_a_prompt_that_the_pool_forgot_is_loaded_and_not_prefilled(offloading_config, overlap):
    engine = make_engine(offloading_config, 60, overlap=overlap, budget=64)
    prompt = random.Random(3).choices(range(3, 190), k=300)
    engine.add("a", prompt)
    engine.run()
    for i in range(4):
        engine.add(f"other{i}", 300)
    engine.run()
    computed = []
    execute = engine.workers.execute
    engine.workers.execute = lambda step: (
        computed.append(step.num_scheduled_tokens.get("again", 0)) or execute(step)
    )
    again = engine.add("again", prompt)
    engine.run()
    assert engine.workers.num_loads == 1 and engine.workers.seen["compacted"] == 6
    # the last block and what is decoded
    assert sum(computed) <= 300 - 288 + again.num_output_tokens + 1
    engine.assert_empty()


@pytest.mark.parametrize("overlap", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_loaded_is_what_dense_attention_computed(offloading_config, seed, overlap):
    """Prompts with shared beginnings come and come back in a pool that holds few of them."""
    chance = random.Random(seed)
    num_blocks, config = chance.randrange(45, 70), copy.deepcopy(offloading_config)
    _, offloading = config.kv_transfer_config.kv_connector_extra_config["connectors"]
    if seed % 2:  # a host that is often too full for another copy
        offloading["kv_connector_extra_config"]["cpu_bytes_to_use"] = 25 * BLOCK_BYTES
    engine = make_engine(config, num_blocks, seed, overlap=overlap, budget=100)
    prefixes = [chance.choices(range(3, 190), k=PREFIX) for _ in range(6)]
    for index in range(60):
        tail = chance.choices(range(3, 190), k=chance.randrange(1, 150))
        prompt = chance.choice(prefixes)[: chance.randrange(20, PREFIX + 1)] + tail
        engine.add(str(index), prompt, max_tokens=chance.randrange(1, 30))
        for _ in range(chance.randrange(8)):
            engine.step()
    engine.run()
    workers = engine.workers
    assert workers.num_loads > 0 and workers.num_stores > 0 and workers.seen["compacted"] > 0
    engine.assert_empty()
