import gc
import weakref

import pytest

from vllm_heterocache.messages import CompactionOrder, PrefillStart
from vllm_heterocache.scheduler.ledger import CompactionLedger, ledger_of, watch_freed_blocks


def make_pool(num_blocks=4):
    from vllm.v1.core.block_pool import BlockPool

    return BlockPool(num_gpu_blocks=num_blocks, enable_caching=False, hash_block_size=16)


def test_orders_are_sent_once_in_the_order_of_opening():
    ledger = CompactionLedger()
    first = ledger.open("a", 100, [5, 3])
    second = ledger.open("b", 77, [9])
    assert ledger.take_orders() == [
        CompactionOrder(first, "a", 100, [5, 3]),
        CompactionOrder(second, "b", 77, [9]),
    ]
    assert ledger.take_orders() == []
    third = ledger.open("c", 200, [1])
    assert [order.ticket for order in ledger.take_orders()] == [third]


def test_tickets_are_never_used_again():
    ledger = CompactionLedger()
    seen = set()
    for _ in range(5):
        ticket = ledger.open("same request", 100, [1])
        assert ticket not in seen
        seen.add(ticket)
        ledger.close(ticket, 1)


def test_order_closed_before_it_was_sent_is_withdrawn():
    ledger = CompactionLedger()
    gone, stays = ledger.open("a", 100, [1]), ledger.open("b", 100, [2])
    ledger.close(gone, 1)
    assert [order.ticket for order in ledger.take_orders()] == [stays]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_compaction_is_done_when_every_worker_is(world_size):
    ledger = CompactionLedger(world_size)
    ticket = ledger.open("a", 100, [1])
    for _ in range(world_size):
        assert not ledger.is_done(ticket)
        ledger.record({ticket: 1}, {})
    assert ledger.is_done(ticket) and not ledger.is_refused(ticket)


def test_answers_of_several_workers_may_come_together():
    ledger = CompactionLedger(3)
    ticket, other = ledger.open("a", 100, [1]), ledger.open("b", 100, [2])
    ledger.record({ticket: 2}, {other: 3})
    assert not ledger.is_done(ticket) and ledger.is_refused(other)
    ledger.record({ticket: 1}, {})
    assert ledger.is_done(ticket) and not ledger.is_done(other)


def test_compaction_that_only_some_refuse_is_neither_done_nor_refused():
    ledger = CompactionLedger(2)
    ticket = ledger.open("a", 100, [1])
    ledger.record({ticket: 1}, {ticket: 1})
    assert not ledger.is_done(ticket) and not ledger.is_refused(ticket)


def test_answers_for_closed_tickets_are_ignored():
    ledger = CompactionLedger()
    closed, kept = ledger.open("a", 100, [1]), ledger.open("b", 100, [2])
    ledger.close(closed, 1)
    ledger.record({closed: 1, 12345: 1}, {closed: 1})
    assert ledger.tickets == [kept]
    assert not ledger.is_done(kept) and not ledger.is_refused(kept)


def test_starts_are_sent_once_in_the_order_of_arrival():
    ledger = CompactionLedger()
    ledger.announce("b", 100)
    ledger.announce("a", 77)
    assert ledger.take_starts() == [PrefillStart("b", 100), PrefillStart("a", 77)]
    assert ledger.take_starts() == []


def test_start_of_a_request_that_has_left_is_withdrawn():
    ledger = CompactionLedger()
    ledger.announce("gone", 100)
    ledger.announce("stays", 200)
    ledger.withdraw("gone")
    ledger.withdraw("never announced")
    assert ledger.take_starts() == [PrefillStart("stays", 200)]


def test_watched_pool_frees_as_before_and_says_what_died():
    pools = make_pool(9), make_pool(9)
    watch_freed_blocks(pools[0])
    for pool in pools:
        blocks = pool.get_new_blocks(6)
        pool.free_blocks(reversed(blocks[2:]))  # vLLM passes iterators, too
        pool.free_blocks([pool.null_block])
    queues = [pool.free_block_queue.get_all_free_blocks() for pool in pools]
    assert [b.block_id for b in queues[0]] == [b.block_id for b in queues[1]]
    assert [b.ref_cnt for b in pools[0].blocks] == [b.ref_cnt for b in pools[1].blocks]
    assert ledger_of(pools[0]).take_freed() == [6, 5, 4, 3]
    assert ledger_of(pools[0]).take_freed() == []
    assert ledger_of(pools[1]).take_freed() == [] and not ledger_of(pools[1]).debug_poison


def test_block_dies_with_its_last_reference_and_counts_once():
    pool = make_pool(9)
    watch_freed_blocks(pool)
    blocks = pool.get_new_blocks(2)
    pool.touch(blocks[:1])
    pool.free_blocks(blocks)
    assert ledger_of(pool).take_freed() == [2]
    pool.free_blocks(blocks[:1])
    assert pool.get_new_blocks(1) == blocks[:1]
    pool.free_blocks(blocks[:1])
    assert ledger_of(pool).take_freed() == [1]


def test_prefix_cache_is_alive_though_nobody_uses_it():
    pool = make_pool(9)
    watch_freed_blocks(pool)
    blocks = pool.get_new_blocks(2)
    blocks[0].set_block_hash(b"hash", num_tokens=16)
    pool.free_blocks(blocks)
    assert ledger_of(pool).take_freed() == [2]


def test_held_blocks_are_counted():
    ledger = CompactionLedger()
    a, b = ledger.open("a", 100, [1, 2, 3]), ledger.open("b", 100, [4])
    assert ledger.compact_blocks == 4 and ledger.tickets == [a, b]
    ledger.close(a, 3)
    assert ledger.compact_blocks == 1 and ledger.tickets == [b]


def test_manager_and_connector_find_the_same_ledger_through_the_pool():
    pool, other = make_pool(), make_pool()
    assert ledger_of(pool) is ledger_of(pool)
    assert ledger_of(pool) is not ledger_of(other)


@pytest.mark.parametrize("watched", [False, True])
def test_ledger_goes_with_its_pool(watched):
    pool = make_pool()
    if watched:
        watch_freed_blocks(pool)
    alive = weakref.ref(ledger_of(pool))
    del pool
    gc.collect()
    assert alive() is None
