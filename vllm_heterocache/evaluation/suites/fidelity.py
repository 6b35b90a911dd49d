"""Suite `fidelity`: how far the next-token distributions are from full attention's.

A text is continued with its own tokens (teacher forcing), which are forced during decode, after
the prompt was compacted. vLLM returns log-probabilities before a logits processor changes them:
those of the TOP_K most likely tokens and of the forced one.

- kl: KL(full || configuration) in nats a token. Tokens outside the TOP_K of either side share one
  bucket, so this is a lower bound of the whole vocabulary's KL, close while `rest` is small.
- top1: share of tokens whose most likely successor is full attention's. This is the score.
- nll: negative log-likelihood of the text in nats a token; exp(nll) is its perplexity.
- rest: full attention's probability in that bucket.

Output position 0 is left out: its distribution is the prefill's, before compaction. Settings:
`--data FILE` for a text of one's own, `--set tokens=N` (128) and `--set top_k=K` (256).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_heterocache.evaluation.distributions import Distributions, bucketed_kl
from vllm_heterocache.evaluation.haystacks import piece, prose
from vllm_heterocache.evaluation.sample import Sample, SuiteSettings
from vllm_heterocache.evaluation.suite_options import read_options
from vllm_heterocache.evaluation.suites.chain import CHARACTERS_PER_TOKEN

if TYPE_CHECKING:
    from collections.abc import Iterator

OPTIONS = {"tokens": 128, "top_k": 256}


class FidelitySuite:
    name = "fidelity"

    def samples(self, tokenizer: Any, settings: SuiteSettings) -> Iterator[Sample]:
        options = read_options(self.name, settings, OPTIONS)
        num_tokens = options["tokens"]
        if settings.tasks:
            raise ValueError("--tasks is refused: suite fidelity has no tasks; leave it out")
        text = prose() if settings.data is None else settings.data.read_text(encoding="utf-8")
        for length in settings.lengths:
            needed = length + num_tokens
            for index in range(settings.num_samples):
                part = piece(text, settings.seed * 7 + index, CHARACTERS_PER_TOKEN * needed)
                ids = tokenizer.encode(part, add_special_tokens=False)[:needed]
                if len(ids) < needed:
                    raise ValueError(
                        f"--data {settings.data} has {len(ids)} tokens and {needed} are needed; "
                        "take a longer text or smaller --lengths"
                    )
                yield Sample(
                    id=f"fidelity-{length}-{num_tokens}-{index}",
                    prompt=ids[:length],
                    max_tokens=num_tokens,
                    forced=list(ids[length:]),
                    top_k=options["top_k"],
                    meta={"length": length, "top_k": options["top_k"]},
                )

    def score(self, sample: Sample, tokens: list[int], text: str) -> dict[str, float]:
        """Only that the text was forced; `score_distributions` has the metrics."""
        return {"forced": float(tokens == sample.forced)}

    def score_distributions(self, full: Distributions, other: Distributions) -> dict[str, float]:
        """Means over the output positions after the first, `full` being full attention's."""
        if full.ids.shape != other.ids.shape or len(full.ids) < 2:
            raise ValueError(
                f"two or more equal positions are compared: {full.ids.shape}, {other.ids.shape}"
            )
        compared = np.array([bucketed_kl(full, other, i) for i in range(1, len(full.ids))])
        kl, rest = compared.mean(axis=0)
        top1 = full.ids[1:, 0] == other.ids[1:, 0]
        return {
            "score": float(top1.mean()),
            "top1": float(top1.mean()),
            "kl": float(kl),
            "nll": float(-other.chosen[1:].mean()),
            "rest": float(rest),
        }
