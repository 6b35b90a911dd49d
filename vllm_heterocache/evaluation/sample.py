"""What a suite gives the runner, and what the runner asks of a suite."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

FREE = -1  # in a list of forced tokens as the engine takes it: the model chooses


@dataclass(frozen=True)
class Sample:
    """One request to the engine, with what is needed to score its output."""

    id: str  # stable over runs: suite, task, length, seed
    prompt: list[int]  # token ids
    max_tokens: int
    # Tokens forced during decode by output position (forced_tokens.py): None inside the list is
    # the model's choice; None as a whole forces nothing.
    forced: list[int | None] | None = None
    in_turns: bool = False  # what is forced is not decoded but ends the prompt of a further request
    stop: tuple[str, ...] = ()
    # How many of the likeliest tokens' log-probabilities are wanted; such an output has no text.
    top_k: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)  # JSON-able: task, length, depth, answers

    @property
    def task(self) -> str:
        """`meta["task"]`, or "" where a suite has one task only."""
        return str(self.meta.get("task", ""))

    @property
    def ends_freely(self) -> bool:
        """Whether the output goes on after what is forced, until the model ends it."""
        return self.forced is None or len(self.forced) < self.max_tokens

    @property
    def length(self) -> int:
        """`meta["length"]`, the length asked for, or the prompt's own."""
        return int(self.meta.get("length", len(self.prompt)))


@dataclass(frozen=True)
class SuiteSettings:
    """What the command line says about the samples of a suite."""

    lengths: tuple[int, ...] = (4000,)  # prompt tokens
    num_samples: int = 4  # per task and length
    seed: int = 0
    tasks: tuple[str, ...] | None = None  # None: the suite's default
    data: Path | None = None  # --data: a local folder or file
    extra: dict[str, Any] = field(default_factory=dict)  # --set NAME=VALUE: the suite's own


class Suite(Protocol):
    """Samples and their metrics.

    A suite raises ValueError, in one sentence that names the option and the fix, for settings it
    cannot serve. Its samples depend on the tokenizer and the settings alone.
    """

    name: str

    def samples(self, tokenizer: Any, settings: SuiteSettings) -> Iterator[Sample]:
        """All samples, in an order that is the same in every run."""
        ...

    def score(self, sample: Sample, tokens: list[int], text: str) -> dict[str, float]:
        """Metric name -> value, in the metric's own range; one of them is "score".

        Args:
            tokens: the output's token ids, forced ones included.
            text: the same, detokenised.
        """
        ...
