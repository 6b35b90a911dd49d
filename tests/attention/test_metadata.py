"""The builder on made-up batches of vLLM, and the backend's forward pass on what it builds."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from world import CPU, PAGE, World, assignment_of

from vllm_heterocache import compat
from vllm_heterocache.attention.backend import HeteroCacheBackend, HeteroCacheImpl
from vllm_heterocache.attention.metadata import HeteroCacheMetadataBuilder
from vllm_heterocache.compat import AttentionType, CommonAttentionMetadata
from vllm_heterocache.kv_cache_dtype import FP8_ELEMENTS
from vllm_heterocache.messages import CompactionOrder
from vllm_heterocache.worker.batch import KeptQueries
from vllm_heterocache.worker.row_buffers import RowBuffers

BLOCKS = 12  # columns of a block table
ROLES = assignment_of("PS", leaders={(0, 1): (0, 0)})


def speculation(num_drafts: int) -> SimpleNamespace | None:
    if not num_drafts:
        return None
    return SimpleNamespace(num_speculative_tokens=num_drafts, parallel_drafting=False)


def make_builder(
    runtime, num_drafts: int = 0, block_size: int = PAGE
) -> HeteroCacheMetadataBuilder:
    layers = {"layers.0": SimpleNamespace(impl=SimpleNamespace(runtime=runtime))}
    compilation = SimpleNamespace(static_forward_context=layers)
    parallel = SimpleNamespace(decode_context_parallel_size=1)
    config = SimpleNamespace(
        compilation_config=compilation,
        parallel_config=parallel,
        speculative_config=speculation(num_drafts),
        use_v2_model_runner=True,
    )
    return HeteroCacheMetadataBuilder(
        SimpleNamespace(block_size=block_size), ["layers.0"], config, CPU
    )


def common_of(
    query_lens: list[int],
    seq_lens: list[int],
    prefilling: list[int] | None = None,
    known_rows: int | None = None,
    block_table: torch.Tensor | None = None,
) -> CommonAttentionMetadata:
    """A batch as vLLM describes it. `known_rows`: rows whose length the host is told (V2 leaves
    padding out); vLLM's buffers are longer than the batch."""
    num_rows = len(query_lens)
    starts = torch.tensor([0, *np.cumsum(query_lens)], dtype=torch.int32)
    known = torch.tensor(seq_lens[:known_rows], dtype=torch.int32)
    if block_table is None:
        block_table = torch.arange(num_rows * BLOCKS, dtype=torch.int32).view(num_rows, BLOCKS)
    return CommonAttentionMetadata(
        query_start_loc=starts.clone(),
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=num_rows,
        num_actual_tokens=sum(query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=block_table,
        slot_mapping=torch.zeros(sum(query_lens), dtype=torch.int64),
        is_prefilling=torch.tensor(prefilling or [0] * num_rows, dtype=torch.bool),
        seq_lens_cpu_upper_bound=known,
    )


class Recorder:
    """A runtime that notes what it is told of a batch."""

    def __init__(self, max_queries: int = 1) -> None:
        self.rows = RowBuffers(100, max_queries, 1, torch.device("cpu"))

    def begin_batch(self, batch) -> list[KeptQueries]:
        self.batch = batch
        return [KeptQueries(7, 1, 0)]


@pytest.fixture
def runtime() -> Recorder:
    return Recorder()


def test_without_a_pool_there_is_no_metadata():
    """vLLM measures the memory of CUDA graphs before the pool exists."""
    builder = make_builder(None)
    assert builder.build(0, common_of([1, 1], [5, 6])) is None


def test_decodes_alone(runtime):
    common = common_of([1, 1, 1], [40, 7, 99])
    metadata = make_builder(runtime).build(0, common)
    assert metadata.prefills is None and metadata.kept == [KeptQueries(7, 1, 0)]
    rows = metadata.decodes
    kept = runtime.rows.decode_rows(
        common.block_table_tensor, common.seq_lens, common.query_start_loc, 3
    )
    assert [t.data_ptr() for t in rows[:5]] == [t.data_ptr() for t in kept[:5]]
    assert {len(t) for t in rows[:5]} == {3}
    assert runtime.batch.num_decodes == 3
    assert runtime.batch.query_lens.tolist() == [1, 1, 1]
    assert runtime.batch.seq_lens.tolist() == [40, 7, 99]


def test_blocks_of_several_pages_are_read_as_kernel_blocks_at_one_address(runtime):
    builder, addresses = make_builder(runtime, block_size=3 * PAGE), set()
    for blocks in ([[5, 0], [7, 9], [2, 4]], [[1, 3], [0, 0], [6, 8]]):
        table = torch.tensor(blocks, dtype=torch.int32)
        metadata = builder.build(0, common_of([1, 30, 5], [40, 70, 9], [0, 1, 1], None, table))
        of_blocks = [[3 * block + i for block in row for i in range(3)] for row in blocks]
        assert metadata.decodes.block_table.tolist() == of_blocks[:1]
        assert metadata.prefills.block_table.tolist() == of_blocks[1:]
        assert runtime.batch.block_table.tolist() == of_blocks
        assert table.tolist() == blocks, "vLLM's own table"
        addresses.add(metadata.decodes.block_table.data_ptr())
    assert len(addresses) == 1, "captured CUDA graphs read it"


@pytest.mark.parametrize("known_rows", [2, 4], ids=["V2", "V1"])
def test_padding_of_decodes_is_part_of_them(runtime, known_rows):
    common = common_of([1, 1, 0, 0], [40, 7, 0, 0], known_rows=known_rows)
    metadata = make_builder(runtime).build(0, common)
    assert metadata.prefills is None and len(metadata.decodes.seq_lens) == 4
    assert runtime.batch.num_decodes == 4
    assert runtime.batch.seq_lens.tolist() == [40, 7, 0, 0]


def test_a_batch_of_padding_alone_is_a_decode_batch(runtime):
    metadata = make_builder(runtime).build(0, common_of([0, 0], [0, 0], known_rows=0))
    assert metadata.prefills is None and len(metadata.decodes.seq_lens) == 2


def test_prefills_alone(runtime):
    metadata = make_builder(runtime).build(0, common_of([30, 5], [30, 105], [1, 1]))
    assert metadata.decodes is None and runtime.batch.num_decodes == 0
    prefills = metadata.prefills
    assert prefills.first_token == 0 and prefills.tokens == slice(0, 35)
    assert prefills.starts == prefills.cu_seqlens.tolist() == [0, 30, 35]
    assert prefills.num_tokens == prefills.seq_lens.tolist() == [30, 105]
    assert (prefills.max_query_len, prefills.max_seq_len) == (30, 105)
    assert prefills.block_table.tolist() == [[*range(12)], [*range(12, 24)]]


@pytest.mark.parametrize("with_padding", [False, True])
def test_decodes_come_before_prefills(runtime, with_padding):
    padding = [0] * with_padding
    common = common_of([1, 1, 30, 5, *padding], [40, 7, 30, 105, *padding], [0, 0, 1, 1, *padding])
    metadata = make_builder(runtime).build(0, common)
    assert metadata.decodes.seq_lens.tolist() == [40, 7]
    assert metadata.decodes.block_table.tolist() == [[*range(12)], [*range(12, 24)]]
    assert runtime.batch.num_decodes == 2
    assert runtime.batch.is_prefilling.tolist() == [False, False, True, True, *map(bool, padding)]
    prefills = metadata.prefills
    assert prefills.first_token == 2 and prefills.tokens == slice(2, 37)
    assert prefills.starts == prefills.cu_seqlens.tolist() == [0, 30, 35, *[35] * with_padding]
    assert prefills.num_tokens == prefills.seq_lens.tolist() == [30, 105, *padding]
    assert prefills.cu_seqlens.dtype == prefills.seq_lens.dtype == torch.int32
    assert (prefills.max_query_len, prefills.max_seq_len) == (30, 105)


def test_chunks_of_one_token_are_decode_rows_where_they_come_first(runtime):
    """V1 puts the first chunk of a prompt last, though it be one token."""
    common = common_of([1, 1, 30, 1], [40, 107, 30, 1], [0, 1, 1, 1])
    common.req_idx = np.array([7, 0, 2, 5])
    metadata = make_builder(runtime).build(0, common)
    assert metadata.decodes.seq_lens.tolist() == [40, 107]
    assert metadata.prefills.num_tokens == [30, 1]
    assert runtime.batch.num_decodes == 2
    assert runtime.batch.is_prefilling.tolist() == [False, True, True, True]
    assert runtime.batch.req_idx is common.req_idx


# --- rows that verify drafts ---


def built_with_drafts(*batch, **more):
    """Metadata of a batch where up to three drafts are verified with a token."""
    runtime = Recorder(max_queries=4)
    return make_builder(runtime, num_drafts=3).build(0, common_of(*batch, **more)), runtime


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_vllm_puts_rows_of_as_many_tokens_first(num_drafts):
    assert make_builder(Recorder(), num_drafts).reorder_batch_threshold == 1 + num_drafts


def test_rows_of_drafts_are_decode_rows():
    metadata, runtime = built_with_drafts([4, 2, 1, 30], [40, 7, 9, 30], [0, 0, 0, 1])
    assert runtime.batch.num_decodes == 3
    assert metadata.decodes.query_start.tolist() == [0, 4, 6, 7]
    assert metadata.decodes.max_queries == 4
    assert metadata.decodes.seq_lens.tolist() == [40, 7, 9]
    assert metadata.prefills.first_token == 7 and metadata.prefills.num_tokens == [30]


def test_padding_behind_rows_of_drafts_has_no_query():
    metadata, _ = built_with_drafts([4, 4, 0, 0], [40, 7, 0, 0], known_rows=2)
    assert metadata.decodes.query_start.tolist() == [0, 4, 8, 8, 8]
    assert metadata.prefills is None


def test_a_short_prompt_behind_a_long_one_is_prefilled():
    metadata, runtime = built_with_drafts([4, 30, 3], [40, 30, 3], [0, 1, 1])
    assert runtime.batch.num_decodes == 1
    assert metadata.prefills.starts == [0, 30, 33]


def test_queries_of_decode_rows_have_places_of_their_own():
    rows = RowBuffers(3, 4, 1, CPU)
    rows.fill({1: 7}, [KeptQueries(0, 1, 5), KeptQueries(3, 2, 20)], [1], dense_slot=9)
    starts = torch.tensor([0, 1, 5], dtype=torch.int32)
    found = rows.decode_rows(torch.zeros(3, 2), torch.zeros(3), starts, 2)
    assert found.query_place.tolist() == [5, -1, -1, 20, 21] + [-1] * 7
    assert found.row_to_table_slot.tolist() == [9, 7] and found.is_due.tolist() == [0, 1]
    rows.fill({}, [], [], dense_slot=9)
    assert found.query_place.eq(-1).all(), "the address is the same"


# --- with the runtime, and through the backend ---


def make_world(cache_dtype: str = "auto") -> World:
    """A compacted request "a" and a short dense one "b", both decoding."""
    page_dtype = getattr(torch, FP8_ELEMENTS.get(cache_dtype, "float32"))
    options = {"sink_pages": 0, "recent_pages": 0}
    world = World(ROLES, padding=0, options=options, page_dtype=page_dtype)
    world.step(prefill={"a": 20 * PAGE + 5})
    world.step(prefill={"b": 2 * PAGE + 3}, compact=False)
    world.step(decode=["a", "b"])
    return world


def begin(world: World, ids: list[str], orders=()) -> None:
    world.runtime.begin_step([], orders=orders)
    world.batch_ids = ids


def test_rows_of_the_runtime_reach_the_decode_rows():
    world = make_world()
    begin(world, ["b", "a"])
    common = common_of([1, 1, 0], [60, 400, 0])
    rows = make_builder(world.runtime).build(0, common).decodes
    dense = world.table.dense_slot
    assert rows.row_to_table_slot.tolist() == [dense, world.compacted("a").table_slot, dense]
    assert rows.query_place.tolist() == [-1, -1, -1]


def test_kept_queries_are_the_last_token_of_prefill_rows_and_decode_rows_store_their_own():
    world = make_world()
    targets = world.free[:30]
    orders = [CompactionOrder(i, f"new{i}", n, targets) for i, n in enumerate((160, 33, 90))]
    begin(world, ["a", "new1", "new0", "new2", "other"], orders)
    common = common_of([1, 1, 30, 90, 4], [400, 33, 160, 90, 50], [0, 1, 1, 1, 1])
    metadata = make_builder(world.runtime).build(0, common)
    assert metadata.decodes.query_place.tolist() == [-1, 0]
    assert metadata.kept == [KeptQueries(1 + 30, 1, 1), KeptQueries(1 + 30 + 90, 1, 2)]


def dense_attention(world: World, request_id: str, query: torch.Tensor, end: int) -> torch.Tensor:
    """[Hq, D] of a token's query over the first `end` tokens, token by token, float64."""
    kv = world.books[request_id].kv[0, :, :end].double()
    output = torch.empty(query.shape, dtype=torch.float64)
    for q_head in range(query.shape[0]):
        keys, values = kv[q_head // world.group].chunk(2, dim=-1)
        weights = (keys @ query[q_head].double() * world.scale).exp()
        output[q_head] = (weights[:, None] * values).sum(0) / weights.sum()
    return output


@pytest.mark.parametrize("cache_dtype", ["auto", *FP8_ELEMENTS])
@pytest.mark.parametrize("with_padding", [False, True])
def test_a_mixed_batch_goes_through_the_backend(with_padding, cache_dtype):
    """A dense decode, a last chunk of one token, a middle chunk, and a whole prompt: writes,
    attention and last queries of one layer."""
    world = make_world(cache_dtype)
    for name, num_tokens, done in (("one", 180, 179), ("chunk", 190, 100), ("whole", 180, 0)):
        world.books[name] = world._new_books(num_tokens, True)
        world._write_kv(world.books[name], done)
    world._append_token(world.books["b"])
    rows = [("b", 1, world.books["b"].num_tokens), ("one", 1, 180), ("chunk", 30, 130)]
    rows += [("whole", 180, 180)]
    ids = [request_id for request_id, _, _ in rows]
    orders = [
        CompactionOrder(i, name, 180, world._take(9)) for i, name in enumerate(("whole", "one"))
    ]
    begin(world, ids, orders)
    table = torch.full((len(rows) + with_padding, BLOCKS), 10**6, dtype=torch.int32)
    slots, keys_values = [], []
    for i, (name, num_new, num_tokens) in enumerate(rows):
        books = world.books[name]
        table[i, : len(books.blocks)] = torch.tensor(books.blocks, dtype=torch.int32)
        for token in range(num_tokens - num_new, num_tokens):
            slots.append(books.blocks[token // PAGE] * PAGE + token % PAGE)
            keys_values.append(books.kv[0, :, token])
    query_lens = [n for _, n, _ in rows] + [0] * with_padding
    seq_lens = [t for _, _, t in rows] + [0] * with_padding
    common = common_of(query_lens, seq_lens, [0, 1, 1, 1] + [0] * with_padding, 4, table)
    metadata = make_builder(world.runtime).build(0, common)

    impl = HeteroCacheImpl(4, 8, world.scale, 2, None, None, cache_dtype)
    impl.runtime, impl.layer_index = world.runtime, 0
    keys, values = torch.stack(keys_values).chunk(2, dim=-1)
    padding = torch.full((3, 2, 8), torch.nan)  # of a piecewise graph: slot -1
    mapping = torch.tensor([*slots, -1, -1, -1])
    impl.kernel_blocks, kv_cache, layer = world.pool[:, 0], None, None
    if world.kv_scales is not None:
        layer = SimpleNamespace(_k_scale=world.kv_scales.key[0], _v_scale=world.kv_scales.value[0])
    impl.do_kv_cache_update(
        layer, torch.cat((keys, padding)), torch.cat((values, padding)), kv_cache, mapping
    )
    query = world.random(len(mapping), 4, 8)
    output = torch.full_like(query, torch.nan)
    impl.forward(layer, query, keys, values, kv_cache, metadata, output)

    token = 0
    for name, num_new, num_tokens in rows:
        for end in range(num_tokens - num_new + 1, num_tokens + 1):
            expected = dense_attention(world, name, query[token], end)
            torch.testing.assert_close(output[token].double(), expected, rtol=1e-4, atol=1e-5)
            token += 1
    last_queries = world.runtime.ops.memory.last_queries
    assert torch.equal(last_queries[0, 0], query[1])
    assert torch.equal(last_queries[1, 0], query[token - 1])


@pytest.mark.parametrize("has_pool", [False, True])
def test_without_metadata_the_backend_answers_zeros(has_pool):
    """vLLM's profiling run has none; it comes before there is a pool, where nothing is written
    either, and again while vLLM warms up."""
    impl = HeteroCacheImpl(4, 8, 0.3, 2, None, None, "auto")
    impl.runtime, impl.layer_index = make_world().runtime if has_pool else None, 0
    output = torch.full((5, 4, 8), torch.nan)
    kv = torch.zeros(5, 2, 8)
    if not has_pool:
        impl.do_kv_cache_update(None, kv, kv, torch.zeros(0), torch.zeros(5, dtype=torch.int64))
    impl.forward(None, torch.zeros(5, 4, 8), kv, kv, torch.zeros(0), None, output)
    assert not output.any()


def test_without_a_pool_the_backend_answers_zeros_whatever_the_metadata():
    impl = HeteroCacheImpl(4, 8, 0.3, 2, None, None, "auto")
    assert impl.runtime is None
    metadata = make_builder(make_world().runtime).build(0, common_of([1, 1], [1, 1]))
    output = torch.full((2, 4, 8), torch.nan)
    kv = torch.zeros(2, 2, 8)
    impl.forward(None, torch.zeros(2, 4, 8), kv, kv, torch.zeros(0), metadata, output)
    assert not output.any()


NO_KERNEL = pytest.mark.feature("ALiBi", refused=True)


@pytest.mark.parametrize(
    ("option", "feature"),
    [
        pytest.param({"alibi_slopes": [1.0]}, "ALiBi", marks=NO_KERNEL),
        ({"sliding_window": 64}, "a sliding window"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "KV sharing"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "attention of type encoder_only"),
        (
            {"layer_idx": 0, "dual_chunk_attention_config": {"chunk_size": 8192}},
            "layer_idx, dual_chunk_attention_config, which",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_features_without_kernels_are_refused_by_name(option, feature):
    plain = {"alibi_slopes": None, "sliding_window": None}
    with pytest.raises(ValueError, match=f"does not support .*{feature}"):
        HeteroCacheImpl(4, 8, 0.3, 2, kv_cache_dtype="auto", **{**plain, **option})


def test_arguments_that_ask_for_nothing_are_taken():
    nothing = {"sinks": None, "dual_chunk_attention_config": None}
    impl = HeteroCacheImpl(4, 8, 0.3, 2, None, None, "auto", **nothing)
    assert impl.sinks is None and impl.soft_cap == 0


def test_a_layer_keeps_its_sinks_and_its_soft_cap():
    assert HeteroCacheBackend.supports_sink()
    sinks = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    impl = HeteroCacheImpl(4, 8, 0.3, 2, None, None, "auto", logits_soft_cap=30.0, sinks=sinks)
    assert impl.sinks is sinks and impl.soft_cap == 30


def test_sinks_are_refused_on_a_gpu_whose_flash_attention_takes_none(monkeypatch):
    monkeypatch.setattr(compat, "current_platform", Mock(is_cpu=lambda: False), raising=False)
    takes = iter([False, True])
    monkeypatch.setattr(compat, "flash_attn_supports_sinks", lambda: next(takes), raising=False)
    plain = 4, 8, 0.3, 2, None, None, "auto"
    with pytest.raises(
        ValueError, match=r"attention sinks.*on this GPU.*another attention backend"
    ):
        HeteroCacheImpl(*plain, sinks=torch.zeros(4))
    HeteroCacheImpl(*plain, sinks=torch.zeros(4))


def test_per_head_scales_of_a_checkpoint_whose_cache_is_not_quantized_are_no_hindrance():
    assert HeteroCacheBackend.supports_per_head_quant_scales()
