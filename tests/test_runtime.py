from __future__ import annotations

import json
import random

import pytest
import torch
from worker_fixtures import NOBODYS_BLOCK, PAGE, World, assignment_of, mixed_assignment

from vllm_heterocache.request_state import CompactionOrder
from vllm_heterocache.roles import all_full

PAIR = assignment_of("PS", leaders={(0, 1): (0, 0)})


def resident_pages(world: World, request_id: str) -> dict[tuple[int, int], list[int]]:
    heads = [(i, j) for i in range(world.num_layers) for j in range(world.num_kv_heads)]
    return {head: sorted(world.resident(request_id, *head)) for head in heads}


def attention_over(world: World, request_id: str, resident) -> torch.Tensor:
    """[L, Hq, D], float64, token by token: each head over its resident pages and the tail."""
    books = world.books[request_id]
    tail = list(range(books.prompt_tokens // PAGE * PAGE, books.num_tokens))
    output = torch.empty(books.queries.shape, dtype=torch.float64)
    for layer in range(world.num_layers):
        for q_head in range(output.shape[1]):
            head = q_head // world.group
            tokens = [p * PAGE + i for p in resident[layer, head] for i in range(PAGE)] + tail
            keys, values = books.kv[layer, head, tokens].double().chunk(2, dim=-1)
            weights = (keys @ books.queries[layer, q_head].double() * world.scale).exp()
            output[layer, q_head] = (weights[:, None] * values).sum(0) / weights.sum()
    return output


def assert_outputs(world: World, request_id: str, expected: torch.Tensor) -> None:
    outputs = world.books[request_id].outputs.double()
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)


# T a multiple of the page size, one more, one less, and between
@pytest.mark.parametrize("num_tokens", [320, 321, 335, 373])
def test_decode_reads_the_resident_pages_and_everything_after_the_full_prompt_pages(num_tokens):
    world = World(mixed_assignment(), seed=num_tokens)
    world.step(prefill={"a": num_tokens})
    for _ in range(20):  # crosses a block border, and drifts now and then
        resident = resident_pages(world, "a")
        world.step(decode=["a"])
        assert_outputs(world, "a", attention_over(world, "a", resident))
    assert world.runtime.counters.pages_fetched > 0


@pytest.mark.parametrize("num_tokens", [16, 17, 31, 32, 250])
def test_a_budget_of_one_keeps_everything_and_decodes_as_dense_attention_does(num_tokens):
    world = World(all_full(3, 2), gpu_budget=1.0, host_pages=0)
    world.step(prefill={"a": num_tokens, "b": num_tokens})
    assert world.done == ["a", "b"]
    num_pages = num_tokens // PAGE
    for layer in range(3):
        for head in range(2):
            assert world.resident("a", layer, head) == list(range(num_pages))
    for _ in range(18):
        world.step(decode=["a", "b"])
        for request_id in ("a", "b"):
            assert_outputs(world, request_id, world.dense_attention(request_id))
    assert world.runtime.counters.drift_checks == 0
    assert world.runtime.counters.pages_offloaded == 0


def test_a_compacted_request_at_full_budget_gives_bit_for_bit_what_its_dense_twin_gives():
    world = World(all_full(2, 3), gpu_budget=1.0, host_pages=0)
    world.step(prefill={"compact": 93})
    world.step(prefill={"dense": 93}, compact=False)
    dense, compact = world.books["dense"], world.books["compact"]
    dense.kv = compact.kv.clone()
    for token in range(93):
        world.pool[dense.blocks[token // PAGE], :, :, token % PAGE] = dense.kv[:, :, token]
    queries = world.random(2, 6, 8)
    world.step(decode=["compact"], queries={"compact": queries})
    world.random = lambda *shape: compact.kv[:, :, -1:]  # the same new token
    world.step(decode=["dense"], queries={"dense": queries})
    assert torch.equal(dense.outputs, compact.outputs)


def test_compaction_answers_and_gives_the_prompt_blocks_back():
    world = World(mixed_assignment())
    world.step(prefill={"a": 373})
    assert world.done == ["a"]
    # 23 full blocks went back, the partial one stays, 17 = ceil(.7 * 23) are compact
    assert world.num_blocks - len(world.free) == 1 + 17
    assert world.books["a"].blocks[:-1] == [NOBODYS_BLOCK] * 23
    assert world.runtime.take_answers() == ([], [])
    counters = world.runtime.counters
    assert counters.requests_compacted == 1 and counters.pages_offloaded == 5 * 23
    world.runtime.after_forward()  # a step without an order compacts nothing again
    world.check()
    assert counters.requests_compacted == 1


def test_heads_get_the_pages_of_their_budgets_and_the_rest_is_spare():
    world = World(mixed_assignment())
    world.step(prefill={"a": 373})
    sizes = [[len(world.resident("a", i, j)) for j in range(3)] for i in range(3)]
    # 17 * 9 = 153 pages, 3 * 23 for full heads, 84 // 16 = 5 spare, 79 by weight
    assert sum(map(sum, sizes)) == 153 - 5
    assert sizes[0][0] == sizes[1][1] == sizes[1][2] == 23
    assert sizes[0][1] < sizes[2][2] < sizes[0][2] < sizes[2][0] < sizes[1][0]
    assert world.compacted("a").idle_spares.numel() == 5


def test_every_head_keeps_sinks_and_recent_pages():
    world = World(mixed_assignment(), options={"sink_pages": 2, "recent_pages": 4})
    world.step(prefill={"a": 416})
    for _ in range(4):
        for layer in range(3):
            for head in range(3):
                assert {0, 1, 22, 23, 24, 25} <= set(world.resident("a", layer, head))
        world.step(decode=["a"], queries={"a": 4 * world.random(3, 6, 8)})
    assert world.runtime.counters.pages_fetched > 0


def test_a_request_stays_dense_when_the_host_pool_is_full_and_the_reason_is_counted():
    world = World(PAIR, host_pages=50)
    world.step(prefill={"a": 640})
    world.step(prefill={"b": 640}, decode=["a"])
    assert (world.done, world.refused) == (["a"], ["b"])
    for _ in range(3):
        world.step(decode=["a", "b"])
        assert_outputs(world, "b", world.dense_attention("b"))
    counters = world.runtime.counters
    assert counters.requests_compacted == 1
    assert counters.decode_rows == {("compact", "compacted"): 4, ("dense", "host_pool_full"): 3}
    # once there is room the next request is compacted; a name used again starts afresh
    world.step(gone=["a", "b"])
    world.step(prefill={"b": 640})
    world.step(decode=["b"])
    assert world.done == ["a", "b"]
    assert counters.decode_rows["compact", "compacted"] == 5
    world.step(gone=["b"])
    world.step(prefill={"b": 63}, compact=False)
    world.step(decode=["b"])
    assert counters.decode_rows["dense", "short_prompt"] == 1


def test_short_prompts_stay_dense_and_are_counted():
    world = World(PAIR)
    world.step(prefill={"short": 63}, compact=False)
    world.step(decode=["short"])
    assert world.runtime.counters.decode_rows == {("dense", "short_prompt"): 1}
    assert_outputs(world, "short", world.dense_attention("short"))
    world.step(gone=["short"])
    assert len(world.free) == world.num_blocks


def test_rows_that_still_prefill_are_not_decode_rows():
    world = World(PAIR)
    world.runtime.begin_step([], [])
    (row,) = world.runtime.rows(["a"], [False])
    assert row.slot == world.runtime.table.dense_slot
    assert row.request is None and row.capture is None
    assert not world.runtime.counters.decode_rows


@pytest.mark.parametrize("when", ["after compaction", "in the middle of decode"])
def test_a_request_that_is_preempted_releases_everything_and_can_come_back(when):
    world = World(mixed_assignment(), host_pages=200)
    world.step(prefill={"a": 373})
    if when == "in the middle of decode":
        for _ in range(3):
            world.step(decode=["a"], queries={"a": 4 * world.random(3, 6, 8)})
    world.step(gone=["a"])
    assert len(world.free) == world.num_blocks
    assert world.runtime.host_pool.num_free == 200
    assert bool((world.runtime.table.entries == -1).all())
    assert world.runtime.snapshot()["requests"] == {}
    world.step(prefill={"a": 390})  # the replayed prompt holds what was generated
    resident = resident_pages(world, "a")
    world.step(decode=["a"])
    assert_outputs(world, "a", attention_over(world, "a", resident))


def test_a_request_that_never_was_here_may_leave():
    world = World(PAIR)
    world.step(gone=[])
    world.runtime.begin_step(["aborted before its first step"], [])
    world.check()


def test_orders_of_a_step_are_forgotten_with_it():
    world = World(PAIR)
    order = CompactionOrder(1, "a", 640, list(range(28)))
    world.runtime.begin_step([], [order])
    (row,) = world.runtime.rows(["a"], [False])
    assert row.capture.order == order and row.capture.last_query.shape == (1, 4, 8)
    world.runtime.begin_step([], [])
    (row,) = world.runtime.rows(["a"], [False])
    assert row.capture is None
    world.runtime.after_forward()
    assert world.runtime.take_answers() == ([], [])


def test_the_decode_kernel_writes_the_scores_of_leading_pivots_only():
    world = World(mixed_assignment())
    world.step(prefill={"a": 373})
    request = world.compacted("a")
    buffers = [world.runtime.score_buffers(request, layer) for layer in range(3)]
    assert [sorted(b) for b in buffers] == [[0], [2], []]
    buffers[1][2].fill_(7)
    assert bool((request.scores[1] == 7).all()) and not bool((request.scores[0] == 7).any())


def test_random_traffic_loses_nothing():
    """World.step checks all books and page contents after every step."""
    rng = random.Random(11)
    world = World(mixed_assignment(), num_blocks=100, host_pages=260, max_num_seqs=4, seed=5)
    names = iter(range(10**6))
    counters = world.runtime.counters
    for _ in range(70):
        leaving = [r for r in world.books if rng.random() < 0.15]
        staying = [r for r in world.books if r not in leaving]
        prefill = {}
        compact = rng.random() < 0.8
        if len(staying) < 4 and rng.random() < 0.6:
            prefill[f"request-{next(names)}"] = rng.randint(176, 280)
        decode = rng.sample(staying, len(staying))
        queries = {r: 3 * world.random(3, 6, 8) for r in decode if rng.random() < 0.7}
        world.step(prefill, decode, leaving, queries=queries, compact=compact)
    assert counters.requests_compacted > 10 and world.refused and counters.pages_fetched > 50
    world.step(gone=list(world.books))
    assert len(world.free) == world.num_blocks
    assert world.runtime.host_pool.num_free == 260


def test_snapshot_counts_the_pages_each_request_holds():
    world = World(mixed_assignment())
    world.step(prefill={"a": 373, "b": 330})
    world.step(decode=["a"])
    snapshot = json.loads(json.dumps(world.runtime.snapshot()))
    tickets = [str(world.books[r].order.ticket) for r in "ab"]
    # compact, host, spare: a as above; b: 20 pages, 14 * 9 = 126, (126 - 60) // 16 = 4 spare
    assert snapshot["requests"] == {tickets[0]: [148, 115, 5], tickets[1]: [122, 100, 4]}
    assert snapshot["pages_per_block"] == 9
    assert snapshot["requests_compacted"] == 2 and snapshot["pages_offloaded"] == 215
    assert snapshot["drift_checks"] == 2  # two leading pivots, one request that decoded
    assert snapshot["decode_rows"] == {"compact|compacted": 1}


def lose_a_spare(world: World) -> None:
    request = world.compacted("a")
    request.idle_spares = request.idle_spares[1:]


def hold_a_spare_twice(world: World) -> None:
    request = world.compacted("a")
    request.idle_spares[0] = request.idle_spares[1]


def lose_a_host_page(world: World) -> None:
    request = world.compacted("a")
    request.host_pages = request.host_pages[:, 1:]


def forget_the_request(world: World) -> None:
    world.runtime._requests.clear()


@pytest.mark.parametrize(
    "corrupt",
    [lose_a_spare, hold_a_spare_twice, lose_a_host_page, forget_the_request],
    ids=lambda f: f.__name__,
)
def test_check_integrity_detects_lost_pages(corrupt):
    world = World(mixed_assignment())
    world.step(prefill={"a": 373})
    world.runtime.check_integrity()
    corrupt(world)
    with pytest.raises(AssertionError):
        world.runtime.check_integrity()
