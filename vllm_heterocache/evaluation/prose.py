"""The prose of haystacks and the words that go with it."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from vllm_heterocache.evaluation.haystacks import prose
from vllm_heterocache.evaluation.local_data import read_json
from vllm_heterocache.evaluation.words import ADJECTIVES, NOUNS, compounds

if TYPE_CHECKING:
    import random
    from pathlib import Path

ESSAYS = "PaulGrahamEssays.json"  # of RULER, {"text": ...}


@dataclass(frozen=True)
class Prose:
    """A text, repeated as often as a haystack needs."""

    text: str

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @property
    def key_words(self) -> list[str]:
        """Compounds such as "calm-otter"."""
        return compounds()

    @cached_property
    def single_words(self) -> list[str]:
        """Distinct words of the text and of the lists, in alphabetical order."""
        found = re.findall(r"\b[a-z]{4,12}\b", self.text)
        return sorted({*found, *ADJECTIVES, *NOUNS})

    def draw_words(self, rng: random.Random, count: int) -> list[str]:
        """Distinct words in random order; compounds after all the single ones.

        Raises:
            ValueError: there are not so many.
        """
        most = len(self.single_words) + len(self.key_words)
        if count > most:
            raise ValueError(f"--lengths: {count} distinct words are needed, and {most} known.")
        singles = rng.sample(self.single_words, min(count, len(self.single_words)))
        return singles + rng.sample(self.key_words, count - len(singles))

    def sentences(self, num_words: int) -> list[str]:
        """The first words, cut into sentences; the last one may be part of a sentence."""
        repeated = itertools.islice(itertools.cycle(self.words), num_words)
        return split_sentences(" ".join(repeated))


def split_sentences(text: str) -> list[str]:
    """Pieces that end with a mark of sentence end before white space."""
    return re.split(r"(?<=[.!?])\s+", text.strip())


def load_prose(data: Path | None) -> Prose:
    """RULER's essays from the folder `data` if they are there, else Python's reference
    (haystacks.py).

    Raises:
        ValueError: the essays are there in another form.
    """
    path = data / ESSAYS if data is not None else None
    if path is None or not path.is_file():
        return Prose(prose())
    essays = read_json(path)
    if not isinstance(essays, dict) or not str(essays.get("text", "")).strip():
        raise ValueError(f'--data: {path} is not of the form {{"text": "..."}}.')
    return Prose(essays["text"])
