"""What the scheduler is told of the compactions it ordered, and why refused prompts stay dense."""

from __future__ import annotations

from vllm_heterocache.worker.fallbacks import SHORT_PROMPT


class Answers:
    """Tickets to be reported with the step's output, and the reasons of refusals."""

    def __init__(self) -> None:
        self._done: list[int] = []
        self._refused: list[int] = []
        self._reasons: dict[str, str] = {}

    def done(self, ticket: int) -> None:
        """The prompt's dense blocks are no longer needed."""
        self._done.append(ticket)

    def refused(self, ticket: int, request_id: str, reason: str) -> None:
        """The prompt stays dense."""
        self._refused.append(ticket)
        self._reasons[request_id] = reason

    def reason(self, request_id: str) -> str:
        """Why decode rows of a request are served dense."""
        return self._reasons.get(request_id, SHORT_PROMPT)

    def forget(self, request_id: str) -> None:
        """The request has left."""
        self._reasons.pop(request_id, None)

    def take(self) -> tuple[list[int], list[int]]:
        """Tickets done and tickets refused since the last call."""
        done, refused = self._done, self._refused
        self._done, self._refused = [], []
        return done, refused
