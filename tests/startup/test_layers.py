from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from vllm_heterocache.compat import Attention, FullAttentionSpec, MambaBase, SlidingWindowSpec
from vllm_heterocache.startup.layers import (
    check_drafter_layers,
    check_layer_ids,
    check_layers,
    check_recurrent_layers,
    check_sliding_layers,
)


class Ours:
    __module__ = "vllm_heterocache.attention.backend"

    def __init__(self, sinks=None, soft_cap=0.0) -> None:
        self.sinks, self.soft_cap = sinks, soft_cap


class Foreign:
    pass


def layers(**changes) -> dict[str, SimpleNamespace]:
    """Three layers of 6 query and 2 KV heads of 16; `changes` are of the second."""
    plain = {"num_heads": 6, "num_kv_heads": 2, "head_size": 16, "head_size_v": 16, "impl": Ours()}
    return {
        f"layers.{index}": SimpleNamespace(**{**plain, **(changes if index == 1 else {})})
        for index in range(3)
    }


def check(found: dict[str, SimpleNamespace]) -> None:
    check_layers(found, (3, 2), 3, 16)


def test_layers_that_are_alike_pass():
    check(layers())


@pytest.mark.feature("Layers with unlike heads or an attention of their own", refused=True)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"impl": Foreign()}, "layer layers.1 brings its own attention, Foreign"),
        ({"num_kv_heads": 1}, r"layer layers.1 has .*\(6, 1, 16, 16\).*\(6, 2, 16, 16\)"),
        ({"num_heads": 4}, r"layer layers.1 has .*\(4, 2, 16, 16\)"),
        ({"head_size": 32}, r"layer layers.1 has .*\(6, 2, 32, 16\)"),
        (
            {"impl": Ours(sinks=torch.zeros(6))},
            r"layer layers.1 has attention sinks .*, and layer layers.0 no attention sinks",
        ),
        ({"impl": Ours(soft_cap=50.0)}, r"layer layers.1 has no attention sinks and .* cap of 50"),
        ({"head_size_v": 8}, r"layer layers.1 has .*\(6, 2, 16, 8\)"),
    ],
)
def test_a_layer_unlike_the_plan_is_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words) as refusal:
        check(layers(**changes))
    message = str(refusal.value)
    assert message.endswith("; serve it with another attention backend.") and "\n" not in message


def test_layers_without_attention_are_refused():
    some = layers()
    del some["layers.1"]
    with pytest.raises(ValueError, match="2 of the 3 layers of a rank have full attention"):
        check(some)


def test_layers_with_full_attention_are_those_of_the_config():
    check_layer_ids([5, 11], [5, 11, 17])
    with pytest.raises(ValueError, match=r"in layers \[5, 12\], where .* names \[5, 11, 17\]"):
        check_layer_ids([5, 12], [5, 11, 17])


def sliding_layer(impl=None, kind=SlidingWindowSpec) -> SimpleNamespace:
    geometry = {"block_size": 16, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float16}
    spec = kind and kind(**geometry, sliding_window=9)
    return SimpleNamespace(impl=impl or Foreign(), get_kv_cache_spec=lambda config: spec)


def test_sliding_layers_that_vllm_serves_pass():
    check_sliding_layers({"layers.0": sliding_layer()}, None)


@pytest.mark.feature("Layers with unlike heads or an attention of their own", refused=True)
@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (sliding_layer(Ours()), "is served by HeteroCache"),
        (sliding_layer(kind=None), "has no KV cache of its own"),
        (sliding_layer(kind=FullAttentionSpec), "has no KV cache of its own"),
    ],
)
def test_sliding_layers_without_a_group_of_vllms_are_refused(layer, words):
    with pytest.raises(ValueError, match=f"layer layers.1, which slides over a window, {words}"):
        check_sliding_layers({"layers.0": sliding_layer(), "layers.1": layer}, None)


def test_recurrent_layers_that_the_config_tells_of_pass():
    check_recurrent_layers({"layers.0": Mock(spec=MambaBase)}, model_of("conv", "full_attention"))
    check_recurrent_layers({}, model_of("full_attention"))


@pytest.mark.feature("Layers with unlike heads or an attention of their own", refused=True)
@pytest.mark.parametrize(
    ("layer", "kinds"),
    [
        pytest.param(SimpleNamespace(), ["conv", "full_attention"], id="neither-kind"),
        pytest.param(Mock(spec=MambaBase), ["full_attention"] * 2, id="not-in-the-config"),
    ],
)
def test_other_layers_with_a_cache_are_refused(layer, kinds):
    with pytest.raises(ValueError, match=r"layer layers.1 is of class \w+; serve it with another"):
        check_recurrent_layers({"layers.1": layer}, model_of(*kinds))


def model_of(*kinds: str) -> SimpleNamespace:
    text = SimpleNamespace(layer_types=kinds)
    return SimpleNamespace(hf_text_config=text, get_sliding_window=lambda: None)


def drafter_layer(**changes) -> SimpleNamespace:
    """A layer as vLLM makes it for a drafter, as far as the check looks at it."""
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=16, dtype=torch.float16)
    layer = Mock(spec=Attention)
    plain = {"impl": Foreign(), "kv_sharing_target_layer_name": None, "spec": spec}
    for name, value in {**plain, **changes}.items():
        setattr(layer, name, value)
    layer.get_kv_cache_spec = lambda config: layer.spec
    return layer


def test_a_drafter_with_full_attention_passes():
    check_drafter_layers({"draft.0": drafter_layer(), "draft.1": drafter_layer()}, None)
    check_drafter_layers({}, None)


@pytest.mark.feature("Drafters under conditions", refused=True)
@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (SimpleNamespace(), "its layer draft.1 is of class SimpleNamespace, and a drafter's"),
        (
            drafter_layer(kv_sharing_target_layer_name="layers.2"),
            "its layer draft.1 reads the KV of a layer of the model",
        ),
        (drafter_layer(impl=Ours()), "its layer draft.1 is served by HeteroCache"),
        (drafter_layer(spec=None), "its layer draft.1 has no full causal attention"),
    ],
)
def test_a_drafter_whose_kv_cannot_lie_beside_ours_is_refused(layer, words):
    with pytest.raises(ValueError, match=words) as refusal:
        check_drafter_layers({"draft.0": drafter_layer(), "draft.1": layer}, None)
    message = str(refusal.value)
    assert message.endswith("; use method 'ngram' or another drafter.") and "\n" not in message
