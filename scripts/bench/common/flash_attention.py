"""The baseline of the kernel benchmarks: FlashAttention 3, as stock vLLM calls it."""

from __future__ import annotations

import torch

from common.cells import COLD_BYTES, PAGE, Cell, D, G, H, random_pages
from common.timing import DEVICE, expect_close, time_calls

FP8 = torch.float8_e4m3fn
FP8_ERROR = 5e-2  # weights of fp8


class FlashAttention3:
    """FA3 over paged KV; one sequence per row, each with as many query tokens."""

    def __init__(self, query, key, value, table, seq_lens, num_splits: int) -> None:
        """query: sequence after sequence; key, value: per layer [num_pages, PAGE, heads, D]; table:
        per layer [seqs, pages]. All of fp8, scaled by 1, or none."""
        from vllm.vllm_flash_attn import flash_attn_interface as fa

        self.fa, self.query, self.key, self.value = fa, query, key, value
        self.table, self.num_splits = table, num_splits
        num_seqs, num_q_heads = len(seq_lens[0]), query.shape[1]
        self.num_queries = query.shape[0] // num_seqs
        self.cu_q = torch.arange(num_seqs + 1, dtype=torch.int32, device=DEVICE) * self.num_queries
        self.seq_lens, self.max_len = seq_lens, int(max(s.max() for s in seq_lens))
        self.out = torch.empty_like(query, dtype=torch.bfloat16)
        ones = torch.ones(num_seqs, key[0].shape[2], device=DEVICE)
        scaled = ("q_descale", "k_descale", "v_descale") if query.dtype == FP8 else ()
        self.scales = dict.fromkeys(scaled, ones)
        self.metadata = [
            fa.get_scheduler_metadata(
                batch_size=num_seqs, max_seqlen_q=self.num_queries, max_seqlen_k=self.max_len,
                num_heads_q=num_q_heads, num_heads_kv=key[0].shape[2], headdim=D,
                cache_seqlens=lens, qkv_dtype=query.dtype, cu_seqlens_q=self.cu_q,
                page_size=PAGE, causal=True, num_splits=num_splits,
            )
            for lens in seq_lens
        ]  # fmt: skip

    def __call__(self, layer: int) -> torch.Tensor:
        return self.fa.flash_attn_varlen_func(
            q=self.query, k=self.key[layer], v=self.value[layer], out=self.out,
            cu_seqlens_q=self.cu_q, max_seqlen_q=self.num_queries, seqused_k=self.seq_lens[layer],
            max_seqlen_k=self.max_len, softmax_scale=D**-0.5, causal=True,
            block_table=self.table[layer], scheduler_metadata=self.metadata[layer],
            num_splits=self.num_splits, fa_version=3, **self.scales,
        )  # fmt: skip


def fa3_dense(
    num_rows: int, num_tokens: int, is_fp8: bool = False, num_queries: int = 1
) -> tuple[float, float, int]:
    """Stock vLLM's call: metadata ahead of time, at most 32 splits, or FA3's own choice.

    Args:
        is_fp8: whether the cache and the queries are.
        num_queries: of a row.

    Returns:
        us, spread of the faster one, bytes of K and V per layer.
    """
    dtype = FP8 if is_fp8 else torch.bfloat16
    num_bytes = num_rows * num_tokens * H * 2 * D * dtype.itemsize
    num_layers = min(32, max(4, -(-int(COLD_BYTES) // num_bytes)))
    num_pages = num_rows * num_tokens // PAGE
    shape = (num_pages, PAGE, H, D)
    key, value = (
        [random_pages(num_pages * H // 2).view(shape).to(dtype) for _ in range(num_layers)]
        for _ in range(2)
    )
    table = torch.randperm(num_pages, device=DEVICE, dtype=torch.int32).view(num_rows, -1)
    seq_lens = torch.full((num_rows,), num_tokens, dtype=torch.int32, device=DEVICE)
    query = torch.randn(num_rows * num_queries, H * G, D, device=DEVICE, dtype=torch.bfloat16)
    query = query.to(dtype)
    best = None
    for num_splits in (32, 0):
        call = FlashAttention3(
            query, key, value, [table] * num_layers, [seq_lens] * num_layers, num_splits
        )
        row = num_rows - 1
        k, v = (t[0][table[row].long()].flatten(0, 1).float() for t in (key, value))
        logits = torch.einsum("hgd,thd->hgt", query[-1].view(H, G, D).float(), k) * D**-0.5
        exact = torch.einsum("hgt,thd->hgd", logits.softmax(-1), v)
        actual = call(0)[-1].view(H, G, D)
        expect_close(actual, exact, "FA3 dense", *[FP8_ERROR] * is_fp8)
        result = time_calls(call, num_layers)
        print(f"  fa3 dense num_splits={num_splits}: {result[0]:.1f} us", flush=True)
        best = min(best or result, result)
    return *best, num_bytes


def fa3_per_head(cell: Cell, exact: torch.Tensor) -> tuple[float, float]:
    """Each KV head its own sequence with its own page table."""
    num_seqs, tail_blocks = cell.num_rows * H, cell.tail_blocks
    key = cell.pages[:, :, :D].unsqueeze(2)
    value = cell.pages[:, :, D:].unsqueeze(2)
    tables, lens = [], []
    for layer in range(cell.num_layers):
        start, count = (t.flatten().tolist() for t in cell.lists(layer))
        table = torch.zeros(num_seqs, max(count) + tail_blocks, dtype=torch.int32, device=DEVICE)
        heads = torch.arange(H, device=DEVICE)
        tail = (cell.rows.block_table[:, None, -tail_blocks:] * cell.num_layers + layer) * H
        tail = (tail + heads[None, :, None]).view(num_seqs, tail_blocks)
        for i, (n, first) in enumerate(zip(count, start, strict=True)):
            table[i, :n] = cell.tables.entries[first : first + n]
            table[i, n : n + tail_blocks] = tail[i]
        tables.append(table)
        lens.append((cell.lists(layer)[1].flatten() + tail_blocks) * PAGE)

    def by_head(of_queries: torch.Tensor) -> torch.Tensor:
        by_row = of_queries.view(cell.num_rows, -1, H, G, D)
        return by_row.transpose(1, 2).reshape(-1, G, D)

    query, exact = by_head(cell.query).to(cell.pages.dtype), by_head(exact)
    errors = [] if cell.kv_scales is None else [FP8_ERROR]
    best = None
    for num_splits in (32, 0):
        call = FlashAttention3(
            query, [key] * cell.num_layers, [value] * cell.num_layers, tables, lens, num_splits
        )
        expect_close(call(0), exact, "FA3 per head", *errors)
        result = time_calls(call, cell.num_layers)
        best = min(best or result, result)
    return best
