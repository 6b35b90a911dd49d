"""Probe `phase_switch`: after tool-like output, a question about the start of a long prompt.

No public benchmark has it. HeteroCache (arXiv 2601.13684) checks for drift because what a head
looks at moves while a model generates; here it moves away, to lines such as a tool prints, and must
come back. The facts stand in the first tenth of the prompt. Before each question come lines of
their own; both are forced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_heterocache.evaluation.chain import ANSWER_DIGITS, KEYS, WORDINGS, hide
from vllm_heterocache.evaluation.suites.probes.probe import Drawn, Probe
from vllm_heterocache.evaluation.suites.probes.source import check_room
from vllm_heterocache.evaluation.words import NOUNS

if TYPE_CHECKING:
    import random

    from vllm_heterocache.evaluation.suites.probes.source import Source

TOOL_TOKENS = 96  # of the output before each question, about
BEGIN, END = "\n\n<tool_response>\n", "</tool_response>\n"
STATEMENT, QUESTION = WORDINGS["magic"].statement, WORDINGS["magic"].question


class PhaseSwitch:
    def draw(self, source: Source, rng: random.Random, length: int, questions: int) -> Drawn:
        if questions > len(KEYS):
            raise ValueError(
                f"--set questions={questions} is refused: --tasks phase_switch has {len(KEYS)} at "
                "most"
            )
        keys = rng.sample(KEYS, questions)
        values = [str(rng.randrange(10 ** (ANSWER_DIGITS - 1), 10**ANSWER_DIGITS)) for _ in keys]
        said = [
            source.encode(" " + STATEMENT.format(key=k, value=v))
            for k, v in zip(keys, values, strict=True)
        ]
        opening = source.opening()
        start = length // 10 - sum(map(len, said))
        check_room("phase_switch", length, start, len(said) + 2)
        room = length - len(opening) - sum(map(len, said))
        text = source.filler("prose", room)
        prompt = opening + hide(text[:start], said, rng) + text[start:]
        probes = []
        for place in rng.sample(range(questions), questions):
            lead = BEGIN + tool_output(source, rng) + END + QUESTION.format(key=keys[place])
            probes.append(Probe([source.encode(lead)], [source.encode(f" {values[place]}")]))
        return Drawn(prompt, probes)


def tool_output(source: Source, rng: random.Random) -> str:
    """Lines of JSON, of TOOL_TOKENS tokens or a few more."""
    text = ""
    while len(source.encode(text)) < TOOL_TOKENS:
        folder, name = rng.sample(NOUNS, 2)
        text += (
            f'{{"path": "{folder}/{name}.py", "line": {rng.randrange(1, 900)}, '
            f'"match": "{rng.choice(NOUNS)}", "ms": {rng.randrange(1, 90)}}}\n'
        )
    return text
