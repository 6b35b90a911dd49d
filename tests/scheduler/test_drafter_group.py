"""The KV-cache group of a drafter's own layers, beside the group that is compacted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
from kv_groups import DTYPE, MIN_TOKENS, PAGE, WINDOW, Cache, hetero_spec, planned

from vllm_heterocache.compat import FullAttentionSpec
from vllm_heterocache.compat.engine import pack_kv_cache
from vllm_heterocache.kv_cache_spec import DrafterSpec, HeteroSpec, drafter_specs


class Layers(NamedTuple):
    count: int
    num_kv_heads: int
    head_size: int

    @property
    def geometry(self) -> dict:
        return {
            "block_size": PAGE,
            "num_kv_heads": self.num_kv_heads,
            "head_size": self.head_size,
            "dtype": DTYPE,
        }


MODEL = Layers(4, 2, 64)


def model_spec(layers: Layers = MODEL) -> HeteroSpec:
    return hetero_spec(layers.num_kv_heads, layers.head_size, has_drafter=True)


def specs_of(target: Layers, drafter: Layers) -> tuple[dict, dict]:
    """By name: those of the target, and those that a drafter gets."""
    of_target = {f"model.layers.{i}": model_spec(target) for i in range(target.count)}
    stock = {f"draft.{i}": FullAttentionSpec(**drafter.geometry) for i in range(drafter.count)}
    return of_target, drafter_specs(stock, of_target)


@pytest.mark.parametrize("is_drafter_first", [False, True])
@pytest.mark.parametrize(
    ("target", "drafter", "tokens"),
    [
        pytest.param(Layers(32, 8, 128), Layers(1, 8, 128), 512, id="one-layer"),
        pytest.param(Layers(80, 8, 128), Layers(1, 8, 128), 512, id="at-most-512-tokens"),
        pytest.param(Layers(32, 8, 128), Layers(16, 8, 64), 64, id="pages-of-another-size"),
        pytest.param(Layers(32, 8, 128), Layers(5, 8, 128), 96, id="no-power-of-two"),
        pytest.param(Layers(30, 3, 64), Layers(30, 3, 64), 16, id="as-large"),
        pytest.param(Layers(30, 3, 64), Layers(20, 3, 64), 16, id="pages-of-one-size"),
        pytest.param(Layers(30, 4, 64), Layers(24, 2, 64), 32, id="blocks-of-one-page-size"),
    ],
)
def test_vllm_makes_one_group_of_a_drafters_layers_in_the_same_blocks(
    target, drafter, tokens, is_drafter_first
):
    of_target, of_drafter = specs_of(target, drafter)
    specs = {**of_drafter, **of_target} if is_drafter_first else {**of_target, **of_drafter}
    cache = planned(specs)
    groups = [list(group.layer_names) for group in cache.kv_cache_groups]
    expected = [list(of_target), list(of_drafter)]
    assert groups == (expected[::-1] if is_drafter_first else expected)
    assert {spec.block_size for spec in of_drafter.values()} == {tokens}
    block_bytes = sum(spec.page_size_bytes for spec in of_target.values())
    for tensor in cache.kv_cache_tensors:
        assert (tensor.offset, tensor.block_stride) == (0, block_bytes)
        assert tensor.layer_stride * len(tensor.layers) <= block_bytes
    packed = pack_kv_cache(cache, list(of_target)[::-1])
    layers = {tuple(tensor.layers) for tensor in packed.kv_cache_tensors}
    assert layers == {tuple(of_target)[::-1], tuple(of_drafter)}


def marked(spec: DrafterSpec) -> DrafterSpec:
    """As vLLM's runner marks a drafter's layers since 0.33; vLLM 0.32 goes by their place."""
    return replace(spec, is_draft=True) if hasattr(spec, "is_draft") else spec


def test_vllm_takes_the_group_of_the_last_layers_for_that_of_mtp():
    """And drops the last block of its hits in the prefix cache, and of no other group's."""
    of_target, of_drafter = specs_of(MODEL, Layers(1, 2, 64))
    specs = of_target | {name: marked(spec) for name, spec in of_drafter.items()}
    cache = planned(specs, "mtp")
    assert [group.is_eagle_group for group in cache.kv_cache_groups] == [False, True]


def test_a_drafter_with_more_kv_than_the_model_is_refused():
    said = "16 tokens take 81,920 bytes of KV in its layers and 65,536 in those of the model; use a"
    with pytest.raises(ValueError, match=said):
        specs_of(Layers(8, 2, 64), Layers(10, 2, 64))


def make_cache(drafter_block: int, is_drafter_first: bool, is_mtp: bool = False) -> Cache:
    """Of a model and its drafter."""
    specs = [model_spec(), DrafterSpec(**MODEL.geometry | {"block_size": drafter_block})]
    return Cache(specs[::-1] if is_drafter_first else specs, is_mtp)


@pytest.mark.parametrize("is_drafter_first", [False, True])
@pytest.mark.parametrize("drafter_block", [16, 64, 96])
def test_compaction_gives_back_the_models_blocks_and_none_of_the_drafters(
    drafter_block, is_drafter_first
):
    cache = make_cache(drafter_block, is_drafter_first)
    request = cache.request("a", 330)
    assert cache.prefill(request) == 0
    num_drafter = -(-330 // drafter_block)
    assert cache.used == 21 + 5 + num_drafter  # 20 full pages, of which a quarter stays
    before = cache.table(cache.others[0], request)
    cache.compact(request)
    for _ in range(10):
        cache.decode(request)
    model, drafter = (cache.table(manager, request) for manager in (cache.manager, *cache.others))
    assert model[:20] == [0] * 20 and all(model[20:])
    assert drafter[: len(before)] == before and all(drafter)
    assert cache.used == 5 + len(model) - 20 + len(drafter)
    cache.kv.free(request)
    cache.check()
    assert cache.used == 0


def hits_of_prompts(cache: Cache, drafter_block: int) -> Iterator[tuple[int, int, int]]:
    """Tokens of prompts that begin as a cached one does, of their hits, and of a hit at most."""
    first = cache.request("first", 600)
    cache.prefill(first)
    cache.kv.free(first)
    for num_tokens in range(200, 600, 7):
        again = cache.request(f"again{num_tokens}", num_tokens)
        hit = cache.kv.get_computed_blocks(again)[1]
        most = num_tokens - (WINDOW if num_tokens >= MIN_TOKENS else 1)
        assert hit % drafter_block == 0 and hit <= most
        yield num_tokens, hit, most


@pytest.mark.parametrize("is_drafter_first", [False, True])
@pytest.mark.parametrize("drafter_block", [16, 64, 96])
def test_the_prefix_cache_leaves_what_the_policy_observes(drafter_block, is_drafter_first):
    """The hit is the longest one of whole drafter blocks, but for 15 tokens at most that the
    hashes do not tell."""
    cache = make_cache(drafter_block, is_drafter_first)
    for num_tokens, hit, most in hits_of_prompts(cache, drafter_block):
        is_compacted = num_tokens >= MIN_TOKENS
        sure = most - (PAGE - 1) if is_compacted else num_tokens - WINDOW - (PAGE - 1)
        assert hit >= sure // drafter_block * drafter_block
        longest = most // drafter_block * drafter_block
        if num_tokens < MIN_TOKENS - PAGE:
            assert hit == longest, "a prompt that stays dense is served as in stock vLLM"


@pytest.mark.parametrize("drafter_block", [16, 64, 96])
def test_hits_with_mtp_are_a_drafters_block_shorter(drafter_block):
    """The last tokens of a hit were prefilled with what came behind them, so vLLM drops them."""
    cache = make_cache(drafter_block, is_drafter_first=False, is_mtp=True)
    for num_tokens, hit, most in hits_of_prompts(cache, drafter_block):
        assert hit <= num_tokens // drafter_block * drafter_block - drafter_block
        sure = most - WINDOW - (PAGE - 1)
        assert hit >= sure // drafter_block * drafter_block - drafter_block
