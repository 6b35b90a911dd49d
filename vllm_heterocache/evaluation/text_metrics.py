"""Metrics on generated text, 0 to 1, as the public benchmarks define them, and on its tokens.

Sources: RULER (arXiv 2404.06654; its string matches), SQuAD (arXiv 1606.05250; normalisation).
"""

from __future__ import annotations

import itertools
import re
import string
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CONTROL = re.compile(r"[\x00-\x1f]")


def string_match_all(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that stand in the text, whatever the case (RULER, all but QA)."""
    text = _clean(text)
    return sum(answer.lower() in text for answer in answers) / len(answers)


def string_match_part(text: str, answers: Sequence[str]) -> float:
    """1 if any of the answers stands in the text (RULER's QA)."""
    text = _clean(text)
    return float(any(answer.lower() in text for answer in answers))


def _clean(text: str) -> str:
    return _CONTROL.sub("\n", text.strip()).strip().lower()


def normalize_answer(text: str) -> str:
    """Lower case without punctuation, English articles and surplus white space (SQuAD)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def word_overlap(text: str, truth: str) -> float:
    """Share of the distinct normalised words of the truth that stand in the text."""
    words = set(normalize_answer(truth).split())
    return len(words & set(normalize_answer(text).split())) / len(words)


def common_prefix(output: Sequence[int], answer: Sequence[int]) -> int:
    """Tokens of the answer before the first one that the output, perhaps cut short, lacks."""
    pairs = zip(output, answer, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
