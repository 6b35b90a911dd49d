"""A Llama whose attention reads what a simulation left of a prompt, without an engine.

transformers computes everything but attention, so that every model of the Llama shape can be
simulated. A reader is called for each layer in the place of attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModelForCausalLM

READER = "heterocache_study"


@dataclass(frozen=True)
class HeadCache:
    """What a KV head keeps of a prompt: n tokens, each with a number added to its logits."""

    keys: torch.Tensor  # [n, D], after RoPE
    values: torch.Tensor  # [n, D]
    bias: torch.Tensor  # [n] fp32


class Reader(Protocol):
    """Attention of a layer."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """[n, Hq, D] output of n tokens: query [n, Hq, D], key and value [n, H, D], after RoPE."""
        ...


@dataclass
class PromptReader:
    """Full causal attention over a prompt, of which keys, values and queries are kept."""

    keys: list[torch.Tensor] = field(default_factory=list)  # of each layer [T, H, D]
    values: list[torch.Tensor] = field(default_factory=list)
    queries: list[torch.Tensor] = field(default_factory=list)  # [T, Hq, D]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        assert layer == len(self.keys)
        self.keys.append(key.clone())
        self.values.append(value.clone())
        self.queries.append(query.clone())
        heads_first = [one.transpose(0, 1)[None] for one in (query, key, value)]
        output = F.scaled_dot_product_attention(
            *heads_first, is_causal=True, enable_gqa=True, scale=scale
        )
        return output[0].transpose(0, 1)


@dataclass(frozen=True)
class CacheReader:
    """Attention of tokens behind a prompt over what its heads kept, and over these tokens."""

    caches: list[list[HeadCache]]  # [L][H]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        num_tokens, num_kv_heads = key.shape[:2]
        by_group = query.float().unflatten(1, (num_kv_heads, -1)) * scale  # [n, H, G, D]
        hidden = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=key.device).triu(1)
        outputs = []
        for head, cache in enumerate(self.caches[layer]):
            mine = by_group[:, head].transpose(0, 1)  # [G, n, D]
            of_prompt = mine @ cache.keys.float().T + cache.bias
            of_tokens = (mine @ key[:, head].float().T).masked_fill(hidden, -torch.inf)
            weights = torch.cat([of_prompt, of_tokens], -1).softmax(-1)
            outputs.append(weights @ torch.cat([cache.values, value[:, head]]).float())
        return torch.stack(outputs).permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)


class SimulatedModel:
    """A model folder of the Llama shape, of which one request at a time is computed."""

    def __init__(self, folder: str, device: str, dtype: torch.dtype) -> None:
        AttentionInterface.register(READER, _attention)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=READER
        ).to(device)
        config = self.model.config
        self.device = device
        self.num_layers = config.num_hidden_layers
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = self.head_dim**-0.5

    def prefill(self, tokens: list[int]) -> PromptReader:
        """Keys, values and queries of a prompt."""
        reader = PromptReader()
        self._run(tokens, 0, reader, logits_to_keep=1)
        return reader

    def follow(self, tokens: list[int], num_prompt_tokens: int, reader: Reader) -> torch.Tensor:
        """[n, vocabulary] fp32: log-probabilities of what follows each of n tokens."""
        logits = self._run(tokens, num_prompt_tokens, reader, logits_to_keep=0)
        return logits.float().log_softmax(-1)

    @torch.inference_mode()
    def rotated(self, vectors: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Vectors [n, heads, D] after RoPE, moved by `steps` [n] positions."""
        frequency = self.model.model.rotary_emb.inv_freq.float()
        angle = (steps[:, None].float() * frequency).repeat(1, 2)[:, None]
        first, second = vectors.float().chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        return vectors.float() * angle.cos() + turned * angle.sin()

    @torch.inference_mode()
    def _run(
        self, tokens: list[int], first_position: int, reader: Reader, logits_to_keep: int
    ) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self.device)
        positions = torch.arange(first_position, first_position + len(tokens), device=self.device)
        output = self.model(
            input_ids=ids,
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=logits_to_keep,
            reader=reader,
        )
        return output.logits[0]


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    reader: Reader,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    tokens_first = [one[0].transpose(0, 1) for one in (query, key, value)]
    return reader.attend(module.layer_idx, *tokens_first, scaling)[None], None
