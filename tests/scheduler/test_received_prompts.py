"""Prompts that one engine sends and another one receives, under vLLM's own schedulers, with late
reads played by the test.

A read takes place when it ends, not when it begins. So a block that either engine reuses too early
shows up as a wrong value at the next read.
"""

import dataclasses
import random
from types import SimpleNamespace

import pytest
from scheduled import (
    HETERO,
    MIN_TOKENS,
    PAGE,
    Engine,
    WorkersBesideAnother,
    make_scheduler,
    scheduler_config,
)

from vllm_heterocache.connectors.nixl import PackedNixlConnector

RECOMPUTED = 40
SPEC = dataclasses.replace(HETERO, recomputed_tokens=RECOMPUTED)
SENT, PREFIX = "sent-", 150


def config_of(model, role):
    return scheduler_config(
        model,
        kv_transfer_config={
            "kv_connector": "NixlConnector",
            "kv_role": role,
            "engine_id": role,
            "kv_load_failure_policy": "recompute",
        },
    )


@pytest.fixture(scope="module")
def configs(tiny_model):
    return config_of(tiny_model, "kv_producer"), config_of(tiny_model, "kv_consumer")


class LateReads(WorkersBesideAnother):
    """Workers that read blocks of other engines."""

    def __init__(self, num_blocks, seed, failing=0.0):
        super().__init__(num_blocks, seed, spec=SPEC)
        self.failing = failing
        self.others: dict[str, LateReads] = {}  # by engine id
        self.under_way: list[tuple[int, str, object]] = []
        self.was_read: set[str] = set()  # requests that others have read since the last step
        self.failed: set[str] = set()
        self.num_received: dict[str, int] = {}  # blocks
        self.compacted: set[str] = set()

    def _begin(self, metadata):
        for name, read in metadata.reqs_to_recv.items():
            self.under_way.append((self._due(), name, read))
        due = [one for one in self.under_way if one[0] <= self._step]
        self.under_way = [one for one in self.under_way if one[0] > self._step]
        for _, name, read in due:
            self._read_blocks(name, read)

    def _read_blocks(self, name, read):
        other = self.others[read.remote.engine_id]
        if read.local_block_ids:
            (blocks,), (of_other,) = read.local_block_ids, read.remote.block_ids
            if self.rng.random() < self.failing:
                self.failed.add(name)
            else:
                # as NIXL does it: the last blocks, as the first ones may be prefix cache
                self.memory[blocks] = other.memory[of_other[-len(blocks) :]]
                self.num_received[name] = len(blocks)
        if read.awaiting_kvs:
            self.received.add(name)
        other.was_read.add(read.remote.request_id)

    def _end(self, metadata, connector_output):
        connector_output.finished_sending = self.was_read or None
        connector_output.failed_recving = self.failed
        self.was_read, self.failed = set(), set()

    def _begin_compaction(self, sequence, order, end):
        super()._begin_compaction(sequence, order, end)
        self.compacted.add(order.request_id)


class Pair:
    """An engine that prefills, and one that decodes."""

    def __init__(self, configs, num_blocks, seed=0, failing=0.0, **options):
        self.elsewhere, self.here = (
            self._engine(config, num_blocks, seed, failing, options) for config in configs
        )
        self.here.workers.others["kv_producer"] = self.elsewhere.workers
        self.computed: dict[str, int] = {}
        execute = self.here.workers.execute

        def count(step):
            for name, number in step.num_scheduled_tokens.items():
                self.computed[name] = self.computed.get(name, 0) + number
            return execute(step)

        self.here.workers.execute = count

    def _engine(self, config, num_blocks, seed, failing, options):
        scheduler = make_scheduler(config, num_blocks, SPEC, **options)
        engine = Engine(scheduler, LateReads(num_blocks, seed, failing))
        # of several connectors: not joined here
        engine.stats = SimpleNamespace(aggregate=lambda stats: None)
        assert isinstance(scheduler.connector.sub_connectors[1], PackedNixlConnector)
        return engine

    def send(self, name, prompt):
        """Let the one engine prefill the prompt for the other."""
        transfer = {"do_remote_decode": True}
        self.elsewhere.add(SENT + name, prompt, max_tokens=1, transfer=transfer)

    def receive(self, name, prompt, max_tokens=20):
        """Let the other engine go on with a prompt that was sent."""
        transfer = self.elsewhere.told.pop(SENT + name)
        return self.here.add(name, prompt, max_tokens, transfer=transfer)

    def step(self):
        self.elsewhere.step()
        self.here.step()

    def run(self):
        for _ in range(5000):
            engines = self.elsewhere, self.here
            if not any(one.scheduler.has_requests() or one._in_flight for one in engines):
                return
            self.step()
        raise AssertionError("requests never end")

    def assert_empty(self):
        self.elsewhere.assert_empty()
        self.here.assert_empty()


def prompt_of(num_tokens, seed=3):
    return random.Random(seed).choices(range(3, 190), k=num_tokens)


@pytest.mark.feature("Prefill and decode apart")
@pytest.mark.parametrize("num_tokens", [MIN_TOKENS, 300, 303, 304])
@pytest.mark.parametrize("overlap", [False, True], ids=["sync", "async"])
def test_a_prompt_is_received_up_to_the_tokens_that_selection_looks_at(
    configs, overlap, num_tokens
):
    pair, prompt = Pair(configs, 60, overlap=overlap), prompt_of(num_tokens)
    pair.send("a", prompt)
    while SENT + "a" not in pair.elsewhere.told:
        pair.step()
    request = pair.receive("a", prompt)
    pair.run()
    num_blocks = (num_tokens - RECOMPUTED) // PAGE
    assert pair.here.workers.num_received == {"a": num_blocks}
    of_prompt = num_tokens - PAGE * num_blocks
    # asynchronous scheduling may compute a token behind the last one
    assert of_prompt <= pair.computed["a"] - request.num_output_tokens + 1 <= of_prompt + 1
    assert pair.here.workers.compacted == {"a"} and not pair.elsewhere.workers.compacted
    pair.assert_empty()


def test_a_prompt_that_stays_dense_is_received_whole(configs):
    pair, prompt = Pair(configs, 60), prompt_of(MIN_TOKENS - 1)
    pair.send("a", prompt)
    while SENT + "a" not in pair.elsewhere.told:
        pair.step()
    pair.receive("a", prompt)
    pair.run()
    assert pair.here.workers.num_received == {"a": -(-len(prompt) // PAGE)}
    assert not pair.here.workers.compacted
    pair.assert_empty()


def test_blocks_are_held_until_they_are_read(configs):
    pair, prompt = Pair(configs, 60), prompt_of(300)
    pair.send("a", prompt)
    for _ in range(50):
        pair.elsewhere.step()
    held = pair.elsewhere.pool.num_gpu_blocks - 1 - pair.elsewhere.free
    assert held == -(-300 // PAGE)
    pair.receive("a", prompt)
    pair.run()
    pair.assert_empty()


@pytest.mark.feature("Prefill and decode apart")
@pytest.mark.parametrize("overlap", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_received_is_what_dense_attention_computed(configs, seed, overlap):
    """Prompts with shared beginnings, in pools that hold few of them, beside others that each
    engine prefills and compacts by itself; some are aborted, and some reads fail."""
    chance = random.Random(seed)
    num_blocks, failing = chance.randrange(45, 70), 0.2 * (seed % 2)
    pair = Pair(configs, num_blocks, seed, failing, overlap=overlap, budget=100)
    prefixes = [chance.choices(range(3, 190), k=PREFIX) for _ in range(6)]
    waiting, aborted = {}, set()
    for index in range(60):
        tail = chance.choices(range(3, 190), k=chance.randrange(1, 150))
        prompt = chance.choice(prefixes)[: chance.randrange(20, PREFIX + 1)] + tail
        kind = chance.random()
        if kind < 0.7:
            waiting[str(index)] = prompt
            pair.send(str(index), prompt)
        else:
            engine = pair.here if kind < 0.85 else pair.elsewhere
            engine.add(f"own-{index}", prompt, max_tokens=chance.randrange(1, 30))
        for _ in range(chance.randrange(8)):
            pair.step()
        for name in [name for name in waiting if SENT + name in pair.elsewhere.told]:
            pair.receive(name, waiting.pop(name), max_tokens=chance.randrange(1, 30))
            if chance.random() < 0.2:
                aborted.add(name)
        for name in sorted(aborted):
            if chance.random() < 0.3 and name in pair.here.scheduler.requests:
                pair.here.abort(name)
                aborted.remove(name)
    while waiting:
        pair.step()
        for name in [name for name in waiting if SENT + name in pair.elsewhere.told]:
            pair.receive(name, waiting.pop(name))
    pair.run()
    here, elsewhere = pair.here.workers, pair.elsewhere.workers
    assert len(here.num_received) > 10 and here.compacted & here.num_received.keys()
    assert elsewhere.compacted and not any(name.startswith(SENT) for name in elsewhere.compacted)
    pair.assert_empty()
