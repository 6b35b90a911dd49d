"""The KV-cache groups of recurrent layers, beside the group that is compacted: a block has room for
the state of a layer, and so for several pages."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from kv_groups import (
    DTYPE,
    MIN_TOKENS,
    PAGE,
    WINDOW,
    Cache,
    check_groups,
    check_refused,
    hetero_spec,
    planned,
)

from vllm_heterocache.attention.backend import HeteroCacheBackend
from vllm_heterocache.compat import FullAttentionSpec, MambaSpec
from vllm_heterocache.compat.engine import pack_kv_cache, packed_pool
from vllm_heterocache.compat.other_groups import expected_groups, other_group
from vllm_heterocache.kv_cache_spec import DrafterSpec, drafter_specs

BLOCK = 3 * PAGE  # tokens
NUM_DRAFTS = 4


class Model(NamedTuple):
    full: int  # layers
    recurrent: int
    num_kv_heads: int
    head_size: int
    state_bytes: int

    @property
    def page_bytes(self) -> int:
        """Of PAGE tokens in a layer, in 16 bits."""
        return PAGE * self.num_kv_heads * 2 * self.head_size * 2

    @property
    def block_size(self) -> int:
        """As vLLM aligns it: a page of keys and values holds a state."""
        return PAGE * math.ceil(self.state_bytes / self.page_bytes)


def state_spec(state_bytes: int, block_size: int, page_bytes: int, **changes: Any) -> MambaSpec:
    return MambaSpec(
        block_size=block_size,
        shapes=((state_bytes,),),
        dtypes=(torch.int8,),
        page_size_padded=page_bytes,
        mamba_cache_mode="align",
        **changes,
    )


def specs_of(model: Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """By name: those of layers with full attention, and of recurrent ones."""
    of_full = hetero_spec(model.num_kv_heads, model.head_size, block_size=model.block_size)
    of_state = state_spec(model.state_bytes, model.block_size, of_full.page_size_bytes)
    full = {f"full.{i}": of_full for i in range(model.full)}
    return full, {f"state.{i}": of_state for i in range(model.recurrent)}


@pytest.mark.parametrize(
    ("model", "num_groups", "block_size"),
    [
        pytest.param(Model(12, 36, 2, 256, 1_073_152), 3, 528, id="qwen3-next"),
        pytest.param(Model(16, 48, 4, 256, 3_207_168), 3, 784, id="qwen3.5-27b"),
        pytest.param(Model(4, 27, 8, 128, 2_719_744), 7, 672, id="nemotron-nano-9b-v2"),
        pytest.param(Model(4, 36, 8, 128, 2_156_544), 9, 528, id="granite-4-h-small"),
        pytest.param(Model(6, 10, 8, 64, 8_192), 2, 16, id="lfm2-1.2b"),
    ],
)
def test_vllm_makes_one_group_of_the_full_layers_that_fills_a_block(model, num_groups, block_size):
    full, recurrent = specs_of(model)
    assert model.block_size == block_size
    check_groups(full, recurrent, num_groups)


@pytest.mark.parametrize(
    ("model", "drafter_block", "share"),
    [
        pytest.param(Model(12, 36, 2, 256, 1_073_152), 8 * 528, 1 / 8, id="qwen3-next"),
        pytest.param(Model(16, 48, 4, 256, 3_207_168), 8 * 784, 1 / 8, id="qwen3.5-27b"),
        pytest.param(Model(4, 12, 2, 256, 1_073_152), 4 * 528, 1 / 4, id="few-full-layers"),
    ],
)
def test_an_mtp_layer_takes_a_share_of_the_blocks_of_dense_kv(model, drafter_block, share):
    """And vLLM's other groups are what they are without it."""
    full, recurrent = specs_of(model)
    (of_full,) = set(full.values())
    stock = FullAttentionSpec(
        block_size=model.block_size,
        num_kv_heads=model.num_kv_heads,
        head_size=model.head_size,
        dtype=DTYPE,
    )
    mtp = drafter_specs({"mtp": stock}, full)
    assert mtp["mtp"].block_size == drafter_block
    check_groups(full, recurrent | mtp, 3 + 1)
    num_tokens = 16 * drafter_block
    blocks = {spec: -(-num_tokens // spec.block_size) for spec in (of_full, mtp["mtp"])}
    assert blocks[mtp["mtp"]] == share * blocks[of_full]


def test_vllm_divides_no_block_and_states_fit_into_whole_ones():
    """As its runner allocates the cache: a block is one row of all views, and as many kernel blocks
    of the worker are in the same bytes."""
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.utils import allocate_kv_cache, prepare_kernel_block_sizes

    num_blocks, (full, recurrent) = 5, specs_of(Model(2, 4, 2, 64, 20_000))
    cache = planned({**recurrent, **full})
    tensors = [
        dataclasses.replace(tensor, size=tensor.block_stride * num_blocks)
        for tensor in cache.kv_cache_tensors
    ]
    cache = dataclasses.replace(cache, num_blocks=num_blocks, kv_cache_tensors=tensors)
    cache = pack_kv_cache(cache, list(full))
    specs = [group.kv_cache_spec for group in cache.kv_cache_groups]
    groups = [[SimpleNamespace(backend=HeteroCacheBackend, kv_cache_spec=spec)] for spec in specs]
    sizes = prepare_kernel_block_sizes(cache, groups)
    assert sizes == [spec.block_size for spec in specs] == [BLOCK] * 3
    views = allocate_kv_cache(cache, torch.device("cpu"), KVCacheLayout.BLHNC, sizes)
    pages = packed_pool(views["full.1"])
    assert pages.shape == (3 * num_blocks * 2 * 2, PAGE, 2 * 64)
    kernel_blocks = pages.view(torch.int8).view(3 * num_blocks, -1)
    for names in (recurrent, full):
        for name in names:
            views[name][3] = 1  # a state, or KV of a layer; vLLM zeroes new blocks so
        is_written = kernel_blocks.ne(0).any(1)
        assert is_written.nonzero().flatten().tolist() == [9, 10, 11]
        kernel_blocks.zero_()


@pytest.mark.feature("Few recurrent layers among full ones", refused=True)
def test_as_many_layers_of_both_kinds_nearly_are_refused_in_one_sentence():
    full, recurrent = specs_of(Model(4, 5, 8, 64, 8_192))
    check_refused(full, recurrent, r"blocks of 163,840 bytes")


def cache_with(num_drafts: int, is_full_first: bool = False) -> Cache:
    """Of one group with full attention and two that are recurrent."""
    full = hetero_spec(2, 64, block_size=BLOCK)
    of_state = state_spec(1000, BLOCK, full.page_size_bytes, num_speculative_blocks=num_drafts)
    return Cache([full, of_state, of_state] if is_full_first else [of_state, of_state, full])


@pytest.fixture(params=[False, True], ids=["full-last", "full-first"])
def cache(request) -> Cache:
    return cache_with(0, is_full_first=request.param)


def prefill(cache: Cache, request: Any) -> int:
    """As vLLM's scheduler does: a chunk ends where the state is cached, at a block's end."""
    return cache.prefill(request, request.num_tokens // BLOCK * BLOCK)


def test_compaction_gives_back_full_blocks_and_leaves_states_alone(cache):
    request = cache.request("a", 330)
    assert prefill(cache, request) == 0
    compact = len(cache.manager.compact_blocks)
    assert compact == 2  # for 5 of 20 full pages
    states = [sum(map(bool, cache.table(other, request))) for other in cache.others]
    assert states == [2, 2] and cache.used == 7 + compact + 4
    (order,) = cache.manager.ledger.take_orders()
    blocks = [block.block_id for block in cache.manager.compact_blocks]
    assert order.block_ids == [3 * block + i for block in blocks for i in range(3)]
    cache.manager.ledger.record({order.ticket: 1}, {})
    for step in range(60):
        cache.decode(request)
        if step == 0:
            continue  # blocks are given back with the next allocation
        table = cache.table(cache.manager, request)
        assert table[:6] == [0] * 6 and all(table[6:])
        states = [sum(map(bool, cache.table(other, request))) for other in cache.others]
        assert all(1 <= held <= 2 for held in states)
        assert cache.used == compact + len(table) - 6 + sum(states)
    cache.kv.free(request)
    cache.check()
    assert cache.used == 0


def test_the_prefix_cache_ends_where_a_state_was_kept(cache):
    """At the last block's end of an earlier prompt, if the policy's queries lie behind it."""
    for num_tokens in range(200, 600, 31):
        first, again = (cache.request(f"{name}{num_tokens}", num_tokens) for name in "ab")
        cache.kv.reset_prefix_cache()
        prefill(cache, first)
        cache.kv.free(first)
        kept = num_tokens // BLOCK * BLOCK
        left = WINDOW if num_tokens >= MIN_TOKENS else 1
        expected = kept if kept <= num_tokens - left else 0
        assert prefill(cache, again) == expected
        cache.kv.free(again)
        cache.check()
        assert cache.used == 0


@pytest.mark.parametrize("prompt", [MIN_TOKENS - 60, MIN_TOKENS], ids=["dense", "compacted"])
def test_no_group_publishes_what_a_compacted_prompt_generates(cache, prompt):
    first = cache.request("first", prompt)
    prefill(cache, first)
    if prompt == MIN_TOKENS:
        cache.compact(first)
    generated = list(range(7000, 7000 + 2 * BLOCK - 5))
    for token in generated:
        cache.decode(first, token)
    is_compacted = prompt == MIN_TOKENS
    # the last token that was generated is computed in the next step
    expected = (prompt if is_compacted else prompt + len(generated) - 1) // BLOCK
    managers = (cache.manager, *cache.others)
    assert [one.num_cached_block[first.request_id] for one in managers] == [expected] * 3
    again = cache.request("again", prompt, generated)
    assert cache.kv.get_computed_blocks(again)[1] <= expected * BLOCK


def chunk_end(cache: Cache, request: Any, num_hit: int) -> int:
    """Where vLLM's scheduler ends the first chunk of a prompt that has room for all of it."""
    from vllm.v1.core.sched.scheduler import Scheduler

    scheduler = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=BLOCK),
        hash_block_size=cache.hash_size,
        block_size=cache.others[-1].block_size,
        mamba_partial_cache_hit=False,
        mamba_has_prefill_checkpoint_blocks=False,
        mamba_shared_prefix_checkpoint=False,
        mamba_prefill_checkpoint_alignment=None,
        use_eagle_block_drop=True,
        num_hash_lookahead_tokens=0,  # of 0.33: a KV connector keeps it at 0
        max_num_scheduled_tokens=4096,
        scheduler_config=SimpleNamespace(long_prefill_token_threshold=0),
    )
    split = Scheduler._mamba_block_aligned_split
    return num_hit + split(scheduler, request, request.num_tokens - num_hit, num_hit)


def cache_with_mtp(size: int, retention_interval: int | None) -> Cache:
    """Of blocks of an MTP layer that hold so many tokens."""
    full = hetero_spec(2, 64, block_size=BLOCK, has_drafter=True)
    of_state = state_spec(1000, BLOCK, full.page_size_bytes, num_speculative_blocks=NUM_DRAFTS)
    mtp = DrafterSpec(block_size=size, num_kv_heads=2, head_size=64, dtype=DTYPE)
    return Cache([full, of_state, of_state, mtp], True, retention_interval)


@pytest.mark.parametrize("retention_interval", [None, 0])
@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_hits_with_mtp_end_with_a_drafters_block_and_one_before_the_last(
    num_blocks, retention_interval
):
    """A prompt that comes again finds the states that vLLM was told to keep of the first one."""
    size = num_blocks * BLOCK
    for num_tokens in range(350, 800, 37):
        cache = cache_with_mtp(size, retention_interval)
        first, again = (cache.request(name, num_tokens) for name in "ab")
        first.shared_prefix_boundary = cache.kept_state(first)
        end = chunk_end(cache, first, 0)
        expected = ((num_tokens - 1) // size - 1) * size
        assert end == (expected or end) and end % BLOCK == 0
        assert cache.prefill(first, end) == 0
        cache.kv.free(first)
        assert cache.prefill(again) == expected
        cache.kv.free(again)
        assert cache.used == 0


@pytest.mark.parametrize("retention_interval", [None, 0])
@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_with_mtp_the_third_prompt_with_a_beginning_finds_it(num_blocks, retention_interval):
    """The second one keeps the states where what it shares with the first one ends, less the
    drafter's block that vLLM drops."""
    size = num_blocks * BLOCK
    cache = cache_with_mtp(size, retention_interval)
    first, second, third = (
        cache.request(name, 3 * size + 5, [1000 * i] * (2 * size + 9))
        for i, name in enumerate("abc", 1)
    )
    assert cache.prefill(first, 4 * size) == 0
    assert cache.prefill(second, 2 * size) == 0
    assert second.shared_prefix_boundary == 2 * size
    second.num_computed_tokens = 0
    assert chunk_end(cache, second, 0) == 2 * size
    assert cache.prefill(third, 4 * size) == 2 * size
    assert third.shared_prefix_boundary == 4 * size, "nothing more is shared"


def config_of(mode: str, num_drafts: int) -> Any:
    """A model of a layer with full attention for every two that are recurrent."""
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    model = SimpleNamespace(
        hf_text_config=SimpleNamespace(layer_types=kinds * 2),
        get_sliding_window=lambda: None,
        get_total_num_hidden_layers=lambda: 6,
        dtype=DTYPE,
    )
    cache = SimpleNamespace(block_size=BLOCK, mamba_cache_mode=mode, use_replayssm=False)
    return SimpleNamespace(
        cache_config=cache, model_config=model, num_speculative_tokens=num_drafts
    )


@pytest.mark.parametrize("num_drafts", [0, 4])
@pytest.mark.parametrize(("mode", "num_states"), [("align", 2), ("none", 1)])
def test_what_a_group_keeps_of_a_request_is_known_before(mode, num_states, num_drafts):
    cache = cache_with(num_drafts)
    config, num_states = config_of(mode, num_drafts), num_states + num_drafts
    found = [other_group(other, config) for other in cache.others]
    assert found == expected_groups(config), "from the model's config alone"
    for group in found:
        assert (group.block_size, group.num_states) == (BLOCK, num_states)
        assert not group.is_of_drafter and group.window is None
        assert group.prefill_blocks(9000) == group.decode_blocks(9000) == num_states


def verify(cache: Cache, request: Any, num_accepted: int) -> None:
    """A step of a token and its drafts, as vLLM's scheduler has it."""
    request.append_output_token_ids(7)
    assert cache.kv.allocate_slots(request, 1 + NUM_DRAFTS)
    request.append_output_token_ids([7] * num_accepted)
    request.num_computed_tokens += 1 + num_accepted
    cache.check()


def test_vllm_keeps_as_many_states_as_are_counted_with_drafts():
    """One for each draft and one more; another while a step copies the last one. Compaction leaves
    them alone."""
    cache, held = cache_with(NUM_DRAFTS), set()
    (most,) = {other_group(one, config_of("align", NUM_DRAFTS)).num_states for one in cache.others}
    request = cache.request("a", 330)
    prefill(cache, request)
    compact = len(cache.manager.compact_blocks)
    cache.compact(request)
    for step in range(120):
        verify(cache, request, num_accepted=step % (NUM_DRAFTS + 1))
        table = cache.table(cache.manager, request)
        assert table[:6] == [0] * 6 and all(table[6:])
        states = [sum(map(bool, cache.table(other, request))) for other in cache.others]
        held |= set(states)
        assert cache.used == compact + len(table) - 6 + sum(states)
    assert held == {most - 1, most}
    cache.kv.free(request)
    cache.check()
    assert cache.used == 0


@pytest.mark.parametrize("num_lacking", [0, 1])
def test_a_prompt_needs_free_blocks_for_its_states_and_its_compaction(num_lacking):
    cache = cache_with(NUM_DRAFTS)
    pool, request = cache.kv.block_pool, cache.request("a", 330)
    cache.kv.new_step_starts()
    compact = cache.manager.kv_cache_spec.num_compact_blocks(330)
    assert compact == 2
    needed = 7 + compact + len(cache.others) * (1 + NUM_DRAFTS)
    pool.get_new_blocks(pool.get_num_free_blocks() - needed + num_lacking)
    allocated = cache.kv.allocate_slots(request, 330, full_sequence_must_fit=True)
    assert (allocated is None) == bool(num_lacking)
    assert pool.get_num_free_blocks() == (needed - 1 if num_lacking else 0)
