"""Models without weights and head profiles without calibration, for benchmarks.

`paper` has the roles of the published Llama-3.1-8B clusters: 33 pivots and 17 volatile heads of
256, with their spread over layers, cluster sizes and budget weights. `retrieval` makes the recipe
of that name keep half of a budget of 0.25 in 32 whole heads, unevenly over layers, up to 4 in one.
With `finder_share` 0 these are pivots and the other 224 heads satellites; by default 23 of the
others are finders, spread evenly. Positions within a layer and leaders are random, from a fixed
seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole
from vllm_heterocache.heads.profile import LEAD_LAYERS, HeadProfile, ModelIdentity
from vllm_heterocache.heads.recipes import configured_heads

# Published allocation ratios of Llama-3.1-8B's compressed heads: minimum, 5th, 50th and 95th
# percentile, maximum.
WEIGHT_QUANTILES = ((0.0, 5.0, 50.0, 95.0, 100.0), (0.567, 0.781, 0.948, 1.455, 1.997))
SIMILAR, CHANCE = 0.8, 0.2


@dataclass(frozen=True)
class Shape:
    """A Llama-like model and how its roles spread over layers."""

    name: str
    num_layers: int  # with full attention
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_tokens: int
    dtype: str
    gpu_budget: float
    # layer -> (pivots, volatile, anchors); every other layer has one pivot and satellites; of a
    # shape without any there is no profile `paper`
    paper_layers: dict[int, tuple[int, int, int]]
    retrieval_pivots: tuple[int, ...]  # of each layer
    architecture: str = "LlamaForCausalLM"
    settings: Mapping[str, Any] = field(default_factory=dict)  # arguments of LLM that it needs
    # whether rounding decides the tokens of dummy weights: norms of 1 + weight hold activations up
    is_chaotic: bool = False

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Indices in the model of the layers with full attention; None for all of them."""
        return None

    @property
    def page_bytes(self) -> int:
        """Bytes of 16 tokens of K and V of one head."""
        return 16 * 2 * self.head_dim * (4 if self.dtype == "float32" else 2)

    @property
    def block_bytes(self) -> int:
        """Bytes of a page of every head."""
        return self.num_layers * self.num_kv_heads * self.page_bytes

    def config(self) -> dict[str, Any]:
        """Hugging Face config.json."""
        return {
            "architectures": [self.architecture],
            "model_type": "llama",
            "torch_dtype": self.dtype,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_q_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_tokens,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5,
            "initializer_range": 0.1,  # for `write_weights`: attention must matter
            "tie_word_embeddings": False,
        }


LLAMA = Shape(
    name="llama-3.1-8b-shape",
    num_layers=32,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    hidden_size=4096,
    intermediate_size=14336,
    vocab_size=128256,
    max_tokens=262144,
    dtype="bfloat16",
    gpu_budget=0.25,
    paper_layers={
        **dict.fromkeys((0, 8, 15, 30), (1, 0, 1)),
        **dict.fromkeys((2, 7, 12, 14, 19), (1, 1, 0)),
        **dict.fromkeys((21, 27, 29), (1, 1, 1)),
        31: (1, 1, 2),
        **dict.fromkeys((5, 10, 17), (1, 2, 0)),
        25: (1, 2, 1),
        23: (2, 0, 0),
    },
    retrieval_pivots=(
        *(1, 0, 1, 0, 2, 0, 1, 1, 0, 2, 1, 3, 0, 2, 4, 1),
        *(0, 3, 1, 0, 2, 1, 0, 1, 2, 0, 0, 1, 1, 0, 1, 0),
    ),
)  # fmt: skip
TINY = Shape(
    name="tiny-shape",
    num_layers=4,
    num_q_heads=8,
    num_kv_heads=4,
    head_dim=64,
    hidden_size=64,
    intermediate_size=96,
    vocab_size=499,
    max_tokens=4096,
    dtype="float32",
    gpu_budget=0.5,
    paper_layers={1: (1, 1, 1)},
    retrieval_pivots=(1, 0, 2, 1),
)


def paper_profile(shape: Shape, seed: int = 0) -> HeadProfile:
    """Roles only, as in a published cluster file: recipe "paper" takes them as they are."""
    rng = np.random.default_rng(seed)
    size = (shape.num_layers, shape.num_kv_heads)
    roles = np.full(size, HeadRole.SATELLITE, np.int8)
    leaders = np.full(size, -1, np.int32)
    for layer in range(shape.num_layers):
        pivots, volatile, anchors = shape.paper_layers.get(layer, (1, 0, 0))
        kinds = [HeadRole.PIVOT] * pivots + [HeadRole.VOLATILE] * volatile
        kinds += [HeadRole.ANCHOR] * anchors
        heads = rng.permutation(shape.num_kv_heads)
        roles[layer, heads[: len(kinds)]] = kinds
        led = heads[len(kinds) :]
        # a second pivot leads a single satellite, as the published one does
        leaders[layer, led] = layer * shape.num_kv_heads + heads[0]
        leaders[layer, led[: pivots - 1]] = layer * shape.num_kv_heads + heads[1:pivots]
    full = (roles == HeadRole.PIVOT) | (roles == HeadRole.VOLATILE)
    ranks = np.linspace(0.0, 100.0, int((~full).sum()))
    weights = np.zeros(size, np.float32)
    weights[~full] = rng.permutation(np.interp(ranks, *WEIGHT_QUANTILES))
    assignment = HeadAssignment(roles, leaders, weights)
    return HeadProfile(_identity(shape), {}, _provenance("paper"), assignment=assignment)


def retrieval_profile(shape: Shape, seed: int = 0, ranks: int = 1) -> HeadProfile:
    """Scores and similarities from which recipe "retrieval" chooses exactly the wanted pivots.

    Every other head resembles one pivot of its own or the two layers before. Roles are made
    within a tensor-parallel rank, so with `ranks` it is one of its own rank where there is any.
    """
    rng = np.random.default_rng(seed)
    num_layers, num_heads = shape.num_layers, shape.num_kv_heads
    retrieval = np.zeros((num_layers, num_heads), np.float32)
    for layer, count in enumerate(shape.retrieval_pivots):
        retrieval[layer, rng.permutation(num_heads)[:count]] = 1.0
    similarity = np.full((1 + LEAD_LAYERS, num_layers, num_heads, num_heads), CHANCE, np.float32)
    for distance in range(1 + LEAD_LAYERS):
        similarity[distance, num_layers - distance :] = np.nan
    similarity[0, :, np.arange(num_heads), np.arange(num_heads)] = 1.0
    pivots = np.argwhere(retrieval > 0)
    for layer, head in np.argwhere(retrieval == 0):
        near = pivots[(pivots[:, 0] <= layer) & (pivots[:, 0] >= layer - LEAD_LAYERS)]
        own = near[near[:, 1] * ranks // num_heads == head * ranks // num_heads]
        near = own if len(own) else near
        pivot_layer, pivot = near[rng.integers(len(near))]
        similarity[layer - pivot_layer, pivot_layer, pivot, head] = SIMILAR
    return HeadProfile(
        _identity(shape),
        {"top_share": CHANCE},
        _provenance("retrieval"),
        retrieval=retrieval,
        similarity=similarity,
    )


def assignment_of(shape: Shape, recipe: str, gpu_budget: float | None = None) -> HeadAssignment:
    """The roles that an engine makes of the profile, with pivots and satellites (`finder_share`
    0)."""
    profile = {"paper": paper_profile, "retrieval": retrieval_profile}[recipe](shape)
    budget = gpu_budget or shape.gpu_budget
    config = HeteroCacheConfig(recipe=recipe, gpu_budget=budget, finder_share=0)
    return configured_heads(
        HeadProfile.from_json(json.loads(json.dumps(profile.to_json()))), config
    )


def _identity(shape: Shape) -> ModelIdentity:
    return ModelIdentity(
        shape.name,
        shape.architecture,
        shape.num_layers,
        shape.num_q_heads,
        shape.num_kv_heads,
        shape.head_dim,
        layers=shape.layers,
    )


def _provenance(name: str) -> dict[str, Any]:
    return {"source": f"scripts/bench/common/profiles.py, {name}; not measured on any model"}


def write_model(shape: Shape, folder: Path, ranks: int = 1) -> None:
    """config.json and the profiles. There are no weights and no tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1) + "\n")
    if shape.paper_layers:
        paper_profile(shape).save(folder / "paper.json")
    retrieval_profile(shape, ranks=ranks).save(folder / "retrieval.json")


def write_weights(shape: Shape, folder: Path, factors: Mapping[str, float] | None = None) -> None:
    """Random weights under which attention decides what is generated; dummy ones do not.

    Args:
        factors: what to multiply the weights by whose name contains a key.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape.config()))
    with torch.no_grad():
        for name, weights in model.named_parameters():
            for part, factor in (factors or {}).items():
                if part in name:
                    weights.mul_(factor)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1) + "\n")
