"""A logits processor that forces chosen output tokens: questions asked during decode.

vLLM loads it by name,
`logits_processors=["vllm_heterocache.evaluation.forced_tokens:ForcedTokens"]`, and a request uses
it through `SamplingParams(extra_args={"forced_tokens": [...]})`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_heterocache.compat import AdapterLogitsProcessor, V2LogitsProcessor
from vllm_heterocache.evaluation.sample import FREE
from vllm_heterocache.worker.tables.upload import upload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm_heterocache.compat import SamplingParams

logger = logging.getLogger("vllm.heterocache")


class ForcedTokens(AdapterLogitsProcessor, V2LogitsProcessor):
    """Output position i gets token `forced_tokens[i]`, or the model's own where that is FREE.

    One class serves both of vLLM's model runners, because users name one class: V1 asks for a
    function a request, V2 hands over the logits of the whole batch.
    """

    def __init__(self, vllm_config: Any, *state: Any) -> None:
        """`state` is (device, is_pin_memory) in V1 and the runner's request state in V2."""
        self._forced: dict[int, list[int]] = {}  # V2: request slot -> forced tokens
        if len(state) == 1:
            (self._requests,) = state
        else:
            AdapterLogitsProcessor.__init__(self, vllm_config, *state)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        forced = (sampling_params.extra_args or {}).get("forced_tokens")
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

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Force the tokens of one step; `ctx` describes the batch in V2."""
        return super().apply(logits) if ctx is None else self._force_rows(logits, ctx)

    # V2

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """A request enters the batch at a slot that another may have left."""
        self._forced.pop(req_idx, None)
        forced = (sampling_params.extra_args or {}).get("forced_tokens")
        if forced is not None:
            self._forced[req_idx] = list(forced)
        return forced is not None

    def _force_rows(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Each row's next token is known on the host, as there is no speculation."""
        slots = ctx.idx_mapping_np.tolist()
        assert logits.shape[0] == len(slots), "a request has one row"
        seq_lens = ctx.seq_lens_upper_bound_np[: len(slots)].tolist()  # padded for a CUDA graph
        chosen = []
        for row, (slot, seq_len) in enumerate(zip(slots, seq_lens, strict=True)):
            position = seq_len - int(self._requests.prompt_len.np[slot])
            token = _token_at(self._forced.get(slot, ()), position, logits.shape[-1])
            if token != FREE:
                chosen.append((row, token))
        if chosen:
            places = upload(np.array(chosen, np.int64), logits.device)
            rows, tokens = places[:, 0], places[:, 1]
            kept = logits[rows, tokens]
            logits[rows] = -torch.inf
            logits[rows, tokens] = kept
        return logits

    # V1

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        forced = (params.extra_args or {}).get("forced_tokens")
        if forced is None:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            token = _token_at(forced, len(output_ids), logits.shape[-1])
            if token != FREE:
                kept = logits[token].clone()
                logits.fill_(-torch.inf)
                logits[token] = kept
            return logits

        return force


def _token_at(forced: Sequence[int], position: int, vocab_size: int) -> int:
    """The token forced at an output position; FREE where none is."""
    token = forced[position] if 0 <= position < len(forced) else FREE
    if token >= vocab_size:  # an exception here would end the engine
        logger.error("forced token %d is not in the vocabulary; it is not forced", token)
        return FREE
    return token
