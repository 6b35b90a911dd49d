"""A probe: a question that is forced during decode, with slots that the model fills.

Between slots the right text goes on, forced too. So every answer is scored by itself: what the
model got wrong before does not change what it is asked for next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from vllm_heterocache.evaluation.sample import FREE
from vllm_heterocache.evaluation.text_metrics import common_prefix

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable

    from vllm_heterocache.evaluation.suites.probes.source import Source


@dataclass(frozen=True)
class Probe:
    """One question with an answer for each slot.

    leads: token ids forced before each slot; the first one is the question.
    answers: token ids expected in each slot.
    any_order: each answer counts in whatever slot it stands, once. All are of one length.
    """

    leads: list[list[int]]
    answers: list[list[int]]
    any_order: bool = False

    def __post_init__(self) -> None:
        assert len(self.leads) == len(self.answers) and all(self.leads) and all(self.answers)
        assert not self.any_order or len({len(answer) for answer in self.answers}) == 1


class Drawn(NamedTuple):
    """One context and what is asked about it."""

    prompt: list[int]  # token ids
    probes: list[Probe]
    in_turns: bool = False  # whatever the settings say


class ProbeTask(Protocol):
    """Draws contexts; the same source, generator state and settings give the same one."""

    def draw(self, source: Source, rng: random.Random, length: int, questions: int) -> Drawn:
        """A prompt of at most `length` tokens, and `questions` probes.

        Raises:
            ValueError: the length leaves no room for them.
        """
        ...


def lay_out(probes: Iterable[Probe]) -> tuple[list[int], list[dict[str, Any]]]:
    """The output tokens to force, and of each probe where its slots begin and what they expect."""
    forced: list[int] = []
    laid_out = []
    for probe in probes:
        positions = []
        for lead, answer in zip(probe.leads, probe.answers, strict=True):
            forced += lead
            positions.append(len(forced))
            forced += [FREE] * len(answer)
        laid_out.append(
            {"positions": positions, "answers": probe.answers, "any_order": probe.any_order}
        )
    return forced, laid_out


def prefixes(laid_out: dict[str, Any], tokens: list[int]) -> list[float]:
    """Of each answer, the share of its tokens before the first wrong one; 1 is an exact answer.

    Args:
        laid_out: a probe, as `lay_out` describes it.
        tokens: the whole output.
    """
    answers, positions = laid_out["answers"], laid_out["positions"]
    slots = [tokens[at : at + len(answer)] for at, answer in zip(positions, answers, strict=True)]
    if not laid_out["any_order"]:
        return [common_prefix(s, a) / len(a) for s, a in zip(slots, answers, strict=True)]
    return [max(common_prefix(s, answer) for s in slots) / len(answer) for answer in answers]
