"""What a suite gives the runner, and what the runner asks of a suite."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_heterocache.evaluation.distributions import Distributions

FREE = -1  # stands in a list of forced tokens where the model chooses


@dataclass(frozen=True)
class Sample:
    """One request to the engine, with what is needed to score its output."""

    id: str  # stable over runs: suite, task, length, seed
    prompt: list[int]  # token ids
    max_tokens: int
    # Tokens forced during decode by output position (forced_tokens.py), FREE where the model
    # chooses; None forces nothing.
    forced: list[int] | None = None
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


@runtime_checkable
class QuestionSuite(Protocol):
    """A suite whose samples ask several questions; each is a unit of intervals and tests."""

    def right(self, sample: Sample, tokens: list[int]) -> list[bool]:
        """Of each question, in the order asked, whether the output tokens answer it."""
        ...


@runtime_checkable
class DistributionSuite(Protocol):
    """A suite whose samples have a `top_k`."""

    def score_distributions(self, full: Distributions, other: Distributions) -> dict[str, float]:
        """Further metrics of one sample, `full` being stock vLLM's distributions."""
        ...
