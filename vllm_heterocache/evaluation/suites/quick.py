"""Suite `quick`: a chain and a fidelity sample together, so that one engine start answers both.

It is the regression gate's (tests/e2e/test_quality_gate.py): `--samples` chains (task `prose`, or
`--tasks` as for suite `chain`) and as many texts (task `fidelity`) of each length. Settings are
those of both suites.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_heterocache.evaluation.suite_options import read_options
from vllm_heterocache.evaluation.suites import chain, fidelity
from vllm_heterocache.evaluation.suites.chain import ChainSuite
from vllm_heterocache.evaluation.suites.fidelity import FidelitySuite

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_heterocache.evaluation.distributions import Distributions
    from vllm_heterocache.evaluation.sample import Sample, SuiteSettings

FIDELITY = "fidelity"


class QuickSuite:
    name = "quick"

    def __init__(self) -> None:
        self._chain, self._fidelity = ChainSuite(), FidelitySuite()

    def samples(self, tokenizer: Any, settings: SuiteSettings) -> Iterator[Sample]:
        """Length by length, so that both kinds share a batch."""
        options = read_options(self.name, settings, chain.OPTIONS | fidelity.OPTIONS)
        of_chain = {name: options[name] for name in chain.OPTIONS}
        of_texts = {name: options[name] for name in fidelity.OPTIONS}
        for length in settings.lengths:
            of_length = replace(settings, lengths=(length,))
            yield from self._chain.samples(tokenizer, replace(of_length, extra=of_chain))
            texts = replace(of_length, tasks=None, extra=of_texts)
            for sample in self._fidelity.samples(tokenizer, texts):
                yield replace(sample, meta=sample.meta | {"task": FIDELITY})

    def right(self, sample: Sample, tokens: list[int]) -> list[bool]:
        """Of a chain, which questions are answered exactly; a text asks none."""
        return [] if sample.task == FIDELITY else self._chain.right(sample, tokens)

    def score(self, sample: Sample, tokens: list[int], text: str) -> dict[str, float]:
        part = self._fidelity if sample.task == FIDELITY else self._chain
        return part.score(sample, tokens, text)

    def score_distributions(self, full: Distributions, other: Distributions) -> dict[str, float]:
        return self._fidelity.score_distributions(full, other)
