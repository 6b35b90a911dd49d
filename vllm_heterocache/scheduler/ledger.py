"""Scheduler side: what the KV-cache manager and the connector tell each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_heterocache.messages import CompactionOrder, PrefillStart

if TYPE_CHECKING:
    from collections.abc import Container, Iterable


class CompactionLedger:
    """Messages on their way to the workers, and what the workers said of each compaction.

    The manager owns the ledger and writes starts and orders; the connector sends them and records
    the answers. The manager closes a ticket when it frees the compaction's blocks; whatever a
    worker still says of the ticket afterwards is ignored.
    """

    def __init__(self, world_size: int = 1) -> None:
        self.world_size = world_size
        self._next_ticket = 0
        self._orders: dict[int, CompactionOrder] = {}
        self._starts: dict[str, PrefillStart] = {}
        self._answers: dict[int, tuple[int, int]] = {}  # ticket -> (workers done, refused)
        self._dead: dict[int, None] = {}  # block ids, in the order of their death

    def open(self, request_id: str, num_tokens: int, block_ids: list[int]) -> int:
        """Order a compaction with this step's batch; return its ticket."""
        ticket = self._next_ticket
        self._next_ticket += 1
        self._orders[ticket] = CompactionOrder(ticket, request_id, num_tokens, block_ids)
        self._answers[ticket] = (0, 0)
        return ticket

    def close(self, ticket: int) -> None:
        """The compaction's blocks are being freed, maybe before its order was sent."""
        self._orders.pop(ticket, None)
        del self._answers[ticket]

    def take_orders(self) -> list[CompactionOrder]:
        """Orders that have not been sent yet."""
        orders = list(self._orders.values())
        self._orders.clear()
        return orders

    def announce(self, request_id: str, num_tokens: int) -> None:
        """A prompt that will be compacted begins its prefill with this step's batch."""
        self._starts[request_id] = PrefillStart(request_id, num_tokens)

    def withdraw(self, request_id: str) -> None:
        """The request's blocks are being freed, maybe before its start was sent."""
        self._starts.pop(request_id, None)

    def take_starts(self, scheduled: Container[str] | None = None) -> list[PrefillStart]:
        """Starts that have not been sent yet, of the requests that compute something in this step
        where these are given: a prompt may be loaded from the host before its prefill begins."""
        names = [name for name in self._starts if scheduled is None or name in scheduled]
        return [self._starts.pop(name) for name in names]

    def note_dead(self, block_ids: Iterable[int]) -> None:
        """These blocks were freed, and nothing can read them again."""
        self._dead.update(dict.fromkeys(block_ids))

    def take_dead(self) -> list[int]:
        """Ids of blocks that died since the last call, for the workers to poison.

        Each must be sent with the first step that is scheduled after its death: only such a
        step, or a later one, can write to the block again.
        """
        dead = list(self._dead)
        self._dead.clear()
        return dead

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
        """Tickets of the compactions whose blocks are held."""
        return list(self._answers)
