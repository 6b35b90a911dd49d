"""KV-cache groups that vLLM serves, beside the one of HeteroCache: of layers that slide over a
window, and of a drafter's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_heterocache import compat
from vllm_heterocache.compat.layer_kinds import mixes_sliding_layers, served_layers
from vllm_heterocache.config import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable


class OtherGroup(NamedTuple):
    """Which blocks of such a group a request has."""

    block_size: int  # tokens
    window: int | None = None  # tokens that its layers slide over; None for a drafter's
    most_blocks: int | None = None  # of a request in prefill; None without a window

    def prefill_blocks(self, num_tokens: int) -> int:
        """Most blocks of a request while T tokens are prefilled."""
        blocks = -(-num_tokens // self.block_size)
        return blocks if self.most_blocks is None else min(blocks, self.most_blocks)

    def decode_blocks(self, num_tokens: int) -> int:
        """Blocks of a request behind a prompt of T tokens; a window may begin within a block."""
        blocks = -(-num_tokens // self.block_size)
        return (
            blocks if self.window is None else min(blocks, -(-self.window // self.block_size) + 1)
        )


def other_group(manager: Any, vllm_config: Any) -> OtherGroup:
    """What a group's manager, of vLLM, keeps of a request."""
    spec, window = manager.kv_cache_spec, getattr(manager, "sliding_window", None)
    if window is None:
        return OtherGroup(manager.block_size)
    return OtherGroup(manager.block_size, window, _most_blocks(spec, vllm_config))


def expected_groups(vllm_config: Any) -> list[OtherGroup]:
    """The groups that vLLM will make of a model's sliding layers, where all layers have heads of
    one size: each has as many layers as have full attention."""
    model = vllm_config.model_config
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


def _most_blocks(spec: Any, vllm_config: Any) -> int:
    return spec.max_admission_blocks_per_request(
        vllm_config.max_in_flight_tokens, vllm_config.model_config.max_model_len
    )


def limit_cached_tokens(manager: Any, limit: Callable[[Any, int], int]) -> None:
    """Let a group's manager, of vLLM, publish as prefix cache only blocks within
    `limit(request, num_tokens)` tokens."""
    cache_blocks = manager.cache_blocks

    def cache_within_limit(request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        cache_blocks(request, limit(request, num_tokens), *args, **kwargs)

    manager.cache_blocks = cache_within_limit
