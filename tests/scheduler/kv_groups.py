"""KV-cache groups as vLLM plans them, and its KVCacheManager over several groups."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_heterocache.compat import MambaSpec
from vllm_heterocache.compat.engine import kv_cache_managers, pack_kv_cache
from vllm_heterocache.compat.other_groups import (
    OtherGroup,
    kept_state,
    limit_cached_tokens,
    retain_hits,
)
from vllm_heterocache.kv_cache_spec import HeteroSpec
from vllm_heterocache.scheduler.kv_cache_manager import HeteroManager

PAGE, DTYPE = 16, torch.bfloat16
NUM_BLOCKS = 200
MIN_TOKENS, WINDOW = 300, 40


def hetero_spec(num_kv_heads: int, head_size: int, **changes: Any) -> HeteroSpec:
    """Prompts of MIN_TOKENS keep a quarter; the last WINDOW tokens are observed."""
    options = {
        "block_size": PAGE,
        "gpu_budget": 0.25,
        "compact_min_tokens": MIN_TOKENS,
        "recomputed_tokens": WINDOW,
    }
    return HeteroSpec(
        num_kv_heads=num_kv_heads, head_size=head_size, dtype=DTYPE, **(options | changes)
    )


def planned(specs: dict, method: str = "draft_model") -> Any:
    """The KV cache that vLLM plans for layers with these specs, and for drafts by this method."""
    from vllm.v1.engine import core
    from vllm.v1.kv_cache_layout import KVCacheLayout

    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        speculative_config=SimpleNamespace(
            method=method,
            use_eagle=lambda: method != "draft_model",
            use_eagle_block_drop=lambda: method != "draft_model",
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
        model_config=SimpleNamespace(
            max_model_len=8192, original_max_model_len=8192, supports_kv_cache_grouping=False
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            tensor_parallel_size=1,
        ),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: KVCacheLayout.BLHNC,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
            mamba_cache_mode="align",
        ),
        max_in_flight_tokens=4096,
        num_prefill_lookahead_tokens=0,
    )
    make_groups = getattr(core, "get_global_kv_cache_groups", None)  # by itself since 0.33
    groups = [] if make_groups is None else [make_groups(config, [specs])]
    (cache,) = core.get_kv_cache_configs(config, [specs], [8 << 30], *groups)
    return cache


def check_groups(full: dict[str, Any], others: dict[str, Any], num_others: int) -> None:
    """vLLM makes one group of the layers with full attention (specs by name), whose KV fills a
    block, and so many of the others."""
    cache = planned({**others, **full})
    groups = [list(group.layer_names) for group in cache.kv_cache_groups]
    assert list(full) in groups and len(groups) == 1 + num_others
    block_bytes = sum(spec.page_size_bytes for spec in full.values())
    for tensor in cache.kv_cache_tensors:
        assert (tensor.offset, tensor.block_stride) == (0, block_bytes)
        assert tensor.layer_stride * len(tensor.layers) <= block_bytes
    packed = pack_kv_cache(cache, list(full)[::-1])
    assert tuple(full)[::-1] in {tuple(tensor.layers) for tensor in packed.kv_cache_tensors}


def check_refused(full: dict[str, Any], others: dict[str, Any], words: str) -> None:
    """The groups that vLLM makes of these layers are refused in one sentence."""
    with pytest.raises(ValueError, match=words) as refusal:
        pack_kv_cache(planned({**others, **full}), list(full))
    message = str(refusal.value)
    assert message.startswith("--attention-backend heterocache does not support this model: ")
    assert message.endswith("; serve it with another attention backend.") and "\n" not in message


class Cache:
    """vLLM's KVCacheManager of some groups, as the connector binds it; the test plays the
    workers."""

    def __init__(
        self, specs: list[Any], is_mtp: bool = False, retention_interval: int | None = None
    ):
        """
        Args:
            specs: of the groups, one of them a HeteroSpec; the last may be of MTP's layers.
            retention_interval: tokens between what windows keep for hits, vLLM's default is 0: at
                the end of a prompt alone; None: everywhere.
        """
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

        init_none_hash(sha256)
        self.hash_size = math.gcd(*(spec.block_size for spec in specs))
        self._hasher = get_request_block_hasher(self.hash_size, sha256)
        groups = [KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs)]
        if is_mtp:
            groups[-1] = KVCacheGroupSpec(["mtp"], specs[-1], is_eagle_group=True)
        self.kv = KVCacheManager(
            KVCacheConfig(
                NUM_BLOCKS, [], groups, prefix_cache_retention_interval=retention_interval
            ),
            max_model_len=4096,
            scheduler_block_size=math.lcm(*(spec.block_size for spec in specs)),
            hash_block_size=self.hash_size,
            use_eagle=is_mtp,
            max_in_flight_tokens=4096,
        )
        self.manager, self.others = kv_cache_managers(self.kv, HeteroManager)
        for other in self.others:
            limit_cached_tokens(other, self.manager.cacheable_tokens)
            retain_hits(other, self.manager.longest_hit)

    def kept_state(self, request, num_hit: int = 0) -> int:
        groups = [
            OtherGroup(
                one.block_size, num_states=1 if isinstance(one.kv_cache_spec, MambaSpec) else None
            )
            for one in self.others
        ]
        return kept_state(groups, request, num_hit)

    @property
    def used(self) -> int:
        return NUM_BLOCKS - 1 - self.kv.block_pool.get_num_free_blocks()

    def request(self, name: str, num_tokens: int, behind: list[int] | None = None) -> Any:
        """A new request, whose prompt begins as all others do, with `behind` at its end."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=100)
        prompt = [*range(num_tokens), *(behind or [])]
        return Request(name, prompt, params, None, block_hasher=self._hasher)

    def prefill(self, request, first_end: int | None = None) -> int:
        """The whole prompt behind what the prefix cache holds; how many tokens that is.

        Args:
            first_end: where the first of two chunks ends, if that lies behind the hit.
        """
        self.kv.new_step_starts()
        found = self.kv.get_computed_blocks(request)
        computed, num_hit, request.shared_prefix_boundary = found
        request.shared_prefix_boundary = self.kept_state(request, num_hit)
        end = request.num_tokens if first_end is None or first_end <= num_hit else first_end
        assert self.kv.allocate_slots(
            request, end - num_hit, num_hit, computed, full_sequence_must_fit=True
        )
        request.num_computed_tokens = end
        self.check()
        if end < request.num_tokens:
            assert self.kv.allocate_slots(request, request.num_tokens - end)
            request.num_computed_tokens = request.num_tokens
            self.check()
        return num_hit

    def compact(self, request) -> None:
        """The workers answer the request's order."""
        (order,) = self.manager.ledger.take_orders()
        assert order.request_id == request.request_id
        self.manager.ledger.record({order.ticket: 1}, {})

    def decode(self, request, token: int = 7) -> None:
        request.append_output_token_ids(token)
        assert self.kv.allocate_slots(request, 1, num_lookahead_tokens=3)
        request.num_computed_tokens += 1
        self.check()

    def check(self) -> None:
        self.manager.check_integrity(*self.others)

    def table(self, manager, request) -> list[int]:
        """Block ids of a request; 0 where a block was given back."""
        return [block.block_id for block in manager.req_to_blocks[request.request_id]]
