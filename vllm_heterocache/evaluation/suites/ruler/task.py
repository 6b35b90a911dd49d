"""What a task of RULER is, and how it hides lines in a context.

Source: Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models?,
arXiv 2404.06654, sections 3 and A, and the task definitions of github.com/NVIDIA/RULER
(synthetic.yaml, constants.py), from which the prompts are taken word by word. A task draws one
prompt of a given size from a random generator; what "size" counts is the task's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import random

    from vllm_heterocache.evaluation.prose import Prose

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class Drawn(NamedTuple):
    """One question about one context."""

    text: str
    answer_prefix: str  # the beginning of the answer, which the prompt ends with
    answers: list[str]


class RulerTask(Protocol):
    """Draws prompts; the same generator state, size and length give the same one."""

    @property
    def max_tokens(self) -> int:
        """RULER's tokens_to_generate."""
        ...

    @property
    def any_answer(self) -> bool:
        """One of the answers is enough (QA)."""
        ...

    def least(self, length: int) -> int:
        """The smallest size."""
        ...

    def draw(self, rng: random.Random, size: int, length: int, prose: Prose) -> Drawn:
        """A prompt of `size` for a length of `length` tokens."""
        ...


def hide_in_lines(rng: random.Random, lines: list[str], hidden: list[str]) -> str:
    """The lines with the hidden ones between them at random places, in their order."""
    places = sorted(rng.sample(range(len(lines)), len(hidden)))
    mixed, begin = [], 0
    for place, line in zip(places, hidden, strict=True):
        mixed += [*lines[begin:place], line]
        begin = place
    return "\n".join(mixed + lines[begin:]).replace(". \n", ".\n")


def hide_in_prose(rng: random.Random, prose: Prose, num_words: int, hidden: list[str]) -> str:
    """Sentences with the hidden ones between them, at as many of 40 even depths."""
    sentences = prose.sentences(num_words)
    depths = sorted(rng.sample(range(40), len(hidden)))
    mixed, begin = [], 0
    for depth, sentence in zip(depths, hidden, strict=True):
        place = len(sentences) * round(100 * depth / 39) // 100
        mixed += [*sentences[begin:place], sentence]
        begin = place
    return " ".join(mixed + sentences[begin:])
