from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_heterocache.startup.layers import check_layers


class Ours:
    __module__ = "vllm_heterocache.attention.backend"


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
    with pytest.raises(ValueError, match="2 of the 3 layers of a rank have attention"):
        check(some)
