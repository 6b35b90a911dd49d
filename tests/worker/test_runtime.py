from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from random_traffic import RandomTraffic
from world import (
    NOBODYS_BLOCK,
    PAGE,
    StepRow,
    World,
    assert_outputs,
    assignment_of,
    attention_over,
    mixed_assignment,
    resident_pages,
)

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.heads.recipes import all_full
from vllm_heterocache.kernels.kv_scales import FP8_DTYPES
from vllm_heterocache.messages import CompactionOrder, PrefillStart
from vllm_heterocache.policies import make_policy
from vllm_heterocache.worker.batch import Batch, KeptQueries
from vllm_heterocache.worker.fallbacks import CAPTURE_LIMIT
from vllm_heterocache.worker.row_counter import RowCounter
from vllm_heterocache.worker.runtime import LARGE_BYTE
from vllm_heterocache.worker.tables.page_table import PageTable
from vllm_heterocache.worker.worker import HeteroCacheWorkerMixin

PAIR = assignment_of("PS", leaders={(0, 1): (0, 0)})


# T a multiple of the page size, one more, one less, and between
@pytest.mark.parametrize(
    ("num_tokens", "page_dtype"),
    [*((n, torch.float32) for n in (320, 321, 335, 373)), *((325, one) for one in FP8_DTYPES)],
    ids=str,
)
def test_decode_reads_the_resident_pages_and_everything_after_the_full_prompt_pages(
    num_tokens, page_dtype
):
    world = World(mixed_assignment(), seed=num_tokens, page_dtype=page_dtype)
    world.step(prefill={"a": num_tokens})
    for _ in range(20):  # crosses a block border, and drifts now and then
        world.step(decode=["a"])
        # what the step before has fetched became visible when this one began
        assert_outputs(world, "a", attention_over(world, "a", resident_pages(world, "a")))
    assert world.counted("pages_fetched") > 0


@pytest.mark.parametrize("num_tokens", [16, 17, 31, 32, 250])
def test_a_budget_of_one_keeps_everything_and_decodes_as_dense_attention_does(num_tokens):
    world = World(all_full(3, 2), gpu_budget=1.0, host_blocks=0)
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
    assert world.counted("drift_checks") == world.counted("pages_offloaded") == 0


def test_a_compacted_request_at_full_budget_gives_bit_for_bit_what_its_dense_twin_gives():
    world = World(all_full(2, 3), gpu_budget=1.0, host_blocks=0)
    world.step(prefill={"compact": 93})
    world.step(prefill={"dense": 93}, compact=False)
    dense, compact = world.books["dense"], world.books["compact"]
    dense.kv = compact.kv.clone()
    for token in range(93):
        world.pool[dense.blocks[token // PAGE], :, :, token % PAGE] = dense.kv[:, :, token]
    queries = world.random(2, 6, 8)
    world.step(decode=["compact"], queries={"compact": queries})
    world.random = lambda *shape: compact.kv[:, :, -1:]  # the same new token
    world.padding = 0
    world.step(decode=["dense"], queries={"dense": queries})
    assert torch.equal(dense.outputs, compact.outputs)


def test_a_step_that_ends_behind_its_answers_is_answered_for_in_the_next_one():
    world = World(mixed_assignment(), answers_first=True)
    world.step(prefill={"a": 373})
    assert world.done == []
    world.step(decode=["a"])
    assert world.done == ["a"]
    assert world.num_blocks - len(world.free) == 1 + 17
    world.step(decode=["a"])
    assert world.counted("requests_compacted") == 1
    assert world.counted("pages_offloaded") == 5 * 23
    world.check()


@pytest.mark.parametrize("tells_starts", [True, False])
def test_compaction_answers_and_gives_the_prompt_blocks_back(tells_starts):
    world = World(mixed_assignment(), tells_starts=tells_starts)
    world.step(prefill={"a": 373})
    assert world.done == ["a"]
    # 23 full blocks went back, the partial one stays, 17 = ceil(.7 * 23) are compact
    assert world.num_blocks - len(world.free) == 1 + 17
    assert world.books["a"].blocks[:-1] == [NOBODYS_BLOCK] * 23
    assert world.runtime.take_answers() == ([], [])
    assert world.counted("requests_compacted") == 1
    assert world.counted("pages_offloaded") == 5 * 23
    world.runtime.after_forward()  # a step without an order compacts nothing again
    world.check()
    assert world.counted("requests_compacted") == 1


def complete_prefill(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step completes prompt "a", and the next one is not there yet."""
    with monkeypatch.context() as patch:
        patch.setattr(world.runtime, "compact_finished", lambda: None)
        world.step(prefill={"a": 640})


def test_a_prompt_is_compacted_when_the_next_step_begins(monkeypatch):
    """So that its first token waits for nothing."""
    world = World(PAIR)
    complete_prefill(world, monkeypatch)
    assert world.counted("requests_compacted") == 0 and world.done == []
    world.step(decode=["a"])
    assert world.counted("requests_compacted") == 1 and world.done == ["a"]
    assert world.snapshot_rows() == {"compact|compacted": 1}


def test_a_prompt_whose_request_has_left_is_not_compacted(monkeypatch):
    world = World(PAIR)
    complete_prefill(world, monkeypatch)
    world.step(gone=["a"])
    assert world.counted("requests_compacted") == 0
    assert len(world.free) == world.num_blocks


def test_heads_get_the_pages_of_their_budgets_and_the_rest_is_spare():
    world = World(mixed_assignment())
    world.step(prefill={"a": 373})
    sizes = [[len(world.resident("a", i, j)) for j in range(3)] for i in range(3)]
    # 17 * 9 = 153 pages, 3 * 23 for full heads, 84 // 16 = 5 spare, 79 by weight
    assert sum(map(sum, sizes)) == 153 - 5
    assert sizes[0][0] == sizes[1][1] == sizes[1][2] == 23
    assert sizes[0][1] < sizes[2][2] < sizes[0][2] < sizes[2][0] < sizes[1][0]
    assert world.num_spares("a") == 5


def test_every_head_keeps_sinks_and_recent_pages():
    world = World(mixed_assignment(), options={"sink_pages": 2, "recent_pages": 4})
    world.step(prefill={"a": 416})
    for _ in range(6):
        for layer in range(3):
            for head in range(3):
                assert {0, 1, 22, 23, 24, 25} <= set(world.resident("a", layer, head))
        world.step(decode=["a"], queries={"a": 4 * world.random(3, 6, 8)})
    assert world.counted("pages_fetched") > 0


# --- the last prompt token's query ---


@pytest.mark.parametrize("chunks", [(373,), (200, 173), (372, 1), (1, 372), (16, 356, 1)], ids=str)
def test_chunks_of_any_size_compact_alike(chunks):
    """A chunk of one token is a decode row, whose query the decode kernel stores by itself."""
    kept = []
    for sizes in ((373,), chunks):
        world = World(mixed_assignment(), seed=7)
        world.step(prefill={"other": 200})
        world.step(prefill={"a": 373}, chunk={"a": sizes[0]}, decode=["other"])
        a, other = world.books["a"], world.books["other"]
        for size in sizes[1:]:
            assert "a" not in world.done
            world.step(chunk={"a": size}, decode=["other"])
        assert world.done == ["other", "a"]
        kept.append((a.kv[..., 0], a.last_query, resident_pages(world, "a")))
        assert other.prompt_tokens == 200
    assert torch.equal(kept[0][0], kept[1][0]) and torch.equal(kept[0][1], kept[1][1])
    assert kept[0][2] == kept[1][2]


def test_several_prompts_complete_in_one_step_each_by_its_own_query():
    """Rows: two decodes, a last chunk of one token, two whole prompts, one of them short."""
    kept = []
    for together in (True, False):
        world = World(mixed_assignment(), seed=3, num_blocks=200)
        world.step(prefill={"a": 300, "b": 210, "c": 230, "d": 190}, chunk=dict.fromkeys("abcd", 5))
        rest = {"a": 295, "b": 205, "c": 225, "d": 185}
        if together:
            world.step(chunk={"a": 294})
            world.step(chunk={"b": 205, "a": 1, "c": 225, "d": 185})
        else:
            for request_id, size in rest.items():
                world.step(chunk={request_id: size})
        assert sorted(world.done) == list("abcd")
        kept.append([resident_pages(world, r) for r in "abcd"])
    assert kept[0] == kept[1]


def test_prompts_that_stay_dense_are_warned_of_once(logged):
    world = World(mixed_assignment(), num_query_windows=1, num_blocks=200)
    world.step(prefill={"a": 200, "b": 210, "c": 220})
    assert world.refused == ["b", "c"]
    (line,) = logged()
    assert "request b" in line and "--max-num-seqs" in line and CAPTURE_LIMIT in line


def test_more_prompts_than_a_step_can_capture_stay_dense_and_are_counted():
    world = World(mixed_assignment(), num_query_windows=2, num_blocks=200)
    world.step(prefill={"a": 200, "b": 210, "c": 220})
    assert (world.done, world.refused) == (["a", "b"], ["c"])
    world.step(decode=["a", "b", "c"])
    assert_outputs(world, "c", world.dense_attention("c"))
    rows = world.runtime.counters.decode_rows
    assert rows == {("compact", "compacted"): 2, ("dense", CAPTURE_LIMIT): 1}
    world.step(gone=["c"])
    world.step(prefill={"c": 220})
    assert world.done == ["a", "b", "c"]
    world.step(gone=["a", "b", "c"])
    assert world.runtime.host_pool.num_free == world.host_blocks


def test_a_prompt_over_the_capture_limit_keeps_no_host_blocks():
    world = World(mixed_assignment(), num_query_windows=1, num_blocks=200)
    world.step(prefill={"a": 200, "b": 210})
    assert world.refused == ["b"]
    assert world.runtime.host_pool.num_free == world.host_blocks - 200 // PAGE


# --- the host's copy ---


def test_prompts_without_room_in_the_host_pool_are_compacted_and_counted_and_logged_once(logged):
    world = World(PAIR, host_blocks=50, num_blocks=200)
    world.step(prefill={"a": 640})
    world.step(prefill={"b": 640, "c": 640}, decode=["a"])
    assert world.done == ["a", "b", "c"] and not world.refused
    held = resident_pages(world, "b")
    for _ in range(3):
        world.step(decode=["b", "a", "c"], queries={"b": 4 * world.random(1, 4, 8)})
        assert_outputs(world, "b", attention_over(world, "b", held))
        assert resident_pages(world, "b") == held, "nothing is ever fetched for it"
    assert world.counted("requests_compacted") == 3
    assert world.counted("requests_without_retrieval") == 2
    assert world.counted("drift_checks") == 1 + 3, "those of a alone"
    assert world.counted("pages_offloaded") == 40
    assert world.snapshot_rows() == {"compact|compacted": 10}
    (line,) = logged()
    assert "request b" in line and "40 host blocks and 10 are free" in line
    assert "cpu_pool_gib" in line and "heterocache_requests_without_retrieval" in line


def test_only_requests_with_host_pages_make_a_step_score_pages():
    world = World(PAIR, host_blocks=39)
    world.step(prefill={"a": 640})
    for _ in range(3):
        world.step(decode=["a"])
        assert not world.due
    assert world.counted("drift_checks") == 0


def test_a_request_that_comes_back_finds_the_host_blocks_that_are_free_by_then():
    """Preempted, it is prefilled again; its earlier compaction had no host pages."""
    world = World(PAIR, host_blocks=50)
    world.step(prefill={"a": 640})
    world.step(prefill={"b": 640}, decode=["a"])
    assert world.compacted("b").host is None
    world.step(gone=["a", "b"])
    assert world.runtime.host_pool.num_free == 50
    world.step(prefill={"b": 650})
    world.step(decode=["b"])
    assert world.compacted("b").host is not None and world.counted("drift_checks") == 2
    world.step(gone=["b"])
    world.step(prefill={"b": 63}, compact=False)
    world.step(decode=["b"])
    assert world.snapshot_rows()["dense|short_prompt"] == 1, "a name used again starts afresh"


def test_host_blocks_that_become_free_during_the_prefill_are_used_at_its_end():
    world = World(PAIR, host_blocks=50)
    world.step(prefill={"a": 640})
    world.step(prefill={"b": 640}, chunk={"b": 300}, decode=["a"])
    assert world.counted("pages_offloaded") == 40
    world.step(chunk={"b": 340}, gone=["a"])
    assert world.done == ["a", "b"] and not world.refused
    assert world.counted("pages_offloaded") == 80


def test_pages_are_sent_while_the_prompt_is_prefilled():
    world = World(PAIR)
    world.step(prefill={"a": 645}, chunk={"a": 100})
    sent = []
    for size in (15, 1, 12, 100, 400, 17):
        sent.append(world.counted("pages_offloaded"))
        world.step(chunk={"a": size})
    # 100, 115, 116, 128, 228, 628 and 645 tokens
    assert sent == [6, 7, 7, 8, 14, 39] and world.counted("pages_offloaded") == 40
    assert world.done == ["a"]


def test_pages_of_cached_prefixes_are_sent_too():
    """The first chunk of a prompt may find its prefix in the cache: more tokens than queries."""
    world = World(PAIR)
    world.step(prefill={"a": 640}, chunk={"a": 1})
    world._write_kv(world.books["a"], 400)
    world.step(chunk={"a": 50})
    assert world.counted("pages_offloaded") == 450 // PAGE
    world.step(chunk={"a": 190})
    assert world.done == ["a"]


def test_a_prompt_that_leaves_during_its_prefill_gives_its_host_blocks_back():
    world = World(PAIR, host_blocks=50)
    world.step(prefill={"a": 640}, chunk={"a": 300})
    assert world.runtime.host_pool.num_free == 10
    world.step(gone=["a"])
    assert world.runtime.host_pool.num_free == 50
    world.step(prefill={"b": 650})
    assert world.done == ["b"]


def test_threshold_zero_needs_no_host_memory():
    world = World(mixed_assignment(), host_blocks=0, options={"drift_threshold": 0})
    world.step(prefill={"a": 373}, chunk={"a": 100})
    world.step(chunk={"a": 273})
    assert world.done == ["a"] and not world.refused
    before = resident_pages(world, "a")
    for _ in range(4):
        world.step(decode=["a"], queries={"a": 4 * world.random(3, 6, 8)})
        assert_outputs(world, "a", attention_over(world, "a", before))
        assert not world.due, "no scores are wanted"
    for name in ("drift_checks", "pages_offloaded", "pages_fetched"):
        assert world.counted(name) == 0
    assert world.runtime.snapshot()["requests"].popitem()[1] == [148, 0, 5]


# --- rows ---


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
    world.step(prefill={"a": 640, "b": 640}, chunk={"a": 1, "b": 30})
    world.step(chunk={"a": 1, "b": 1})
    slots, captures, _ = row_buffers(world, 4)
    assert slots.tolist() == [world.table.dense_slot] * 4 and captures.tolist() == [-1] * 4
    assert not world.runtime.counters.decode_rows


def test_chunks_of_a_replay_are_not_decode_rows():
    """After preemption, generated tokens are prefilled again; vLLM calls only prompts so."""
    world = World(PAIR)
    world.books["a"] = world._new_books(640, True)
    world.runtime.begin_step([], [PrefillStart("a", 640)])
    batch = world.make_batch([StepRow("a", 30, 500)])
    world.runtime.begin_batch(batch._replace(is_prefilling=np.zeros(1, bool)))
    assert not world.runtime.counters.decode_rows


def test_rows_of_no_request_read_nothing():
    """vLLM measures and captures graphs between steps, whatever its last batch was."""
    world = World(PAIR, max_num_seqs=5, padding=3)
    world.step(prefill={"a": 640})
    world.step(decode=["a"])
    counted = world.runtime.snapshot()
    ones = np.ones(8, np.int64)
    block_table = torch.zeros(8, 1, dtype=torch.int32)
    world.runtime.request_ids = None  # the V2 runner has indices for such rows, those of others
    batch = Batch(ones, ones, np.zeros(8, bool), 8, block_table, req_idx=np.arange(8))
    assert world.runtime.begin_batch(batch) == []
    slots, captures, _ = row_buffers(world, 8)
    assert slots.tolist() == [world.table.dense_slot] * 8 and captures.tolist() == [-1] * 8
    world.runtime.after_forward()
    assert world.runtime.snapshot() == counted
    world.check()


def row_buffers(world: World, num_rows: int) -> tuple[torch.Tensor, ...]:
    """Table slots, query places and what is due, of the first rows."""
    nothing = torch.zeros(num_rows, 1, dtype=torch.int32)
    rows = world.runtime.rows.decode_rows(nothing, nothing[:, 0], nothing[:, 0], num_rows)
    return rows.row_to_table_slot, rows.query_place, rows.is_due


def test_row_buffers_never_move_and_padding_is_dense():
    world = World(PAIR, num_blocks=150)
    world.step(prefill={"a": 640, "b": 640})
    addresses = [t.data_ptr() for t in row_buffers(world, 4)]
    slots = {r: world.compacted(r).table_slot for r in "ab"}
    for ids in (["a", "b"], ["b", "a"], ["b"]):
        world.step(decode=ids)
        buffers = row_buffers(world, 4)
        assert [t.data_ptr() for t in buffers] == addresses
        padding = [world.table.dense_slot] * (4 - len(ids))
        assert buffers[0].tolist() == [slots[r] for r in ids] + padding


def test_a_batch_that_is_described_twice_counts_its_pages_once():
    """vLLM may build the metadata of a step more than once."""
    world = World(mixed_assignment())
    world.step(prefill={"a": 373})
    begin_batch = world.runtime.begin_batch

    def twice(batch: Batch) -> list[KeptQueries]:
        first = begin_batch(batch)
        assert begin_batch(batch) == first
        return first

    world.runtime.begin_batch = twice
    world.step(prefill={"b": 330}, decode=["a"])
    world.step(decode=["a", "b"])
    assert world.counted("pages_offloaded") == 5 * (23 + 20)
    assert world.counted("drift_checks") == 2 + 4


def test_only_leading_pivots_of_due_rows_are_scored():
    world = World(mixed_assignment(), options={"drift_interval": 2})
    world.step(prefill={"a": 373})
    world.step(prefill={"b": 373}, decode=["a"])
    lse = world.runtime.ops._head_lse
    for due, other in (("b", 0), ("a", 1)):
        lse.fill_(torch.nan)
        world.step(decode=["a", "b"])
        assert world.due == {due}
        scored = (~lse.isnan()).any(dim=2).nonzero().tolist()
        row = 3 * (1 - other)  # its first segment
        assert scored == [[0, row], [1, row + 2]], "(layer, segment) of the two pivots that lead"
    world.step(gone=["a", "b"])
    assert not row_buffers(world, 4)[-1].any()


# --- requests that leave ---


@pytest.mark.parametrize("when", ["after compaction", "in the middle of decode"])
def test_a_request_that_is_preempted_releases_everything_and_can_come_back(when):
    world = World(mixed_assignment(), host_blocks=40)
    world.step(prefill={"a": 373})
    if when == "in the middle of decode":
        for _ in range(3):
            world.step(decode=["a"], queries={"a": 4 * world.random(3, 6, 8)})
    world.step(gone=["a"])
    assert len(world.free) == world.num_blocks
    assert world.runtime.host_pool.num_free == 40
    assert bool((world.table.tensors.entries == -1).all())
    assert world.runtime.snapshot()["requests"] == {}
    world.step(prefill={"a": 390})  # the replayed prompt holds what was generated
    world.step(decode=["a"])
    assert_outputs(world, "a", attention_over(world, "a", resident_pages(world, "a")))


def test_a_request_may_leave_and_start_again_in_the_same_step():
    world = World(PAIR, host_blocks=50)
    world.step(prefill={"a": 640})
    world.step(gone=["a"], prefill={"a": 655})
    assert world.done == ["a", "a"]
    world.step(decode=["a"])
    assert world.runtime.host_pool.num_free == 10


def test_a_request_that_never_was_here_may_leave():
    world = World(PAIR)
    world.step(gone=[])
    world.runtime.begin_step(["aborted before its first step"])
    world.check()


def test_orders_of_a_step_are_forgotten_with_it():
    world = World(PAIR)
    order = CompactionOrder(1, "a", 640, list(range(28)))
    world.books["a"] = world._new_books(640, False)
    world.runtime.begin_step([], [PrefillStart("a", 640)], [order])
    batch = world.make_batch([StepRow("a", 640, 640)])
    assert world.runtime.begin_batch(batch) == [KeptQueries(639, 1, 0)]
    world.runtime.begin_step([])
    world.runtime.begin_batch(batch)
    world.runtime.after_forward()
    assert world.runtime.take_answers() == ([], [])


@pytest.mark.parametrize("compacts_late", [False, True])
def test_random_traffic_loses_nothing(compacts_late):
    """World.step checks all books and page contents after every step. Where prompts are compacted
    late, requests leave, and start again at once, between their last chunk and the compaction."""
    rng = random.Random(11)
    world = World(
        mixed_assignment(),
        num_blocks=100,
        host_blocks=52,
        max_num_seqs=4,
        seed=5,
        compacts_late=compacts_late,
        options={"matched_share": 0.5} if compacts_late else {},
    )
    num_waiting = 0
    traffic = RandomTraffic(rng, longest=280, least_free=40, leaving=0.15, arriving=0.6)
    for _ in range(90):
        prefill, chunk, leaving, decode = traffic.step(world)
        waiting = {r: world.books[r].prompt_tokens for r in leaving if r in world.runtime._finished}
        num_waiting += len(waiting)
        prefill, chunk = prefill | waiting, chunk | waiting
        compact = rng.random() < 0.8
        rng.shuffle(decode)
        queries = {r: 3 * world.random(3, 6, 8) for r in decode if rng.random() < 0.7}
        world.step(prefill, decode, leaving, chunk, queries=queries, compact=compact)
    assert world.counted("requests_compacted") > 10 and not world.refused
    assert world.counted("requests_without_retrieval")
    assert world.counted("pages_fetched") > 50
    assert (num_waiting > 0) == compacts_late
    world.step(gone=list(world.books))
    assert len(world.free) == world.num_blocks
    assert world.runtime.host_pool.num_free == 52
    assert world.num_free_windows == world.num_query_windows


# --- debugging and books ---


@pytest.mark.parametrize("page_dtype", [torch.float32, *FP8_DTYPES], ids=str)
def test_poisoned_blocks_hold_nan_and_no_others(page_dtype):
    world = World(PAIR, num_blocks=64, page_dtype=page_dtype)
    world.step(prefill={"a": 500})
    world.pool[world.free] = 7.0
    poison = world.free[1:4]
    expected = world.pool.float()
    expected[poison] = torch.nan
    world.runtime.begin_step([], poison=poison)
    assert torch.equal(world.pool.float().nan_to_num(3.25), expected.nan_to_num(3.25))
    world.runtime.begin_step([], poison=[])
    world.check()


@pytest.mark.parametrize("page_dtype", [torch.float32, *FP8_DTYPES], ids=str)
def test_beside_layers_of_vllm_poison_is_large_and_finite(page_dtype):
    world = World(PAIR, num_blocks=64, page_dtype=page_dtype)
    world.runtime.poison_byte = LARGE_BYTE
    world.runtime.begin_step([], poison=world.free[:1])
    poisoned = world.pool[world.free[0]].float()
    assert poisoned.isfinite().all() and (poisoned > 25).all()


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


def test_pages_that_decode_reads_are_counted():
    """Lists and live tail of a compacted request, everything of a dense one."""
    world = World(mixed_assignment())
    world.step(prefill={"a": 373})
    world.step(prefill={"d": 90}, compact=False)
    read = dense = 0
    for _ in range(30):  # the tail grows by two pages
        world.step(decode=["a", "d"])
        pages = {r: math.ceil(world.books[r].num_tokens / PAGE) for r in "ad"}
        listed = sum(map(len, resident_pages(world, "a").values()))
        read += listed + 9 * (pages["a"] - 23) + 9 * pages["d"]
        dense += 9 * (pages["a"] + pages["d"])
        assert world.counted("decode_pages_read") == read
        assert world.counted("decode_pages_dense") == dense
    assert read < 0.9 * dense


@pytest.mark.parametrize(("policy", "pages"), [("quest", 8), ("oracle", 69)])
def test_choosing_at_each_step_is_read_too(policy, pages):
    """Of 6 compressed heads with 23 pages each: a sixteenth of K and V, or all of K."""
    counts = []
    for name in ("streaming", policy):
        world = World(mixed_assignment())
        world.step(prefill={"a": 373})
        runtime = world.runtime
        made = make_policy(HeteroCacheConfig(policy=name))
        runtime.row_counter = RowCounter(runtime.counters, world.table, world.assignment, made)
        world.step(decode=["a"])
        counts.append(world.counted("decode_pages_read"))
    assert counts[1] - counts[0] == pages


@pytest.mark.parametrize(("page_dtype", "size"), [(torch.float32, 4), (torch.float8_e4m3fn, 1)])
def test_block_bytes_are_of_kv_and_tables(page_dtype, size):
    world = World(mixed_assignment(), page_dtype=page_dtype)
    worker = HeteroCacheWorkerMixin()
    worker.heterocache, worker.heterocache_rank = world.runtime, world.runtime.rank
    spec = SimpleNamespace(page_size_bytes=3 * PAGE * 2 * world.head_dim * size)
    worker.get_kv_cache_spec = lambda: dict.fromkeys("abc", spec)  # three layers of three heads
    kv, tables = worker.heterocache_block_bytes()
    assert kv == 9 * PAGE * 2 * world.head_dim * size
    host = world.runtime.host_pool
    assert host.pages.nbytes == world.host_blocks * 5 * PAGE * 2 * world.head_dim * size
    assert tables == PageTable.bytes_per_block(world.maps, world.group, world.gpu_budget)


def test_counters_can_start_again():
    world = World(mixed_assignment())
    fresh = world.runtime.snapshot()
    world.step(prefill={"a": 373})
    for _ in range(3):
        world.step(decode=["a"], queries={"a": 4 * world.random(3, 6, 8)})
    world.step(gone=["a"])
    assert world.runtime.snapshot() != fresh
    world.runtime.reset_counters()
    assert world.runtime.snapshot() == fresh
    world.step(prefill={"a": 373})
    world.step(decode=["a"])
    assert world.counted("drift_checks") == 2


def name_a_page_twice(world: World) -> None:
    entries, base = world.table.tensors.entries, world.table.base(world.compacted("a").table_slot)
    entries[base] = entries[base + 1]


def lose_a_host_block(world: World) -> None:
    host = world.compacted("a").host
    host.host_blocks = host.host_blocks[1:]


def hold_a_host_block_twice(world: World) -> None:
    world.compacted("a").host.host_blocks[3] = world.compacted("a").host.host_blocks[4]


def forget_the_request(world: World) -> None:
    world.runtime._requests.clear()


def miss_a_resident_page(world: World) -> None:
    tables, slot = world.table.tensors, world.compacted("a").table_slot
    resident = tables.is_resident[int(tables.first_stripe[slot]) * tables.satellite_width :]
    resident[int(resident.nonzero()[0])] = 0


@pytest.mark.parametrize(
    "corrupt",
    [
        name_a_page_twice,
        lose_a_host_block,
        hold_a_host_block_twice,
        forget_the_request,
        miss_a_resident_page,
    ],
    ids=lambda f: f.__name__,
)
def test_check_integrity_detects_lost_pages(corrupt):
    world = World(mixed_assignment())
    world.step(prefill={"a": 373})
    world.runtime.check_integrity()
    corrupt(world)
    with pytest.raises(AssertionError):
        world.runtime.check_integrity()
