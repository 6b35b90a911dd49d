"""HeteroManager inside vLLM's own KVCacheManager. No model: the test plays the workers.

test_scheduling.py puts the same under vLLM's scheduler.
"""

import math
import random
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from vllm_heterocache import compat
from vllm_heterocache.compat import FullAttentionSpec, KVCacheSpecRegistry
from vllm_heterocache.compat.engine import watch_dead_blocks
from vllm_heterocache.kv_cache_spec import HeteroSpec
from vllm_heterocache.messages import PrefillStart
from vllm_heterocache.scheduler.kv_cache_manager import HeteroManager
from vllm_heterocache.scheduler.prompt import PromptState

PAGE = 16
BUDGET = 0.3
MIN_TOKENS = 70
GEOMETRY = {"block_size": PAGE, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32}
BUDGETS = [0.05, 0.07, 0.1, 0.3, 0.55, 0.7, 0.9, 1.0]


def hetero_spec(
    gpu_budget=BUDGET, compact_min_tokens=MIN_TOKENS, frees_prompt=True, **changes
) -> HeteroSpec:
    return HeteroSpec(
        **{**GEOMETRY, **changes},
        gpu_budget=gpu_budget,
        compact_min_tokens=compact_min_tokens,
        frees_prompt=frees_prompt,
    )


def exact_compact_blocks(num_tokens: int, gpu_budget: float) -> int:
    """N_c in rational arithmetic, from the decimal that the user wrote."""
    if num_tokens < MIN_TOKENS:
        return 0
    return math.ceil(Fraction(str(gpu_budget)) * (num_tokens // PAGE))


class Pool:
    """A KVCacheManager, and the calls that vLLM's scheduler makes on it."""

    def __init__(self, num_blocks=100, world_size=1, caching=True, spec=None):
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(PAGE, sha256)
        group = KVCacheGroupSpec(["layer"], spec or hetero_spec())
        self.kv = KVCacheManager(
            KVCacheConfig(num_blocks, [], [group]),
            max_model_len=4096,
            scheduler_block_size=PAGE,
            hash_block_size=PAGE,
            enable_caching=caching,
        )
        self.blocks = self.kv.block_pool
        (self.manager,) = self.kv.coordinator.single_type_managers
        if isinstance(self.manager, HeteroManager):
            self.ledger = self.manager.ledger
            self.ledger.world_size = world_size

    @property
    def free(self) -> int:
        return self.blocks.get_num_free_blocks()

    def request(self, name: str, prompt):
        """A new request; `prompt` is its tokens, or how many tokens of its own it has."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        if isinstance(prompt, int):
            prompt = random.Random(name).choices(range(10**6), k=prompt)
        params = SamplingParams(max_tokens=1000)
        return Request(name, prompt, params, None, block_hasher=self._hasher)

    def admit(self, request, chunk: int | None = None) -> bool:
        """The first chunk of a prefill behind what the prefix cache holds; False: no room."""
        computed, num_hit, _ = self.kv.get_computed_blocks(request)
        num_new = min(chunk or request.num_tokens, request.num_tokens - num_hit)
        allocated = self.kv.allocate_slots(
            request, num_new, num_hit, computed, full_sequence_must_fit=True
        )
        if allocated is None:
            return False
        request.num_computed_tokens = num_hit + num_new
        self._check()
        return True

    def advance(self, request, chunk: int | None = None) -> bool:
        """The next chunk, or the next decode step; False: no room."""
        num_new = min(chunk or request.num_tokens, request.num_tokens - request.num_computed_tokens)
        if self.kv.allocate_slots(request, num_new) is None:
            return False
        request.num_computed_tokens += num_new
        self._check()
        return True

    def prefill(self, request, chunk: int | None = None):
        assert self.admit(request, chunk)
        while request.num_computed_tokens < request.num_tokens:
            assert self.advance(request, chunk)

    def decode(self, request, num_tokens=1):
        for index in range(num_tokens):
            request.append_output_token_ids(1000 + index)
            assert self.advance(request)

    def take_order(self):
        (order,) = self.ledger.take_orders()
        return order

    def answer(self, order, done=1, refused=0):
        self.ledger.record({order.ticket: done}, {order.ticket: refused} if refused else {})

    def compact(self, request):
        """Prefill, have the workers answer, and decode one token: the dense blocks are back."""
        self.prefill(request)
        order = self.take_order()
        self.answer(order, done=self.ledger.world_size)
        self.decode(request)
        return order

    def end(self, request):
        self.kv.free(request)
        request.num_computed_tokens = 0
        self._check()

    def table(self, request) -> list[int]:
        return self.kv.get_block_ids(request.request_id)[0]

    def _check(self):
        if isinstance(self.manager, HeteroManager):
            self.manager.check_integrity()


@pytest.mark.parametrize("gpu_budget", BUDGETS)
def test_number_of_compact_blocks_is_the_budget_rounded_up(gpu_budget):
    spec = hetero_spec(gpu_budget)
    for num_tokens in [*range(1, 400), 4095, 4096, 100_000, 131_071]:
        assert spec.num_compact_blocks(num_tokens) == exact_compact_blocks(num_tokens, gpu_budget)


def test_longest_request_needs_its_dense_blocks_and_its_compact_ones():
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=333),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    spec = hetero_spec()
    # 333 tokens: 21 blocks, 20 of them full; ceil(.3 * 20) = 6
    assert spec.max_memory_usage_bytes(config) == (21 + 6) * spec.page_size_bytes
    config.model_config.max_model_len = MIN_TOKENS - 1
    assert spec.max_memory_usage_bytes(config) == 5 * spec.page_size_bytes


def test_pool_of_the_promised_size_serves_the_longest_request():
    """What vLLM checks at start-up is enough in fact, with nothing to spare."""
    for num_tokens in (333, 336, MIN_TOKENS, MIN_TOKENS - 1):
        needed = -(-num_tokens // PAGE) + exact_compact_blocks(num_tokens, BUDGET)
        for num_blocks, fits in ((needed, True), (needed - 1, False)):
            pool = Pool(num_blocks + 1)  # one is the null block
            assert pool.admit(pool.request("longest", num_tokens)) is fits


def test_specs_of_a_group_are_merged_as_they_are_and_must_agree():
    spec = hetero_spec(0.4, 123)
    assert HeteroSpec.merge([spec, hetero_spec(0.4, 123)]) == spec
    assert spec.gpu_budget == 0.4 and spec.compact_min_tokens == 123
    with pytest.raises(AssertionError):
        HeteroSpec.merge([spec, hetero_spec(0.4, 124)])


def test_only_our_spec_gets_our_manager():
    assert KVCacheSpecRegistry.get_manager_class(hetero_spec()) is HeteroManager
    stock = FullAttentionSpec(**GEOMETRY)
    assert KVCacheSpecRegistry.get_manager_class(stock) is compat.FullAttentionManager
    # a group of its own: a draft model's stock layers are not merged into ours
    assert KVCacheSpecRegistry.get_uniform_type_base_spec(hetero_spec()) is HeteroSpec
    assert KVCacheSpecRegistry.get_uniform_type_base_spec(stock) is FullAttentionSpec


@pytest.mark.parametrize("chunk", [None, 16, 33, 64, 199, 200])
def test_blocks_are_ordered_with_the_chunk_that_completes_the_prompt(chunk):
    pool = Pool()
    request = pool.request("a", 200)
    start = pool.free
    assert pool.admit(request, chunk)
    while request.num_computed_tokens < 200:
        assert pool.ledger.take_orders() == []
        assert start - pool.free == -(-request.num_computed_tokens // PAGE)
        assert pool.advance(request, chunk)
    order = pool.take_order()
    assert (order.request_id, order.num_tokens) == ("a", 200)
    assert len(order.block_ids) == 4  # ceil(.3 * 12)
    assert start - pool.free == 13 + 4
    assert not set(order.block_ids) & {0, *pool.table(request)}
    blocks = [pool.blocks.blocks[i] for i in order.block_ids]
    assert all(block.block_hash is None and block.ref_cnt == 1 for block in blocks)
    pool.decode(request, 40)
    assert pool.ledger.take_orders() == [], "ordered once"


@pytest.mark.parametrize("gpu_budget", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("num_tokens", [70, 79, 80, 81, 95, 96, 111, 208, 335])
@pytest.mark.parametrize("caching", [True, False])
def test_dense_blocks_come_back_after_the_answer_and_not_before(gpu_budget, num_tokens, caching):
    pool = Pool(spec=hetero_spec(gpu_budget), caching=caching)
    request = pool.request("a", num_tokens)
    start = pool.free
    pool.prefill(request)
    order = pool.take_order()
    table = pool.table(request)
    kept = exact_compact_blocks(num_tokens, gpu_budget)
    assert start - pool.free == -(-num_tokens // PAGE) + kept

    pool.decode(request, 3)  # the workers are not ready yet
    assert start - pool.free == -(-(num_tokens + 3) // PAGE) + kept
    assert pool.table(request)[: len(table)] == table

    pool.answer(order)
    pool.decode(request)
    num_full = num_tokens // PAGE
    assert start - pool.free == kept + -(-(num_tokens + 4) // PAGE) - num_full
    after = pool.table(request)
    assert after[:num_full] == [0] * num_full, "null blocks"
    assert after[num_full : len(table)] == table[num_full:], "the partial last block stays"
    pool.decode(request, 50)
    assert start - pool.free == kept + -(-(num_tokens + 54) // PAGE) - num_full
    pool.end(request)
    assert pool.free == start


def test_dense_blocks_stay_until_every_rank_has_answered():
    pool = Pool(world_size=3)
    request = pool.request("a", 200)
    pool.prefill(request)
    order = pool.take_order()
    before = pool.free
    for _ in range(2):
        pool.answer(order)
        pool.decode(request)
        assert pool.free == before
    pool.answer(order)
    pool.decode(request)
    assert pool.free == before + 12


def test_dense_blocks_stay_while_the_step_that_computes_them_is_in_flight():
    """As under asynchronous scheduling, if an answer came early."""
    pool = Pool()
    request = pool.request("a", 200)
    pool.prefill(request)
    pool.answer(pool.take_order())
    before = pool.free
    request.num_in_flight_tokens = 8
    pool.decode(request)
    assert pool.free == before
    request.num_in_flight_tokens = 0
    pool.decode(request)
    assert pool.free == before + 12


def test_refused_compaction_gives_its_blocks_back_and_is_not_tried_again():
    pool = Pool(world_size=2)
    request = pool.request("a", 200)
    start = pool.free
    pool.prefill(request)
    order = pool.take_order()
    pool.answer(order, done=0, refused=1)
    pool.decode(request)
    assert start - pool.free == 13 + 4, "one rank may still compact"
    pool.answer(order, done=0, refused=1)
    pool.decode(request)
    assert start - pool.free == 13
    assert 0 not in pool.table(request)
    assert pool.manager.compact_blocks == [] and pool.ledger.tickets == []
    pool.decode(request, 20)
    assert pool.ledger.take_orders() == []
    pool.end(request)
    assert pool.free == start


def test_both_sets_of_blocks_stay_where_only_some_ranks_refuse():
    pool = Pool(world_size=2)
    request = pool.request("a", 200)
    start = pool.free
    pool.prefill(request)
    pool.answer(pool.take_order(), done=1, refused=1)
    pool.decode(request, 30)  # 230 tokens
    assert start - pool.free == 15 + 4
    assert 0 not in pool.table(request)
    pool.end(request)
    assert pool.free == start


def test_released_prompt_blocks_are_a_prefix_cache_for_the_next_request():
    pool = Pool()
    first = pool.request("a", 200)
    pool.prefill(first)
    dense = pool.table(first)
    order = pool.take_order()
    pool.answer(order)
    pool.decode(first)
    prompt = list(first.prompt_token_ids)
    second = pool.request("b", prompt[:150] + [7] * 50)
    computed, num_hit, _ = pool.kv.get_computed_blocks(second)
    assert num_hit == 144  # 9 whole blocks of the 150 shared tokens
    assert [block.block_id for block in computed.blocks[0]] == dense[:9]
    order = pool.compact(second)
    assert not set(order.block_ids) & set(dense[:9])
    # a third one hits what the second added, and the first ends meanwhile
    pool.end(first)
    third = pool.request("c", list(second.prompt_token_ids) + [8] * 10)
    assert pool.kv.get_computed_blocks(third)[1] == 192
    pool.compact(third)
    for request in (second, third):
        pool.end(request)
    assert pool.free == 99


@pytest.mark.parametrize(
    ("recomputed", "hit"), [(1, 192), (8, 192), (9, 176), (32, 160), (4096, 0)]
)
def test_prefix_cache_leaves_the_queries_to_be_computed_that_selection_looks_at(recomputed, hit):
    pool = Pool(spec=replace(hetero_spec(), recomputed_tokens=recomputed))
    first = pool.request("a", 200)
    pool.compact(first)
    again = pool.request("b", list(first.prompt_token_ids))
    computed, num_hit, _ = pool.kv.get_computed_blocks(again)
    assert num_hit == hit == PAGE * len(computed.blocks[0])
    pool.compact(again)
    for request in (first, again):
        pool.end(request)
    assert pool.free == 99


def test_prefix_cache_serves_prompts_that_stay_dense_as_stock_vllm_does():
    pool = Pool(spec=replace(hetero_spec(), recomputed_tokens=32))
    first = pool.request("a", MIN_TOKENS - 1)
    pool.prefill(first)
    again = pool.request("b", list(first.prompt_token_ids))
    assert pool.kv.get_computed_blocks(again)[1] == 64


def test_prefix_shared_with_a_request_in_prefill_survives_its_compaction():
    pool = Pool()
    first = pool.request("a", 200)
    pool.prefill(first)
    order = pool.take_order()
    second = pool.request("b", list(first.prompt_token_ids) + [5] * 40)
    assert pool.admit(second, 16)
    shared = pool.table(second)[:12]
    before = pool.free
    pool.answer(order)
    pool.decode(first)
    assert pool.free == before, "second still reads all 12"
    assert pool.table(second)[:12] == shared
    assert all(pool.blocks.blocks[i].ref_cnt == 1 for i in shared)


def test_prefix_cache_gives_way_when_the_pool_needs_the_blocks():
    pool = Pool(30)
    first = pool.request("a", 200)
    pool.compact(first)
    second = pool.request("b", 240)  # 15 + 5 of 24 free blocks, 12 of which are cached
    assert pool.free == 29 - 4 - 1
    pool.compact(second)
    again = pool.request("c", list(first.prompt_token_ids))
    assert pool.kv.get_computed_blocks(again)[1] < 192


@pytest.mark.parametrize("num_prompt", [193, 200, 207])
def test_generated_tokens_of_a_compacted_request_are_not_published(num_prompt):
    pool = Pool()
    request = pool.request("a", num_prompt)
    pool.prefill(request)
    order = pool.take_order()
    pool.decode(request, 25)
    pool.answer(order)
    pool.decode(request, 25)
    follower = pool.request("b", list(request.all_token_ids) + [3] * 30)
    assert pool.kv.get_computed_blocks(follower)[1] == 192
    pool.end(request)
    assert pool.kv.get_computed_blocks(follower)[1] == 192


def test_generated_tokens_of_dense_requests_are_published_as_in_stock_vllm():
    pool = Pool()
    short = pool.request("short", MIN_TOKENS - 1)
    pool.prefill(short)
    pool.decode(short, 50)
    refused = pool.request("refused", 200)
    pool.prefill(refused)
    pool.answer(pool.take_order(), done=0, refused=1)
    pool.decode(refused, 50)
    for request, num_tokens in ((short, 112), (refused, 240)):
        follower = pool.request("b", list(request.all_token_ids) + [3] * 30)
        assert pool.kv.get_computed_blocks(follower)[1] == num_tokens


def test_admission_counts_compact_blocks_on_top_of_what_others_hold():
    pool = Pool(50)
    first = pool.request("a", 200)
    pool.compact(first)  # holds 4 + 1, so 44 are free
    assert pool.free == 44
    # 544 tokens: 34 + ceil(10.2) = 45
    assert not pool.admit(pool.request("b", 544), 16)
    # 527 tokens: 33 + ceil(.3 * 32) = 43
    assert pool.admit(pool.request("c", 527), 16)


def test_last_chunk_waits_for_room_for_compact_blocks():
    pool = Pool(20)
    first = pool.request("a", 199)  # 13 + 4 of 19
    assert pool.admit(first, 160)
    other = pool.request("b", 60)
    assert pool.admit(other)  # 4, dense
    before = pool.free
    assert not pool.advance(first), "3 dense and 4 compact blocks are needed, 5 are free"
    assert pool.free == before and pool.ledger.take_orders() == []
    pool.end(other)
    assert pool.advance(first)
    assert pool.take_order().num_tokens == 199


def test_preempted_request_is_compacted_anew_with_its_outputs():
    pool = Pool()
    request = pool.request("a", 200)
    start = pool.free
    first = pool.compact(request)
    pool.decode(request, 57)
    pool.end(request)  # preemption frees everything
    assert pool.free == start
    assert pool.ledger.tickets == [] and pool.manager.compact_blocks == []
    assert request.num_tokens == 258
    pool.prefill(request, 50)
    second = pool.take_order()
    assert second.ticket != first.ticket
    assert second.num_tokens == 258
    assert len(second.block_ids) == 5  # ceil(.3 * 16)
    pool.answer(second)
    pool.decode(request)
    assert start - pool.free == 5 + 1
    assert pool.table(request)[:17] == [0] * 16 + [pool.table(request)[16]]
    # replayed outputs were computed with full attention, so they may be published, but the
    # tokens generated after them may not
    follower = pool.request("b", list(request.all_token_ids) + [3] * 30)
    assert 192 <= pool.kv.get_computed_blocks(follower)[1] <= 256
    pool.end(request)
    assert pool.free == start


def test_short_prompt_that_outgrows_the_limit_is_compacted_when_it_is_replayed():
    pool = Pool()
    request = pool.request("a", MIN_TOKENS - 1)
    pool.prefill(request)
    pool.decode(request, 100)
    assert pool.ledger.take_orders() == [], "stays dense however long its output is"
    pool.end(request)
    pool.prefill(request)
    assert pool.take_order().num_tokens == MIN_TOKENS + 99


@pytest.mark.parametrize("when", ["in prefill", "before sending", "before the answer", "after it"])
def test_aborted_request_leaves_nothing_behind(when):
    pool = Pool()
    request = pool.request("a", 200)
    start = pool.free
    pool.admit(request, 100)
    order = None
    if when != "in prefill":
        pool.advance(request)
    if when in ("before the answer", "after it"):
        order = pool.take_order()
    if when == "after it":
        pool.answer(order)
        pool.decode(request)
    pool.end(request)
    assert pool.free == start
    assert pool.ledger.take_orders() == [], "an order that was not sent is withdrawn"
    assert pool.ledger.tickets == [] and pool.manager.compact_blocks == []
    assert pool.ledger.take_starts() == [] and pool.manager.prompts == {}


@pytest.mark.parametrize("chunk", [None, 16, 33, 199, 200])
def test_workers_learn_with_the_first_chunk_that_a_prompt_will_be_compacted(chunk):
    pool = Pool()
    request = pool.request("a", 200)
    assert pool.admit(request, chunk)
    assert pool.ledger.take_starts() == [PrefillStart("a", 200)]
    while request.num_computed_tokens < 200:
        assert pool.advance(request, chunk)
    assert pool.take_order().num_tokens == 200
    pool.decode(request, 30)
    assert pool.ledger.take_starts() == [], "told once"


def test_prompt_that_stays_dense_is_not_announced():
    pool = Pool()
    request = pool.request("short", MIN_TOKENS - 1)
    pool.prefill(request)
    pool.decode(request, 50)
    assert pool.ledger.take_starts() == []


def test_request_that_is_kept_dense_is_neither_announced_nor_compacted():
    pool = Pool()
    pool.manager.keep_dense("a")
    request = pool.request("a", 200)
    pool.prefill(request)
    pool.decode(request, 50)
    assert pool.ledger.take_starts() == [] and pool.ledger.take_orders() == []
    assert pool.manager.compact_blocks == []


def test_streaming_input_stays_dense_until_the_request_ends():
    """Its prompt grows while it holds blocks, and preemption does not make it a new one."""
    pool = Pool()
    pool.manager.keep_dense("a")
    request = pool.request("a", 100)
    pool.prefill(request)
    for token in range(60):  # the next chunk of the input; the admission gate asks again
        request.append_output_token_ids(token)
    assert pool.kv.allocate_slots(request, 60, full_sequence_must_fit=True)
    pool.end(request)  # preemption
    pool.prefill(request)
    assert pool.manager.prompts["a"].state is PromptState.KEPT_DENSE
    assert pool.ledger.take_starts() == [] and pool.ledger.take_orders() == []
    pool.manager.end_request("a")
    pool.end(request)
    assert pool.manager.prompts == {} and pool.free == 99
    again = pool.request("a", 200)  # the same name, and all input at once
    pool.prefill(again)
    assert pool.take_order().num_tokens == 200


def test_only_the_end_of_its_blocks_ends_another_prompt():
    pool = Pool()
    request = pool.request("a", 200)
    pool.prefill(request)
    pool.manager.end_request("a")  # vLLM says so before it frees the blocks
    pool.manager.end_request("unknown")
    assert pool.manager.prompts["a"].state is PromptState.ORDERED
    pool.end(request)
    assert pool.manager.prompts == {}


def test_state_follows_the_prompt():
    pool = Pool(30)

    def state(name):
        return pool.manager.prompts[name].state

    first, waiting = pool.request("first", 200), pool.request("waiting", 208)
    assert pool.admit(first, 100)
    assert state("first") is PromptState.ANNOUNCED
    assert pool.advance(first)
    assert state("first") is PromptState.ORDERED
    assert not pool.admit(waiting)
    assert state("waiting") is PromptState.ADMITTED
    waiting.append_output_token_ids(7)  # of a step that was in flight when it was preempted
    assert not pool.admit(waiting)
    assert pool.manager.prompts["waiting"].num_tokens == 209
    pool.answer(pool.take_order())
    assert state("first") is PromptState.ORDERED, "until its next step"
    pool.decode(first)
    assert state("first") is PromptState.COMPACTED
    pool.prefill(waiting)
    pool.answer(pool.take_order(), done=0, refused=1)
    pool.decode(waiting)
    assert state("waiting") is PromptState.DENSE
    short = pool.request("short", MIN_TOKENS - 1)
    pool.prefill(short)
    assert state("short") is PromptState.DENSE
    with pytest.raises(TypeError):
        pool.manager.prompts["other"] = None


def test_prompt_that_has_to_wait_is_announced_when_it_gets_its_first_blocks():
    pool = Pool(30)
    first, second = pool.request("a", 200), pool.request("b", 208)
    pool.prefill(first)
    pool.ledger.take_starts()
    for _ in range(3):
        assert not pool.admit(second, 16)
    assert pool.ledger.take_starts() == []
    pool.end(first)
    assert pool.admit(second, 16)
    assert pool.ledger.take_starts() == [PrefillStart("b", 208)]


def test_prefix_hit_is_announced_with_the_whole_prompt():
    pool = Pool()
    first = pool.request("a", 200)
    pool.prefill(first)
    pool.ledger.take_starts()
    second = pool.request("b", list(first.prompt_token_ids) + [5] * 40)
    assert pool.admit(second, 16)
    assert pool.ledger.take_starts() == [PrefillStart("b", 240)]


def test_preempted_request_is_announced_anew_with_its_outputs():
    pool = Pool()
    request = pool.request("a", 200)
    pool.compact(request)
    pool.decode(request, 57)
    pool.ledger.take_starts()
    pool.end(request)
    pool.admit(request, 50)
    assert pool.ledger.take_starts() == [PrefillStart("a", 258)]


def test_refused_request_is_not_announced_again():
    pool = Pool()
    request = pool.request("a", 200)
    pool.prefill(request)
    pool.ledger.take_starts()
    pool.answer(pool.take_order(), done=0, refused=1)
    pool.decode(request, 20)
    assert pool.ledger.take_starts() == []


@pytest.mark.parametrize("caching", [True, False])
def test_dead_blocks_are_noted_as_they_come_back_and_prefix_cache_is_not(caching):
    """200 tokens: 12 full blocks, which are prefix cache, a partial one, and 4 compact blocks."""
    pool = Pool(caching=caching)
    watch_dead_blocks(pool.blocks, pool.ledger.note_dead)
    request = pool.request("a", 200)
    pool.prefill(request)
    dense = pool.table(request)
    order = pool.take_order()
    pool.answer(order)
    assert pool.ledger.take_dead() == []
    pool.decode(request)
    assert set(pool.ledger.take_dead()) == (set() if caching else set(dense[:12]))
    pool.decode(request, 16)
    tail = pool.table(request)[12:]
    pool.end(request)
    assert set(pool.ledger.take_dead()) == {*tail, *order.block_ids}


def test_blocks_of_a_refused_compaction_are_dead():
    pool = Pool()
    watch_dead_blocks(pool.blocks, pool.ledger.note_dead)
    request = pool.request("a", 200)
    pool.prefill(request)
    order = pool.take_order()
    pool.answer(order, done=0, refused=1)
    pool.decode(request)
    assert sorted(pool.ledger.take_dead()) == sorted(order.block_ids)


def test_block_that_another_request_still_reads_is_not_dead():
    pool = Pool()
    watch_dead_blocks(pool.blocks, pool.ledger.note_dead)
    first = pool.request("a", 60)
    pool.prefill(first)
    second = pool.request("b", list(first.prompt_token_ids[:48]) + [5] * 30)
    pool.prefill(second)
    last = pool.table(first)[3]
    pool.end(first)
    assert pool.ledger.take_dead() == [last]


def test_late_answer_of_an_ended_request_touches_nothing():
    pool = Pool()
    request = pool.request("a", 200)
    pool.prefill(request)
    stale = pool.take_order()
    pool.end(request)
    again = pool.request("a", 200)  # the same name, at once
    pool.prefill(again)
    fresh = pool.take_order()
    before = pool.free
    pool.answer(stale)
    pool.decode(again)
    assert pool.free == before, "its own compaction is not done"
    pool.answer(fresh)
    pool.decode(again)
    assert pool.free == before + 12
    pool.answer(stale, done=0, refused=1)
    pool.decode(again)
    assert pool.free == before + 12


@pytest.mark.parametrize("seed", range(4))
def test_short_requests_are_served_exactly_as_by_stock_vllm(seed):
    """Same admissions, same block ids in the same order, same hits, step by step."""
    pools = Pool(40), Pool(40, spec=FullAttentionSpec(**GEOMETRY))
    rng = random.Random(seed)
    live: dict[str, list] = {}
    for step in range(150):
        if rng.random() < 0.3:
            name = str(step)
            prompt = [rng.randrange(2)] * 40 + rng.choices(range(9), k=rng.randrange(1, 30))
            requests = [pool.request(name, prompt) for pool in pools]
            chunk = rng.choice([None, 16, 23])
            admitted = [
                pool.admit(request, chunk) for pool, request in zip(pools, requests, strict=True)
            ]
            assert admitted[0] == admitted[1]
            if admitted[0]:
                live[name] = requests
        for name, requests in list(live.items()):
            went_on = []
            for pool, request in zip(pools, requests, strict=True):
                if request.num_computed_tokens == request.num_tokens:
                    request.append_output_token_ids(step)
                went_on.append(pool.advance(request))
            assert went_on[0] == went_on[1]
            if not went_on[0] or rng.random() < 0.1:
                for pool, request in zip(pools, requests, strict=True):
                    pool.end(request)
                del live[name]
        tables = [[pool.table(pair[i]) for pair in live.values()] for i, pool in enumerate(pools)]
        assert tables[0] == tables[1]
        queues = [pool.blocks.free_block_queue.get_all_free_blocks() for pool in pools]
        assert [b.block_id for b in queues[0]] == [b.block_id for b in queues[1]]
    assert pools[0].ledger.take_orders() == []


def _leak_a_block(pool, compacted, dense):
    pool.manager.req_to_blocks[dense.request_id].pop()


def _free_a_held_block(pool, compacted, dense):
    pool.blocks.free_blocks([pool.manager.req_to_blocks[dense.request_id][0]])


def _free_one_held_block_and_leak_another(pool, compacted, dense):
    blocks = pool.manager.req_to_blocks[dense.request_id]
    blocks.pop()
    pool.blocks.free_blocks([blocks[0]])


def _free_a_compact_block(pool, compacted, dense):
    pool.blocks.free_blocks([pool.manager.prompts["compacted"].compact_blocks[1]])


def _free_one_compact_block_and_leak_another(pool, compacted, dense):
    pool.blocks.free_blocks([pool.manager.prompts["compacted"].compact_blocks[0]])
    pool.manager.req_to_blocks[dense.request_id].pop()


def _put_a_compact_block_into_a_table(pool, compacted, dense):
    block = pool.manager.prompts["compacted"].compact_blocks[0]
    pool.manager.req_to_blocks[dense.request_id][1] = block


def _give_a_block_to_two_compactions(pool, compacted, dense):
    blocks = pool.manager.prompts["compacted"].compact_blocks
    blocks[1] = blocks[0]


def _forget_the_compact_blocks(pool, compacted, dense):
    pool.manager.prompts["compacted"].compact_blocks = []


def _free_and_forget_a_compact_block(pool, compacted, dense):
    pool.blocks.free_blocks([pool.manager.prompts["compacted"].compact_blocks.pop()])


def _forget_a_ticket(pool, compacted, dense):
    pool.manager.prompts["compacted"].ticket = None


def _close_the_ticket_of_a_held_compaction(pool, compacted, dense):
    pool.ledger.close(pool.manager.prompts["compacted"].ticket)


def _forget_the_ticket_on_both_sides(pool, compacted, dense):
    prompt = pool.manager.prompts["compacted"]
    pool.ledger.close(prompt.ticket)
    prompt.ticket = None


def _leave_a_ticket_open(pool, compacted, dense):
    pool.ledger.open("nobody", 200, [])


def _compact_without_an_announcement(pool, compacted, dense):
    pool.manager.prompts["compacted"].state = PromptState.ADMITTED


def _admit_without_an_announcement(pool, compacted, dense):
    pool.manager.prompts["dense"].state = PromptState.ADMITTED


def _say_that_a_dense_prompt_is_compacted(pool, compacted, dense):
    pool.manager.prompts["dense"].state = PromptState.COMPACTED


def _keep_a_freed_prompt_block_in_the_table(pool, compacted, dense):
    pool.blocks.touch([pool.blocks.blocks[1]])
    pool.manager.req_to_blocks["compacted"][0] = pool.blocks.blocks[1]


def _hold_a_block_twice_with_one_reference(pool, compacted, dense):
    pool.manager.req_to_blocks["compacted"].append(pool.manager.req_to_blocks["dense"][0])


CORRUPTIONS = [
    _leak_a_block,
    _free_a_held_block,
    _free_one_held_block_and_leak_another,
    _free_a_compact_block,
    _free_one_compact_block_and_leak_another,
    _put_a_compact_block_into_a_table,
    _give_a_block_to_two_compactions,
    _forget_the_compact_blocks,
    _free_and_forget_a_compact_block,
    _forget_a_ticket,
    _close_the_ticket_of_a_held_compaction,
    _forget_the_ticket_on_both_sides,
    _leave_a_ticket_open,
    _compact_without_an_announcement,
    _admit_without_an_announcement,
    _say_that_a_dense_prompt_is_compacted,
    _keep_a_freed_prompt_block_in_the_table,
    _hold_a_block_twice_with_one_reference,
]


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda corrupt: corrupt.__name__.strip("_"))
def test_check_integrity_finds(corrupt):
    pool = Pool()
    compacted, dense = pool.request("compacted", 200), pool.request("dense", 60)
    pool.compact(compacted)
    pool.prefill(dense)
    pool.manager.check_integrity()
    corrupt(pool, compacted, dense)
    with pytest.raises(AssertionError):
        pool.manager.check_integrity()


# --- policies that free nothing ---


def staying_pool(**settings) -> Pool:
    return Pool(spec=hetero_spec(frees_prompt=False), **settings)


@pytest.mark.parametrize("chunk", [None, 33, 199])
@pytest.mark.parametrize("num_tokens", [70, 80, 200, 335])
def test_a_prompt_that_stays_is_ordered_without_blocks_and_none_goes_back(num_tokens, chunk):
    pool, stock = staying_pool(), Pool(spec=FullAttentionSpec(**GEOMETRY))
    request, twin = pool.request("a", num_tokens), stock.request("a", num_tokens)
    pool.prefill(request, chunk)
    stock.prefill(twin, chunk)
    assert pool.ledger.take_starts() == [PrefillStart("a", num_tokens)]
    order = pool.take_order()
    assert order.block_ids == [] and order.num_tokens == num_tokens
    assert pool.ledger.tickets == [order.ticket] and pool.manager.compact_blocks == []
    for answered in (False, True):
        if answered:
            pool.answer(order)
        pool.decode(request, 30)
        stock.decode(twin, 30)
        assert pool.free == stock.free and pool.table(request) == stock.table(twin)
    assert pool.ledger.take_orders() == [], "ordered once"
    pool.end(request)
    assert pool.free == 99 and pool.ledger.tickets == []


def test_only_the_prompt_of_one_that_stays_is_a_prefix_cache():
    pool = staying_pool()
    first = pool.request("a", 200)
    pool.prefill(first)
    pool.answer(pool.take_order())
    pool.decode(first, 60)  # fills blocks that hold generated tokens
    longer = pool.request("b", list(first.all_token_ids))
    assert pool.kv.get_computed_blocks(longer)[1] == 192
    pool.prefill(longer)
    assert pool.table(longer)[:12] == pool.table(first)[:12], "read by both"
    assert pool.take_order().request_id == "b"
    pool.end(first)
    pool.decode(longer, 3)
    pool.end(longer)
    assert pool.free == 99


def test_one_that_stays_and_is_refused_goes_on_as_in_stock_vllm():
    pool = staying_pool(world_size=2)
    request = pool.request("a", 200)
    pool.prefill(request)
    pool.answer(pool.take_order(), done=0, refused=2)
    pool.decode(request, 60)
    assert pool.ledger.tickets == [] and pool.ledger.take_orders() == []
    again = pool.request("b", list(request.all_token_ids))
    assert pool.kv.get_computed_blocks(again)[1] == 256, "what it generates is cached, too"
    pool.end(request)
    assert pool.free == 99


def test_where_prompts_stay_the_longest_request_needs_no_more_than_in_stock_vllm():
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=333),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    spec = hetero_spec(frees_prompt=False)
    assert spec.max_memory_usage_bytes(config) == 21 * spec.page_size_bytes
    assert spec.is_compacted(MIN_TOKENS) and not spec.is_compacted(MIN_TOKENS - 1)
    pool = Pool(21 + 1, spec=spec)
    assert pool.admit(pool.request("longest", 333))
    assert pool.take_order().block_ids == []


class Copies:
    """What copies blocks to the host beside us."""

    def __init__(self) -> None:
        self.readers: set[str] = set()
        self.forgotten: list[tuple[str, int]] = []
        self.overwritten: list[int] = []

    def is_reading(self, request_id: str) -> bool:
        return request_id in self.readers

    def forget(self, request_id: str, num_blocks: int) -> None:
        self.forgotten.append((request_id, num_blocks))

    def overwrite(self, block_ids: list[int]) -> None:
        self.overwritten += block_ids


def test_no_block_goes_back_while_it_is_copied_to_the_host():
    pool = Pool()
    pool.manager.offload = copies = Copies()
    copies.readers.add("a")
    start, request = pool.free, pool.request("a", 200)
    pool.prefill(request)
    order = pool.take_order()
    assert copies.overwritten == order.block_ids, "they may have been read for another request"
    pool.answer(order)
    pool.decode(request, 5)
    dense = 13  # 200 tokens and those decoded
    assert pool.free == start - dense - exact_compact_blocks(200, BUDGET)
    assert copies.forgotten == []
    copies.readers.clear()
    pool.decode(request)
    assert copies.forgotten == [("a", 12)], "nothing of the full blocks is copied later"
    assert pool.free == start - 1 - exact_compact_blocks(200, BUDGET)
    pool.end(request)
    assert pool.free == start


def test_a_prompt_that_is_loaded_from_the_host_passes_the_gate_twice():
    """Its blocks are allocated before the load, and its first tokens are computed behind it."""
    pool = Pool()
    request = pool.request("a", 200)
    loaded = pool.kv.allocate_slots(
        request,
        0,
        num_external_computed_tokens=160,
        delay_cache_blocks=True,
        full_sequence_must_fit=True,
    )
    assert loaded is not None and pool.ledger.take_starts([]) == []
    request.num_computed_tokens = 160
    assert pool.kv.allocate_slots(request, 40, full_sequence_must_fit=True) is not None
    request.num_computed_tokens = 200
    assert pool.ledger.take_starts(["a"]) == [PrefillStart("a", 200)]
    order = pool.take_order()
    assert order.num_tokens == 200
    pool.answer(order)
    pool.decode(request)
    assert all(block.is_null for block in pool.manager.req_to_blocks["a"][:12])
