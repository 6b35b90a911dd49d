"""Probe `json`: facts of a text as JSON, key by key.

No public benchmark is quite this one. Lost in the Middle (arXiv 2307.03172) and InfiniteBench's
Retrieve.KV (arXiv 2402.13718) ask for values of a JSON object. Here a record is three sentences of
a text, with a value each, and some of the records become a list of JSON objects. Keys, quotes and
brackets are forced; the values are the model's. As many other records stand in the text as are
asked for. Keys are the sentences' words, because a small model finds little by others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_heterocache.evaluation.chain import KEYS, hide
from vllm_heterocache.evaluation.suites.probes.probe import Drawn, Probe
from vllm_heterocache.evaluation.suites.probes.source import check_room
from vllm_heterocache.evaluation.words import NOUNS

if TYPE_CHECKING:
    import random

    from vllm_heterocache.evaluation.suites.probes.source import Source

STATEMENT = (
    ' The carrier for {place} is "{carrier}". The cargo for {place} is "{cargo}". '
    "The weight for {place} is {weight}."
)
LEADS = (
    '{{"the carrier for {place} is": "',
    '", "the cargo for {place} is": "',
    '", "the weight for {place} is":',
)
BEGIN, NEXT = "\n\n[", "},\n"


class Records:
    def draw(self, source: Source, rng: random.Random, length: int, questions: int) -> Drawn:
        if 2 * questions > len(KEYS):
            raise ValueError(
                f"--set questions={questions} is refused: --tasks json has {len(KEYS) // 2} at most"
            )
        places = rng.sample(KEYS, 2 * questions)
        records = [
            {
                "place": place,
                "carrier": rng.choice(NOUNS),
                "cargo": rng.choice(NOUNS),
                "weight": str(rng.randrange(10**4, 10**5)),
            }
            for place in places
        ]
        said = [source.encode(STATEMENT.format(**record)) for record in records]
        opening = source.opening()
        room = length - len(opening) - sum(map(len, said))
        check_room("json", length, room, len(said) + 2)
        prompt = opening + hide(source.filler("prose", room), said, rng)
        asked = rng.sample(records, questions)
        probes = [_probe(source, record, NEXT if i else BEGIN) for i, record in enumerate(asked)]
        return Drawn(prompt, probes)


def _probe(source: Source, record: dict[str, str], before: str) -> Probe:
    # as in the sentences: a number has its space, a word in quotes has none
    values = [record["carrier"], record["cargo"], f" {record['weight']}"]
    leads = [lead.format(place=record["place"]) for lead in LEADS]
    leads[0] = before + leads[0]
    return Probe([source.encode(x) for x in leads], [source.encode(v) for v in values])
