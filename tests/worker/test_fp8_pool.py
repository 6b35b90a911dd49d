"""A worker with an fp8 pool does what a worker does whose pool holds the same numbers in fp32."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from world import CPU, PAGE, World, assignment_of, mixed_assignment, resident_pages

from vllm_heterocache import compat
from vllm_heterocache.calibration.probe import AttentionProbe
from vllm_heterocache.kernels.kv_scales import FP8_DTYPES, KVScales
from vllm_heterocache.kernels.paged_decode import DecodeWorkspace
from vllm_heterocache.kernels.prefill_attention_ref import prefill_attention_ref
from vllm_heterocache.worker.batch import PrefillBatch
from vllm_heterocache.worker.ops.triton_ops import TritonOps

PAIR = assignment_of("PS", leaders={(0, 1): (0, 0)})
COMPRESSED = assignment_of("VVV", "AAA", "AVA", weights={(1, 0): 0.5, (2, 2): 1.5})
POLICIES = {
    "heterocache": {},
    "snapkv": {"policy_options": {"window": 24}},
    "h2o": {},
    "quest": {},
    "oracle": {},
    "fier": {},
    "rocketkv": {"policy_options": {"window": 24, "read_share": 0.4}},
}


def twins(assignment, page_dtype: torch.dtype, **settings) -> tuple[World, World]:
    """A world with an fp8 pool, and one that gets its numbers in fp32."""
    fp8 = World(assignment, page_dtype=page_dtype, **settings)
    fp32 = World(assignment, **settings)
    random_kv = fp32._random_kv
    fp32._random_kv = lambda n: fp8._elements(random_kv(n)).float() * fp8._unit()
    return fp8, fp32


@pytest.mark.parametrize("page_dtype", FP8_DTYPES, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_keeps_and_reads_the_same_pages(policy, page_dtype):
    assignment = mixed_assignment() if policy == "heterocache" else COMPRESSED
    options = {"policy": policy, **POLICIES[policy]}
    worlds = twins(assignment, page_dtype, options=options, host_blocks=80)
    for world in worlds:
        world.step(prefill={"a": 261}, chunk={"a": 101})
        world.step(chunk={"a": 160})
        assert world.done == ["a"]
    fp8, fp32 = worlds
    scales = fp8.kv_scales
    assert scales is not None and len(set(scales.key.flatten().tolist())) > 1
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        queries = 2 * torch.randn(fp8.query_shape, generator=generator)
        for world in worlds:
            world.step(decode=["a"], queries={"a": queries})
        assert resident_pages(fp8, "a") == resident_pages(fp32, "a")
        outputs = [world.books["a"].outputs for world in worlds]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page_dtype", FP8_DTYPES, ids=str)
def test_calibration_measures_the_same_attention(page_dtype):
    spec = {
        "sets": {"rows": [97, 140], "columns": 90, "top_k": 9, "pool": 3},
        "targets": [[120, 11, 30], [147, 80, 99]],
    }
    found = []
    for world in twins(mixed_assignment(), page_dtype):
        world.step(prefill={"a": 148}, compact=False)
        runtime, heads = world.runtime, world.num_kv_heads
        runtime.probe = AttentionProbe(spec, range(3), range(heads), 2 * heads, world.scale)
        table = torch.tensor([world.books["a"].blocks], dtype=torch.int32)
        batch = prefill_batch([148], [148], table)
        queries = world.books["a"].prompt_queries
        for layer in range(3):
            output = torch.full_like(queries[:, layer], torch.nan)
            runtime.prefill(layer, queries[:, layer], world.pool[:, layer], batch, output, [])
            assert not output.isnan().any()
        found.append((runtime.probe.measurement(), output))
    (of_fp8, output), (of_fp32, expected) = found
    assert (of_fp8.masks == of_fp32.masks).all()
    torch.testing.assert_close(torch.tensor(of_fp8.masses), torch.tensor(of_fp32.masses))
    torch.testing.assert_close(output, expected)


def prefill_batch(num_new: list[int], num_tokens: list[int], table: torch.Tensor) -> PrefillBatch:
    starts = [0, *torch.tensor(num_new).cumsum(0).tolist()]
    return PrefillBatch(
        first_token=0,
        starts=starts,
        num_tokens=num_tokens,
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(num_tokens, dtype=torch.int32),
        block_table=table,
    )


class FakeKernels:
    """vLLM's CUDA kernels in plain torch, with the arguments that vLLM's own backend gives."""

    def __init__(self) -> None:
        self.group_shapes: list[tuple[int, int]] = []

    def quantize(self, numbers, scale, *, group_shape):
        self.group_shapes.append(group_shape)
        num_groups = 1 if group_shape[1] == -1 else numbers.shape[1] // group_shape[1]
        assert group_shape[0] == -1 and scale.shape == (num_groups,)
        columns = scale.repeat_interleave(numbers.shape[1] // num_groups)
        return (numbers.float() / columns).to(torch.float8_e4m3fn), scale

    def attend(self, *, q, k, v, out, cu_seqlens_q, seqused_k, block_table, **more):
        assert q.dtype == k.dtype == v.dtype == torch.float8_e4m3fn
        assert more["causal"] and more["fa_version"] == 3
        _, page_size, num_kv_heads, head_dim = k.shape
        for row, num_tokens in enumerate(seqused_k.tolist()):
            new = slice(*cu_seqlens_q[row : row + 2].tolist())
            blocks = block_table[row, : -(-num_tokens // page_size)].long()
            descales = [more[f"{name}_descale"][row] for name in "qkv"]
            assert all(one.shape == (num_kv_heads,) for one in descales)
            of_q, of_k, of_v = descales
            keys, values = (
                (one[blocks].float().flatten(0, 1)[:num_tokens] * scale[:, None]).transpose(0, 1)
                for one, scale in ((k, of_k), (v, of_v))
            )
            grouped = q[new].float().view(-1, num_kv_heads, q.shape[1] // num_kv_heads, head_dim)
            query = (grouped * of_q[:, None, None]).flatten(1, 2)
            out[new] = prefill_attention_ref(query, keys, values, more["softmax_scale"])

    def write(self, key, value, keys, values, token_slots, dtype, key_scale, value_scale):
        assert dtype == "fp8_e4m3" and keys.dtype == values.dtype == torch.uint8
        for numbers, cache, scale in ((key, keys, key_scale), (value, values, value_scale)):
            elements = (numbers / scale.view(-1, 1)).to(torch.float8_e4m3fn).view(torch.uint8)
            cache[token_slots // PAGE, token_slots % PAGE] = elements


@pytest.mark.parametrize("scales_a_layer", [1, 2], ids=["one scale", "one a KV head"])
def test_on_cuda_prefill_and_cache_write_call_what_stock_vllm_calls(scales_a_layer, monkeypatch):
    kernels = FakeKernels()
    monkeypatch.setattr(compat, "scaled_fp8_quant", kernels.quantize, raising=False)
    monkeypatch.setattr(compat, "flash_attn_varlen_func", kernels.attend, raising=False)
    monkeypatch.setattr(compat, "reshape_and_cache_flash", kernels.write, raising=False)
    monkeypatch.setattr(compat, "get_flash_attn_version", lambda **_: 3, raising=False)

    def make_ops(geometry, memory):
        sizes = geometry.max_rows, 1, 2, geometry.group, geometry.head_dim
        scales = memory.kv_scales
        memory.kv_scales.query.fill_(0.01)
        narrowed = KVScales(scales.key, scales.value, scales.query[:, :scales_a_layer])
        object.__setattr__(memory, "kv_scales", narrowed)
        return TritonOps(geometry, memory, DecodeWorkspace.allocate(*sizes, CPU, 1))

    world = World(PAIR, page_dtype=torch.float8_e4m3fn, make_ops=make_ops, head_dim=64)
    ops, num_tokens = world.runtime.ops, [40, 7]
    blocks = torch.tensor([[9, 3, 5], [2, 10**6, 10**6]], dtype=torch.int32)
    token_slots = torch.tensor(
        [
            int(blocks[row, token // PAGE]) * PAGE + token % PAGE
            for row in range(2)
            for token in range(num_tokens[row])
        ]
    )
    kv = world._random_kv(47)[0]  # [H, 47, 2 * D]
    keys, values = (one.transpose(0, 1) for one in kv.chunk(2, dim=-1))
    layer = SimpleNamespace(_k_scale=world.kv_scales.key[0], _v_scale=world.kv_scales.value[0])
    cache = world.pool[:, 0]
    ops.write_kv(layer, keys, values, cache, token_slots)

    new = [17, 7]  # the first row had a chunk before
    query = world.random(24, 4, 64)
    output = torch.full_like(query, torch.nan)
    ops.prefill(0, query, cache, prefill_batch(new, num_tokens, blocks), output)
    first = prefill_attention_ref(query[:17], kv[:, :40, :64], kv[:, :40, 64:], world.scale)
    second = prefill_attention_ref(query[17:], kv[:, 40:, :64], kv[:, 40:, 64:], world.scale)
    exact = torch.cat([first, second])
    error = (output - exact).norm() / exact.norm()
    assert 0 < error < 0.06, "queries have 3 bits of fraction"
    columns = 2 * 64 if scales_a_layer > 1 else -1
    assert kernels.group_shapes == [(-1, columns)]
