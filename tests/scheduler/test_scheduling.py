"""HeteroManager and HeteroConnector under vLLM's own scheduler, with workers played by the test."""

import itertools
import random
from collections import Counter as Tally

import pytest
from scheduled import (
    BUDGET,
    GEOMETRY,
    HETERO,
    LARGE_BLOCKS,
    MAX_MODEL_LEN,
    PAGE,
    Engine,
    make_engine,
    make_scheduler,
    scheduler_config,
)

from vllm_heterocache.compat import FullAttentionSpec
from vllm_heterocache.scheduler.prompt import PromptState
from vllm_heterocache.startup.capacity import steady_state_requests

NUM_SCHEDULES = 12  # of each kind


@pytest.fixture(scope="module")
def base_config(tiny_model):
    return scheduler_config(tiny_model)


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


def test_blocks_of_several_pages_come_back_whole(base_config):
    """200 tokens, 4 blocks of 3 pages, are compacted into 2 blocks; 8 tokens stay behind them."""
    engine = make_engine(base_config, 60, spec=LARGE_BLOCKS, budget=50)
    request = engine.add("a", 200, max_tokens=60)
    start, used = engine.free, []
    while request.status.name != "FINISHED_LENGTH_CAPPED":
        engine.step()
        used.append(start - engine.free)
    assert max(used) == 5 + 2 and set(used[-50:-1]) == {2 + 1, 2 + 2}
    engine.assert_empty()


@pytest.mark.parametrize("num_tokens", [95, 96, 143, 144])
def test_prompts_that_would_save_no_block_stay_dense(base_config, num_tokens):
    """From 2 full blocks on, a budget of 0.3 saves one."""
    engine = make_engine(base_config, 60, spec=LARGE_BLOCKS, budget=400)
    engine.add("a", num_tokens)
    engine.run()
    assert engine.workers.seen["compacted"] == (num_tokens >= 96)
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
    spec = LARGE_BLOCKS if mode == "large-blocks" else HETERO
    engine = make_engine(
        base, num_blocks // spec.kernel_blocks, seed, refusing=0.3, max_delay=4, world_size=2,
        spec=spec, budget=rng.choice([48, 100, 333]), overlap=mode == "async",
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
        "large-blocks",
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
