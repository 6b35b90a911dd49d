import gc
import weakref

import pytest

from vllm_heterocache.ledger import CompactionLedger, ledger_of
from vllm_heterocache.request_state import CompactionOrder


def make_pool():
    from vllm.v1.core.block_pool import BlockPool

    return BlockPool(num_gpu_blocks=4, enable_caching=False, hash_block_size=16)


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


def test_ledger_goes_with_its_pool():
    pool = make_pool()
    alive = weakref.ref(ledger_of(pool))
    del pool
    gc.collect()
    assert alive() is None
