"""Makes token prompts of text: chat frames, fitting to a length, truncation in the middle.

A prompt is plain (the text alone, for base models and few-shot tasks) or one user turn of the
tokenizer's chat template. Text that begins the answer ("The answer is:") stands at the end of a
plain prompt and after the generation prompt of a chat.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_MARK = "USER-TEXT-STANDS-HERE"
_MAX_TRIALS = 40  # of a length; each encodes the whole prompt


@dataclass(frozen=True)
class PromptFrame:
    """The tokens around the text of a prompt."""

    tokenizer: Any
    chat: bool
    before: list[int] = field(default_factory=list)  # beginning of sequence, start of the turn
    after: list[int] = field(default_factory=list)  # end of the turn, generation prompt

    def encode(self, text: str) -> list[int]:
        """Text without a frame."""
        return _encode(self.tokenizer, text)

    def ids(self, text: str, answer_prefix: str = "") -> list[int]:
        """The whole prompt."""
        middle, end = self._parts(text, answer_prefix)
        return self.before + middle + end

    def truncated(self, text: str, answer_prefix: str, max_tokens: int) -> tuple[list[int], bool]:
        """The prompt in at most `max_tokens`, and whether text was lost for that.

        What does not fit goes from the middle of the text, as in LongBench and InfiniteBench,
        because instructions stand at both ends; the frame stays whole.

        Raises:
            ValueError: the frame alone is longer.
        """
        middle, end = self._parts(text, answer_prefix)
        room = max_tokens - len(self.before) - len(end)
        if room < 2:
            raise ValueError(f"--lengths {max_tokens} leaves no room for text in the prompt.")
        kept = truncate_middle(middle, room)
        return self.before + kept + end, len(kept) < len(middle)

    def _parts(self, text: str, answer_prefix: str) -> tuple[list[int], list[int]]:
        """Tokens of the user's text, and those after it."""
        if self.chat:
            return self.encode(text), self.after + self.encode(answer_prefix)
        return self.encode(text + answer_prefix), []


def make_frame(tokenizer: Any, chat: bool) -> PromptFrame:
    """The frame of a plain prompt or of a chat.

    Raises:
        ValueError: `chat`, and the tokenizer has no chat template.
    """
    if not chat:
        whole = list(tokenizer.encode("a", add_special_tokens=True))
        bare = _encode(tokenizer, "a")
        return PromptFrame(tokenizer, False, whole[: whole.index(bare[0])])
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("--set chat=true needs a model with a chat template; leave chat out.")
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
    )
    before, _, after = turn.partition(_MARK)
    return PromptFrame(tokenizer, True, _encode(tokenizer, before), _encode(tokenizer, after))


def truncate_middle(tokens: list[int], room: int) -> list[int]:
    """At most `room` of the tokens: the first and the last, in halves."""
    if len(tokens) <= room:
        return tokens
    tail = room // 2
    return tokens[: room - tail] + tokens[len(tokens) - tail :]


def largest_fitting(count_tokens: Callable[[int], int], room: int, least: int, what: str) -> int:
    """The largest size whose prompt has at most `room` tokens.

    Args:
        count_tokens: tokens of a prompt of that size, about linear in it.
        room: the length asked for.
        least: smallest size there is.
        what: names the prompt in the error.

    Raises:
        ValueError: the smallest size is longer than `room`.
    """
    low, low_tokens, high = least, count_tokens(least), None
    if low_tokens > room:
        raise ValueError(f"--lengths {room} is too short for {what}, which takes {low_tokens}.")
    guess = 2 * least + 16
    for _ in range(_MAX_TRIALS):
        tokens = count_tokens(guess)
        rate = max((tokens - low_tokens) / (guess - low), 0.1)
        if tokens <= room:
            low, low_tokens = guess, tokens
        else:
            high = guess
        guess = low + max(1, int((room - low_tokens) / rate))
        if high is not None:
            guess = min(guess, high - 1)
        if guess <= low:
            break
    return low


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []
