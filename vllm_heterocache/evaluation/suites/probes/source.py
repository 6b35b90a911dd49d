"""Where the texts of a sample come from, in tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_heterocache.evaluation.haystacks import HAYSTACKS, piece
from vllm_heterocache.evaluation.prompt import PromptFrame

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

CHARACTERS_PER_TOKEN = 12  # more than any of the haystacks has


@dataclass(frozen=True)
class Source:
    """Of one sample: its tokenizer and the part of the haystacks that it gets.

    title: begins the prompt, so that no two samples share cached blocks.
    """

    frame: PromptFrame
    index: int
    title: str

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without special tokens."""
        return self.frame.encode(text)

    def opening(self, text: str = "") -> list[int]:
        """How a prompt begins: a beginning of sequence where the model has one, title, text."""
        return self.frame.before + self.encode(f"{self.title}\n\n{text}")

    def lines(self, haystack: str, num_tokens: int) -> list[list[int]]:
        """Tokens of the haystack's lines, line breaks included: `num_tokens` or more in all."""
        found, total = [], 0
        text = piece(HAYSTACKS[haystack](), self.index, CHARACTERS_PER_TOKEN * num_tokens)
        for line in text.splitlines(keepends=True):
            if total >= num_tokens:
                break
            found.append(self.encode(line))
            total += len(found[-1])
        return found

    def filler(self, haystack: str, num_tokens: int) -> list[int]:
        """`num_tokens` tokens of the haystack."""
        joined = [token for line in self.lines(haystack, num_tokens) for token in line]
        return joined[:num_tokens]


def of_one_length(encode: Callable[[str], list[int]], texts: Iterable[str]) -> list[str]:
    """Those of the texts that have the commonest number of tokens after a space."""
    by_length: dict[int, list[str]] = {}
    for text in texts:
        by_length.setdefault(len(encode(f" {text}")), []).append(text)
    return max(by_length.values(), key=len)


def fitting(lines: Iterable[list[int]], room: int) -> list[list[int]]:
    """The first lines that have at most `room` tokens together."""
    found, total = [], 0
    for line in lines:
        total += len(line)
        if total > room:
            break
        found.append(line)
    return found


def check_room(task: str, length: int, room: int, least: int) -> None:
    """Raises ValueError where `room` tokens of a length are fewer than `least`."""
    if room < least:
        raise ValueError(
            f"--lengths {length} is too short for --tasks {task} with these questions, which takes "
            f"{length - room + least}; take a larger length or fewer --set questions=N"
        )
