"""RULER's needles in a haystack: one or several keys, values and queries.

Source: arXiv 2404.06654, section 3, and niah.py of github.com/NVIDIA/RULER; see task.py.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_heterocache.evaluation.suites.ruler.task import NOISE, Drawn, hide_in_lines, hide_in_prose

if TYPE_CHECKING:
    import random

    from vllm_heterocache.evaluation.prose import Prose


@dataclass(frozen=True)
class Niah:
    """Needles "One of the special magic V for K is: X." in a haystack.

    Size: lines of noise, lines with other needles, or words of prose.
    """

    haystack: str  # "noise", "prose" (RULER: essay) or "needle"
    keys: str = "words"  # or "uuids"
    values: str = "numbers"  # or "uuids"
    num_keys: int = 1
    num_values: int = 1  # of each key
    num_queries: int = 1  # keys asked for
    max_tokens: int = 128
    any_answer: bool = False

    def least(self, length: int) -> int:
        return max(self.num_keys * self.num_values, 1)

    def draw(self, rng: random.Random, size: int, length: int, prose: Prose) -> Drawn:
        others = size if self.haystack == "needle" else 0
        keys = self._keys(rng, self.num_keys + others, prose)
        values = {key: [self._value(rng) for _ in range(self.num_values)] for key in keys}
        needles = [self._needle(key, x) for key in keys[: self.num_keys] for x in values[key]]
        rng.shuffle(needles)
        if self.haystack == "prose":
            context = hide_in_prose(rng, prose, size, needles)
        else:
            lines = [self._needle(key, values[key][0]) for key in keys[self.num_keys :]]
            context = hide_in_lines(rng, lines or [NOISE] * size, needles)
        asked = rng.sample(keys[: self.num_keys], self.num_queries)
        return self._ask(context, asked, [x for key in asked for x in values[key]])

    def _keys(self, rng: random.Random, count: int, prose: Prose) -> list[str]:
        """Distinct ones: RULER draws words from a list so long that they hardly ever meet."""
        if self.keys == "words":
            return rng.sample(prose.key_words, count)
        return [_uuid(rng) for _ in range(count)]

    def _value(self, rng: random.Random) -> str:
        return _uuid(rng) if self.values == "uuids" else str(rng.randrange(10**6, 10**7))

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.values} for {key} is: {value}."

    def _ask(self, context: str, keys: list[str], answers: list[str]) -> Drawn:
        asked = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
        if len(answers) == 1:
            kind, some, what, be = self.values[:-1], "A", "is", "is"
        else:
            kind, some, what, be = self.values, "Some", "are all", "are"
        text = (
            f"{some} special magic {kind} {be} hidden within the following text. Make sure to "
            f"memorize it. I will quiz you about the {kind} afterwards.\n{context}\nWhat {what} "
            f"the special magic {kind} for {asked} mentioned in the provided text?"
        )
        prefix = f" The special magic {kind} for {asked} mentioned in the provided text {be}"
        return Drawn(text, prefix, answers)


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
