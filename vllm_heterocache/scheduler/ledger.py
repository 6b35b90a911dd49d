"""Scheduler side: what the block manager and the connector tell each other."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary

from vllm_heterocache.compat import BlockPool, KVCacheBlock
from vllm_heterocache.messages import CompactionOrder, PrefillStart


class CompactionLedger:
    """Orders on their way to the workers, and what the workers said of them.

    A ticket is released (its blocks freed) by the manager; whatever a worker still says of it
    afterwards is ignored.
    """

    def __init__(self, world_size: int = 1) -> None:
        self.world_size = world_size
        self._next_ticket = 0
        self._to_send: dict[int, CompactionOrder] = {}
        self._answers: dict[int, tuple[int, int]] = {}  # ticket -> (workers done, refused)
        self.compact_blocks = 0  # blocks held for compactions
        self._starts: dict[str, PrefillStart] = {}
        self.kept_dense: set[str] = set()  # requests that must not be compacted
        self.debug_poison = False
        self._freed: dict[int, None] = {}  # block ids, in the order of freeing

    def open(self, request_id: str, num_tokens: int, block_ids: list[int]) -> int:
        """Order a compaction with this step's batch; return its ticket."""
        ticket = self._next_ticket
        self._next_ticket += 1
        self._to_send[ticket] = CompactionOrder(ticket, request_id, num_tokens, block_ids)
        self._answers[ticket] = (0, 0)
        self.compact_blocks += len(block_ids)
        return ticket

    def close(self, ticket: int, num_blocks: int) -> None:
        """The compaction's blocks are being freed."""
        self._to_send.pop(ticket, None)
        self._answers.pop(ticket, None)
        self.compact_blocks -= num_blocks

    def take_orders(self) -> list[CompactionOrder]:
        """Orders that have not been sent yet."""
        orders = list(self._to_send.values())
        self._to_send.clear()
        return orders

    def announce(self, request_id: str, num_tokens: int) -> None:
        """A prompt that will be compacted begins its prefill with this step's batch."""
        self._starts[request_id] = PrefillStart(request_id, num_tokens)

    def withdraw(self, request_id: str) -> None:
        """The request's blocks are being freed, maybe before its start was sent."""
        self._starts.pop(request_id, None)

    def take_starts(self) -> list[PrefillStart]:
        """Starts that have not been sent yet."""
        starts = list(self._starts.values())
        self._starts.clear()
        return starts

    def note_freed(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Blocks were freed; those that nobody uses and that are no prefix cache are dead."""
        for block in blocks:
            if block.ref_cnt == 0 and block.block_hash is None and not block.is_null:
                self._freed[block.block_id] = None

    def take_freed(self) -> list[int]:
        """Ids of blocks that died since the last call, for the workers to fill with NaN.

        Each must be sent with the first step that is scheduled after its death: only such a
        step, or a later one, can write to the block again.
        """
        freed = list(self._freed)
        self._freed.clear()
        return freed

    def record(self, done: dict[int, int], refused: dict[int, int]) -> None:
        """Add the workers' answers: ticket -> number of workers."""
        for ticket in done.keys() | refused.keys():
            if ticket in self._answers:
                before = self._answers[ticket]
                self._answers[ticket] = (
                    before[0] + done.get(ticket, 0),
                    before[1] + refused.get(ticket, 0),
                )

    def is_done(self, ticket: int) -> bool:
        """Every worker decodes from page lists and needs the dense blocks no more."""
        return self._answers[ticket][0] == self.world_size

    def is_refused(self, ticket: int) -> bool:
        """Every worker stays dense. (Where only some refuse, both sets of blocks stay.)"""
        return self._answers[ticket][1] == self.world_size

    @property
    def tickets(self) -> list[int]:
        return list(self._answers)


_LEDGERS: WeakKeyDictionary[BlockPool, CompactionLedger] = WeakKeyDictionary()


def ledger_of(block_pool: BlockPool) -> CompactionLedger:
    """The ledger that goes with a block pool; made at the first call."""
    if block_pool not in _LEDGERS:
        _LEDGERS[block_pool] = CompactionLedger()
    return _LEDGERS[block_pool]


def watch_freed_blocks(block_pool: BlockPool) -> None:
    """Let the pool's ledger note every block that dies (`debug_poison`).

    The pool's method is wrapped, as blocks reach it on several ways: from the manager, and from
    vLLM's scheduler where it holds frees back until the steps in flight are done.
    """
    ledger, free_blocks = ledger_of(block_pool), block_pool.free_blocks
    ledger.debug_poison = True

    def free_and_note(ordered_blocks: Iterable[KVCacheBlock]) -> None:
        blocks = list(ordered_blocks)
        free_blocks(blocks)
        ledger.note_freed(blocks)

    block_pool.free_blocks = free_and_note
