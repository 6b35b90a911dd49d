"""vLLM's attention on the CPU over blocks of the packed pool, as layers that are vLLM's own use
it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_heterocache import compat
from vllm_heterocache.attention.packed_cpu import PackedCPUAttentionBackend
from vllm_heterocache.compat import KVCacheLayout

BLOCKS, LAYERS, KV_HEADS, GROUP, DIM = 9, 3, 2, 3, 64
TOKENS = 75


def test_it_admits_the_layout_and_the_blocks_of_the_pool():
    assert PackedCPUAttentionBackend.supported_kv_cache_layouts() == (KVCacheLayout.BLHNC,)
    assert all(PackedCPUAttentionBackend.supports_block_size(16 * n) for n in (1, 2, 5, 32))


@pytest.mark.skipif(not compat.current_platform.is_cpu(), reason="kernels of vLLM's CPU platform")
@pytest.mark.parametrize("block_size", [16, 32, 80, 96])
def test_its_kernels_follow_the_stride_of_packed_blocks(block_size):
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    torch.manual_seed(0)
    pool = torch.full((BLOCKS, LAYERS, KV_HEADS, block_size, 2 * DIM), 7.0)
    query = torch.randn(TOKENS, KV_HEADS * GROUP, DIM)
    key, value = (torch.randn(TOKENS, KV_HEADS, DIM) for _ in range(2))
    blocks = torch.tensor([[7, 3, 8, 5, 2]], dtype=torch.int32)
    places = torch.arange(TOKENS)
    slots = blocks[0, places // block_size] * block_size + places % block_size
    isa = _get_attn_isa(torch.float32, block_size, DIM, "auto")
    impl = make_impl()
    layer = SimpleNamespace(isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)
    kv_cache = pool[:, 1]
    impl.do_kv_cache_update(layer, key, value, kv_cache, slots.long())
    starts = torch.tensor([0, TOKENS], dtype=torch.int32)
    lengths = torch.tensor([TOKENS], dtype=torch.int32)
    metadata = SimpleNamespace(
        num_actual_tokens=TOKENS,
        query_start_loc=starts,
        seq_lens=lengths,
        causal=True,
        block_table=blocks,
        dynamic_causal=None,
        scheduler_metadata=ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=KV_HEADS * GROUP,
            num_kv_heads=KV_HEADS,
            head_dim=DIM,
            seq_lens=lengths,
            dtype=torch.float32,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
            dynamic_causal=None,
            kv_cache_dtype="auto",
        ),
    )
    output = impl.forward(
        layer, query, key, value, kv_cache, metadata, torch.full_like(query, torch.nan)
    )
    heads = (x.repeat_interleave(GROUP, 1).transpose(0, 1) for x in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), *heads, is_causal=True
    )
    torch.testing.assert_close(output, expected.transpose(0, 1), rtol=1e-4, atol=1e-5)
    assert pool[:, [0, 2]].eq(7).all(), "pages of other layers stay as they were"


def make_impl():
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.float32),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        compilation_config=SimpleNamespace(custom_ops=[]),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.config.vllm._current_vllm_config", config)
        return PackedCPUAttentionBackend.get_impl_cls()(
            KV_HEADS * GROUP, DIM, DIM**-0.5, KV_HEADS, None, None, "auto"
        )
