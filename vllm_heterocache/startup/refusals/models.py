"""Models that have no KV to select pages of, or KV of another kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_heterocache.compat.layer_kinds import (
    FULL_ATTENTION_KINDS,
    KINDS_WITHOUT_CACHE,
    RECURRENT_KINDS,
    SLIDING_KIND,
    layer_kinds,
    mixes_recurrent_layers,
)
from vllm_heterocache.startup.refusals.common import sentence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_heterocache.refusal import Sentence


def shared_kv(config: Any) -> Iterator[Sentence]:
    shared = getattr(config.model_config.hf_text_config, "num_kv_shared_layers", 0)
    if shared:
        reason = f"{shared} of its layers share the KV cache of other layers (num_kv_shared_layers)"
        yield _refused(config.model_config, reason)


def model_kind(config: Any) -> Iterator[Sentence]:
    model = config.model_config
    kinds = {
        "it uses multi-head latent attention (MLA), which has no per-head KV to select": (
            model.use_mla
        ),
        "its logits have a bias by distance (ALiBi)": model.uses_alibi,
        "it is an encoder-decoder model": model.is_encoder_decoder,
        "it has no attention layers": model.is_attention_free,
        "it is a discrete diffusion model, which attends in both directions": (
            model.is_diffusion or config.diffusion_config is not None
        ),
        "it attends in both directions within images (prefix language model)": (
            model.is_mm_prefix_lm
        ),
    }
    if model.runner_type != "generate":
        kinds[f"it runs as an encoder or pooling model (runner {model.runner_type!r})"] = True
    yield from _refused_kinds(model, kinds)


def attention_kind(config: Any) -> Iterator[Sentence]:
    """Models in which layers neither have full causal attention nor slide or are recurrent beside
    such layers."""
    model = config.model_config
    text = model.hf_text_config
    window, kinds = model.get_sliding_window(), layer_kinds(model)
    is_recurrent = mixes_recurrent_layers(model)
    served = (*RECURRENT_KINDS, *KINDS_WITHOUT_CACHE) if is_recurrent else (SLIDING_KIND,)
    others = kinds.difference(FULL_ATTENTION_KINDS, served)
    if kinds == {SLIDING_KIND}:
        yield _refused(
            model,
            f"every layer slides over a window of {window} tokens, so there is no long KV cache "
            "to compress",
            f" or add --disable-sliding-window with --max-model-len {window} or less",
        )
    elif others or model.is_hybrid > is_recurrent or model.rswa_window is not None:
        names = ", ".join(sorted(others)) or "recurrent or windowed layers"
        yield _refused(model, f"it mixes full attention with {names}")
    chunk = getattr(text, "attention_chunk_size", None)
    if chunk:
        yield _refused(model, f"it attends in chunks of {chunk} tokens")


def head_shape(config: Any) -> Iterator[Sentence]:
    """Models whose pages are not K and V of the size that the config calls its heads'."""
    model, text = config.model_config, config.model_config.hf_text_config
    if model.use_mla:
        return
    size, of_values, of_full = (
        getattr(text, name, None) for name in ("head_dim", "v_head_dim", "global_head_dim")
    )
    kinds = {
        f"its keys have {size} elements and its values {of_values}": (
            None not in (size, of_values) and size != of_values
        ),
        f"heads of its layers with full attention have {of_full} elements and others {size}": (
            None not in (size, of_full) and size != of_full
        ),
        "keys of its layers with full attention are their values (attention_k_eq_v)": getattr(
            text, "attention_k_eq_v", False
        ),
    }
    yield from _refused_kinds(model, kinds)


def _refused_kinds(model: Any, kinds: dict[str, bool]) -> Iterator[Sentence]:
    """Sentences for the reasons that apply."""
    for reason, applies in kinds.items():
        if applies:
            yield _refused(model, reason)


def _refused(model: Any, reason: str, or_else: str = "") -> Sentence:
    """The sentence; `or_else` is what else helps."""
    fix = f"serve it with another attention backend{or_else}"
    return sentence(f"the model {model.model!r}", reason, fix)
