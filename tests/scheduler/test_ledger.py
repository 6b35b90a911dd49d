import pytest

from vllm_heterocache.messages import CompactionOrder, PrefillStart
from vllm_heterocache.scheduler.ledger import CompactionLedger


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
        ledger.close(ticket)


def test_order_closed_before_it_was_sent_is_withdrawn():
    ledger = CompactionLedger()
    gone, stays = ledger.open("a", 100, [1]), ledger.open("b", 100, [2])
    ledger.close(gone)
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
    ledger.close(closed)
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


def test_dead_blocks_are_told_once_in_the_order_of_their_death():
    ledger = CompactionLedger()
    ledger.note_dead([6, 5])
    ledger.note_dead([])
    ledger.note_dead([3, 6])
    assert ledger.take_dead() == [6, 5, 3]
    assert ledger.take_dead() == []
    ledger.note_dead([6])
    assert ledger.take_dead() == [6]


def test_tickets_are_those_of_held_compactions():
    ledger = CompactionLedger()
    a, b = ledger.open("a", 100, [1, 2, 3]), ledger.open("b", 100, [4])
    assert ledger.tickets == [a, b]
    ledger.take_orders()
    assert ledger.tickets == [a, b], "sent or not"
    ledger.close(a)
    assert ledger.tickets == [b]
