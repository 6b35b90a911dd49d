"""Whether the attention layers of a loaded model are those that the serving plan is for, and
whether those that vLLM serves can keep their KV beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_heterocache.compat import Attention, FullAttentionSpec, MambaBase, SlidingWindowSpec
from vllm_heterocache.compat.layer_kinds import mixes_recurrent_layers
from vllm_heterocache.refusal import Refusal
from vllm_heterocache.startup.refusals.common import PACKAGE, sentence

if TYPE_CHECKING:
    from collections.abc import Sequence


def check_layers(
    layers: dict[str, Any], shape: tuple[int, ...], group: int, head_size: int
) -> None:
    """Raise ValueError, in one sentence, for a model with other layers than the plan's.

    Args:
        layers: the attention modules of this rank by name, without those that vLLM serves.
        shape: L and H of the plan on this rank.
        group: query heads of a KV head.
        head_size: of keys and values.
    """
    num_layers, num_kv_heads = shape
    expected = (group * num_kv_heads, num_kv_heads, head_size, head_size)
    if len(layers) != num_layers:
        _refuse(f"{len(layers)} of the {num_layers} layers of a rank have full attention")
    for name, layer in layers.items():
        if type(layer.impl).__module__.split(".")[0] != PACKAGE:
            _refuse(f"layer {name} brings its own attention, {type(layer.impl).__name__}")
        found = (layer.num_heads, layer.num_kv_heads, layer.head_size, layer.head_size_v)
        if found != expected:
            _refuse(
                f"layer {name} has (query heads, KV heads, sizes of key and value) {found}, and "
                f"the model's config says {expected}"
            )
    _check_logits({name: layer.impl for name, layer in layers.items()})


def _check_logits(impls: dict[str, Any]) -> None:
    """Kernels take the soft cap of all layers, and sinks of all of them or of none."""
    first = next(iter(impls))

    def described(name: str) -> str:
        impl = impls[name]
        sinks = "no attention sinks" if impl.sinks is None else "attention sinks"
        return f"{sinks} and a soft cap of {impl.soft_cap:g}"

    for name in impls:
        if described(name) != described(first):
            _refuse(f"layer {name} has {described(name)}, and layer {first} {described(first)}")


def check_layer_ids(found: Sequence[int], served: Sequence[int]) -> None:
    """Raise ValueError, in one sentence, where other layers have full attention than those that
    the model's config names.

    Args:
        found: indices of the loaded layers of this rank.
        served: indices of all layers of the model with full attention.
    """
    if not set(found) <= set(served):
        _refuse(
            f"full attention is in layers {list(found)}, where the model's config names "
            f"{list(served)}"
        )


def check_sliding_layers(layers: dict[str, Any], vllm_config: Any) -> None:
    """Raise ValueError, in one sentence, for layers that slide over a window but have no KV of
    their own that vLLM serves.

    Args:
        layers: the model's attention modules of this rank that slide, by name.
    """
    for name, layer in layers.items():
        if type(layer.impl).__module__.split(".")[0] == PACKAGE:
            _refuse(f"layer {name}, which slides over a window, is served by HeteroCache")
        if type(layer.get_kv_cache_spec(vllm_config)) is not SlidingWindowSpec:
            _refuse(f"layer {name}, which slides over a window, has no KV cache of its own")


def check_recurrent_layers(layers: dict[str, Any], model_config: Any) -> None:
    """Raise ValueError, in one sentence, for layers with a cache that are neither attention nor
    recurrent, or that the model's config does not tell of.

    Args:
        layers: the model's modules of this rank that have a cache and are no attention, by name.
    """
    for name, layer in layers.items():
        if not isinstance(layer, MambaBase) or not mixes_recurrent_layers(model_config):
            _refuse(f"layer {name} is of class {type(layer).__name__}")


def check_drafter_layers(layers: dict[str, Any], vllm_config: Any) -> None:
    """Raise ValueError, in one sentence, for a drafter whose layers are not full attention over KV
    of their own, served by vLLM.

    Args:
        layers: the drafter's attention modules of this rank by name.
    """
    for name, layer in layers.items():
        if not isinstance(layer, Attention):
            _refuse_drafter(f"its layer {name} is of class {type(layer).__name__}")
        if layer.kv_sharing_target_layer_name is not None:
            _refuse_drafter(f"its layer {name} reads the KV of a layer of the model")
        if type(layer.impl).__module__.split(".")[0] == PACKAGE:
            _refuse_drafter(f"its layer {name} is served by HeteroCache, without a profile")
        if type(layer.get_kv_cache_spec(vllm_config)) is not FullAttentionSpec:
            _refuse_drafter(f"its layer {name} has no full causal attention")


def _refuse_drafter(reason: str) -> None:
    raise Refusal(
        *sentence(
            "this drafter in speculative_config",
            f"{reason}, and a drafter's layers keep the KV of the whole sequence in blocks of "
            "their own",
            "use method 'ngram' or another drafter",
        )
    )


def _refuse(reason: str) -> None:
    why = f"its layers must be alike, and {reason}"
    raise Refusal(*sentence("this model", why, "serve it with another attention backend"))
