"""KV-cache groups that vLLM serves, beside the one of HeteroCache: of layers that slide over a
window, of recurrent layers, and of a drafter's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_heterocache import compat
from vllm_heterocache.compat.backend_name import BACKEND_NAME
from vllm_heterocache.compat.layer_kinds import (
    mixes_recurrent_layers,
    mixes_sliding_layers,
    num_recurrent_layers,
    served_layers,
)
from vllm_heterocache.config import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class OtherGroup(NamedTuple):
    """Which blocks of such a group a request has."""

    block_size: int  # tokens
    window: int | None = None  # tokens that its layers slide over
    most_blocks: int | None = None  # of a request in prefill; None without a window
    num_states: int | None = None  # of a request, one a block, where its layers are recurrent

    @property
    def is_of_drafter(self) -> bool:
        """Whether its layers keep the KV of all tokens."""
        return self.window is None and self.num_states is None

    def prefill_blocks(self, num_tokens: int) -> int:
        """Most blocks of a request while T tokens are prefilled."""
        if self.num_states is not None:
            return self.num_states
        blocks = -(-num_tokens // self.block_size)
        return blocks if self.most_blocks is None else min(blocks, self.most_blocks)

    def decode_blocks(self, num_tokens: int) -> int:
        """Blocks of a request behind a prompt of T tokens; a window may begin within a block."""
        if self.num_states is not None:
            return self.num_states
        blocks = -(-num_tokens // self.block_size)
        return (
            blocks if self.window is None else min(blocks, -(-self.window // self.block_size) + 1)
        )


def other_group(manager: Any, vllm_config: Any) -> OtherGroup:
    """What a group's manager, of vLLM, keeps of a request."""
    spec, window = manager.kv_cache_spec, getattr(manager, "sliding_window", None)
    if isinstance(spec, compat.MambaSpec):
        return _states(spec, vllm_config)
    if window is None:
        return OtherGroup(manager.block_size)
    return OtherGroup(manager.block_size, window, _most_blocks(spec, vllm_config))


def expected_groups(vllm_config: Any) -> list[OtherGroup]:
    """The groups that vLLM will make of a model's other layers, where all layers have heads of one
    size: each has as many layers as have full attention."""
    model = vllm_config.model_config
    if mixes_recurrent_layers(model):
        return _expected_states(vllm_config)
    if not mixes_sliding_layers(model):
        return []
    num_full = len(served_layers(model))
    num_groups = -(-model.get_total_num_hidden_layers() // num_full) - 1
    window = model.get_sliding_window()
    spec = compat.SlidingWindowSpec(
        block_size=PAGE_SIZE,
        num_kv_heads=1,
        head_size=model.get_head_size(),
        dtype=model.dtype,
        sliding_window=window,
    )
    return [OtherGroup(PAGE_SIZE, window, _most_blocks(spec, vllm_config))] * num_groups


def _expected_states(vllm_config: Any) -> list[OtherGroup]:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    num_groups = -(-num_recurrent_layers(model) // len(served_layers(model)))
    spec = compat.MambaSpec(
        block_size=cache.block_size,
        shapes=((1,),),
        dtypes=(model.dtype,),
        mamba_cache_mode=cache.mamba_cache_mode,
        num_speculative_blocks=0 if cache.use_replayssm else vllm_config.num_speculative_tokens,
    )
    return [_states(spec, vllm_config)] * num_groups


def _states(spec: Any, vllm_config: Any) -> OtherGroup:
    """One state, one more in each step that copies it where prefixes are cached, and one for each
    draft: layers go on from the state behind the last draft that is accepted."""
    num_states = spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes
    return OtherGroup(spec.block_size, num_states=num_states)


def align_block_size(vllm_config: Any) -> int:
    """Tokens of a block of this model, which vLLM's config has from then on.

    vLLM makes blocks so large that a page of keys and values has room for the state of a recurrent
    layer, and does so once the model is loaded.
    """
    cache = vllm_config.cache_config
    cache.block_size = PAGE_SIZE
    if mixes_recurrent_layers(vllm_config.model_config):
        backend = compat.AttentionBackendEnum[BACKEND_NAME].get_class()
        compat.current_platform._align_hybrid_block_size(vllm_config, backend)
    return int(cache.block_size)


def _most_blocks(spec: Any, vllm_config: Any) -> int:
    return spec.max_admission_blocks_per_request(
        vllm_config.max_in_flight_tokens, vllm_config.model_config.max_model_len
    )


def kept_state(groups: Sequence[OtherGroup], request: Any, num_hit: int) -> int:
    """Tokens of a prompt behind which recurrent layers must keep a state for a hit there; where
    vLLM says, unless there is a drafter.

    Beside a drafter hits end with a drafter's block, and vLLM drops the last one. By itself it
    keeps the states at the end of the last block of recurrent layers, which is seldom such an end.
    And it names the end of what the model's layers share with another prompt, without that drop.

    Args:
        request: vLLM's, once the prefix cache was looked up.
        num_hit: its tokens that were found there.
    """
    sizes = [group.block_size for group in groups if group.is_of_drafter]
    shared: int = request.shared_prefix_boundary
    if not sizes or all(group.num_states is None for group in groups):
        return shared
    size = sizes[0]
    if shared - size > num_hit:
        return shared - size
    return max(0, (request.num_prompt_tokens - 1) // size - 1) * size


def limit_cached_tokens(manager: Any, limit: Callable[[Any, int], int]) -> None:
    """Let a group's manager, of vLLM, publish as prefix cache only blocks within
    `limit(request, num_tokens)` tokens."""
    cache_blocks = manager.cache_blocks

    def cache_within_limit(request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        cache_blocks(request, limit(request, num_tokens), *args, **kwargs)

    manager.cache_blocks = cache_within_limit


def retain_hits(manager: Any, longest_hit: Callable[[int], int]) -> None:
    """Let a group's manager, of vLLM, also publish what hits need that end before a prompt does.

    Of layers that slide over a window vLLM publishes what a hit needs that ends with the prompt, or
    with the part of it that is known to be shared. A hit in a prompt that goes on but a little
    behind that part ends before. Layers that are recurrent have a state at the end of a block, and
    none elsewhere.

    Args:
        longest_hit: tokens of the longest hit in a prompt of so many.
    """
    if getattr(manager, "sliding_window", None) is None:
        return
    cache_blocks = manager.cache_blocks

    def cache_for_hits(request: Any, *args: Any, replay_boundaries: Any, **kwargs: Any) -> None:
        ends = map(longest_hit, (request.num_prompt_tokens, request.shared_prefix_boundary))
        cache_blocks(request, *args, replay_boundaries=(*replay_boundaries, *ends), **kwargs)

    manager.cache_blocks = cache_for_hits
