"""A logits processor that forces chosen output tokens: questions asked during decode.

vLLM loads it by name,
`logits_processors=["vllm_heterocache.evaluation.forced_tokens:ForcedTokens"]`, and a request uses
it through `SamplingParams(extra_args={"forced_tokens": [...]})`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from vllm_heterocache.compat import AdapterLogitsProcessor
from vllm_heterocache.evaluation.sample import FREE

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_heterocache.compat import SamplingParams

logger = logging.getLogger("vllm.heterocache")


class ForcedTokens(AdapterLogitsProcessor):
    """Output position i gets token `forced_tokens[i]`, or the model's own where that is FREE."""

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        forced = (params.extra_args or {}).get("forced_tokens")
        if forced is None:
            return
        is_list = isinstance(forced, list | tuple)
        if not is_list or not all(isinstance(t, int) and t >= FREE for t in forced):
            raise ValueError(
                "extra_args['forced_tokens'] must be a list of token ids, with -1 where the model "
                f"is free to choose; got {forced!r:.100}."
            )

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        forced = (params.extra_args or {}).get("forced_tokens")
        if forced is None:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            token = forced[len(output_ids)] if len(output_ids) < len(forced) else FREE
            if token >= logits.shape[-1]:  # an exception here would end the engine
                logger.error("forced token %d is not in the vocabulary; it is not forced", token)
            elif token != FREE:
                kept = logits[token].clone()
                logits.fill_(-torch.inf)
                logits[token] = kept
            return logits

        return force
