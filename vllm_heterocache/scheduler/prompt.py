"""Scheduler side: what one request's prompt has come to."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from vllm_heterocache.compat import KVCacheBlock


class PromptState(Enum):
    """Where a prompt stands between its admission and the freeing of its blocks."""

    ADMITTED = auto()  # the admission gate knows T; no block is allocated yet
    ANNOUNCED = auto()  # in prefill; the workers know that a compaction will end the prefill
    ORDERED = auto()  # prefilled; compact blocks are held, and the workers' answers are awaited
    COMPACTED = auto()  # every worker decodes from page lists
    DENSE = auto()  # served as by stock vLLM until its blocks are freed
    KEPT_DENSE = auto()  # served as by stock vLLM until the request ends


@dataclass
class Prompt:
    """One request's prompt, and the compaction that the request holds.

        admit (again while the request waits)
          |
        ADMITTED --announce--> ANNOUNCED --order--> ORDERED --compact--> COMPACTED
          |                                            |
          +--stay_dense--> DENSE <-------refuse--------+

    A request with streaming input is KEPT_DENSE from its arrival, because its prompt goes on
    growing while it decodes; so is one whose blocks another engine will read. Freeing a request's
    blocks (end, abort or preemption) ends the prompt in any state but KEPT_DENSE. The next
    admission of the request starts a new prompt, whose T includes the tokens generated so far.

    Every transition raises AssertionError where the prompt is in another state than the
    transition starts from.
    """

    request_id: str
    num_tokens: int = 0  # T, tokens to be prefilled, as the admission gate said last
    state: PromptState = PromptState.ADMITTED
    ticket: int | None = None  # of the compaction; set while ORDERED or COMPACTED
    compact_blocks: list[KVCacheBlock] = field(default_factory=list)  # N_c(T), held as long

    def admit(self, num_tokens: int) -> None:
        """The admission gate asks for room for T tokens; T may have grown since it last asked."""
        self._assert_in(PromptState.ADMITTED, PromptState.KEPT_DENSE)
        self.num_tokens = num_tokens

    def announce(self) -> None:
        """The prompt gets its first blocks, and the workers are told of its compaction."""
        self._assert_in(PromptState.ADMITTED)
        self.state = PromptState.ANNOUNCED

    def stay_dense(self) -> None:
        """The prompt gets its first blocks and is too short to be compacted."""
        self._assert_in(PromptState.ADMITTED)
        self.state = PromptState.DENSE

    def order(self, ticket: int, compact_blocks: list[KVCacheBlock]) -> None:
        """The last chunk of the prefill is scheduled, and its compaction is ordered with it."""
        self._assert_in(PromptState.ANNOUNCED)
        self.state = PromptState.ORDERED
        self.ticket, self.compact_blocks = ticket, compact_blocks

    def compact(self) -> None:
        """Every worker decodes from page lists and needs the dense prompt blocks no more."""
        self._assert_in(PromptState.ORDERED)
        self.state = PromptState.COMPACTED

    def refuse(self) -> tuple[int, list[KVCacheBlock]]:
        """Every worker stays dense. Return the ticket and the blocks, which the prompt lets go."""
        self._assert_in(PromptState.ORDERED)
        assert self.ticket is not None
        released = self.ticket, self.compact_blocks
        self.state, self.ticket, self.compact_blocks = PromptState.DENSE, None, []
        return released

    def is_prefilled_by(self, num_tokens: int) -> bool:
        """Whether room for `num_tokens` tokens completes the prefill that the prompt is in."""
        in_prefill = self.state in (PromptState.ADMITTED, PromptState.ANNOUNCED)
        return in_prefill and num_tokens >= self.num_tokens

    def _assert_in(self, *states: PromptState) -> None:
        assert self.state in states, f"prompt of {self.request_id} is {self.state.name}"
