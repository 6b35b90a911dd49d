"""A dense prompt in a pool that holds NaN in everything that page scores may not read."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_heterocache.kernels.kv_scales import KVScales

PAGE = 16
OUT_OF_RANGE = 10**9  # a block id far outside the pool: reading it is a fault


class DensePrompt(NamedTuple):
    last_query: torch.Tensor  # [L, H * G, D]
    pages: torch.Tensor  # [num_pages, PAGE, 2 * D]
    dense_blocks: torch.Tensor  # [>= ceil(T / PAGE)] int32
    keys: torch.Tensor  # [L, H, T, D], what the elements stand for
    kv_scales: KVScales | None


def make_dense_prompt(
    num_tokens: int,
    num_layers: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    page_dtype: torch.dtype | None = None,
) -> DensePrompt:
    """Normal queries and keys, in blocks in no order. Pages have the query's dtype, or an fp8
    `page_dtype` and scales from 1/4 to 2."""
    device = generator.device

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    num_prompt_pages = -(-num_tokens // PAGE)
    num_blocks = num_prompt_pages + 3
    keys = randn(num_layers, num_kv_heads, num_tokens, head_dim).to(page_dtype or dtype)
    pool = torch.full(
        (num_blocks, num_layers, num_kv_heads, PAGE, 2 * head_dim), torch.nan, device=device
    ).to(page_dtype or dtype)
    blocks = torch.randperm(num_blocks, generator=generator, device=device)[:num_prompt_pages]
    tokens = torch.arange(num_tokens, device=device)
    # [T, L, H, D]: the keys of each token, page by page
    pool[blocks[tokens // PAGE], :, :, tokens % PAGE, :head_dim] = keys.permute(2, 0, 1, 3)
    beyond = torch.full((2,), OUT_OF_RANGE, device=device)
    last_query = randn(num_layers, num_kv_heads * group, head_dim).to(dtype)
    kv_scales = None
    if page_dtype is not None:
        shape = (3, num_layers, num_kv_heads)
        exponents = 3 * torch.rand(shape, generator=generator, device=device) - 2
        kv_scales = KVScales(*exponents.exp2())
        keys = keys.float() * kv_scales.key[..., None, None]
    return DensePrompt(
        last_query,
        pool.view(-1, PAGE, 2 * head_dim),
        torch.cat([blocks, beyond]).int(),
        keys,
        kv_scales,
    )
