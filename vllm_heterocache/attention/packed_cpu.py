"""Attention on the CPU of layers that HeteroCache does not serve (those that slide over a window,
and a drafter's): vLLM's, over blocks of the packed pool."""

from __future__ import annotations

from vllm_heterocache.attention.packed import PackedBackend
from vllm_heterocache.compat import CPUAttentionBackend


class PackedCPUAttentionBackend(PackedBackend, CPUAttentionBackend):
    """vLLM's attention on the CPU, whose kernels take blocks at any stride.

    vLLM admits its own layout and blocks of 32 tokens alone. On CUDA, FlashAttention admits the
    packed layout by itself.
    """
