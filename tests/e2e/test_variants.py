"""One engine for several rows: an adapter, in float16, over a model whose windows are switched off.

Stock serves the same weights as a Llama, which has no windows. The model is tiny and random,
because a CPU without instructions for float16 takes forty times as long as in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import assert_same_greedy_tokens, start

from common import profiles

WINDOW = 1000
LENGTHS = (40, 150, 333)
NUM_TOKENS = 20
SHARPNESS = 8.0  # of the next token's distribution, so that rounding does not decide
NEAR_TIE = 0.1
RANK = 8
SETTINGS = {
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "skip_tokenizer_init": True,
    "dtype": "float16",
    "enable_lora": True,
    "max_lora_rank": RANK,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """Folder of the model."""
    folder = tmp_path_factory.mktemp("llama")
    profiles.write_weights(profiles.TINY, folder, {"lm_head": SHARPNESS})
    return str(folder)


@pytest.fixture(scope="module")
def mistral(llama, tmp_path_factory) -> str:
    """The same weights as a Mistral, whose layers all slide over a window."""
    folder = tmp_path_factory.mktemp("mistral")
    (folder / "model.safetensors").symlink_to(Path(llama) / "model.safetensors")
    config = json.loads((Path(llama) / "config.json").read_text())
    config |= {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": WINDOW,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def adapter(llama, tmp_path_factory) -> str:
    """A LoRA adapter of random numbers for all projections of attention, in PEFT's format."""
    from safetensors.torch import save_file

    shape = profiles.TINY
    queries, keys = (shape.head_dim * n for n in (shape.num_q_heads, shape.num_kv_heads))
    sizes = {
        "q_proj": (shape.hidden_size, queries),
        "k_proj": (shape.hidden_size, keys),
        "v_proj": (shape.hidden_size, keys),
        "o_proj": (queries, shape.hidden_size),
    }
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for layer in range(shape.num_layers):
        for name, (width_in, width_out) in sizes.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            first = torch.randn(RANK, width_in, generator=generator) / width_in**0.5
            second = torch.randn(width_out, RANK, generator=generator) / RANK**0.5
            weights |= {f"{place}.lora_A.weight": first, f"{place}.lora_B.weight": second}
    folder = tmp_path_factory.mktemp("adapter")
    save_file(weights, folder / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": llama,
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": sorted(sizes),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return str(folder)


def answers(model: str, adapter: str, options: dict[str, Any] | None, **kwargs: Any) -> tuple:
    """Greedy completions of all prompts at once, without the adapter and with it; the metrics, and
    what an engine says of itself."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, profiles.TINY.vocab_size, n).tolist() for n in LENGTHS]
    adapters = [None] * len(prompts) + [LoRARequest("adapter", 1, adapter)] * len(prompts)
    params = SamplingParams(
        temperature=0.0, max_tokens=NUM_TOKENS, logprobs=2, ignore_eos=True, detokenize=False
    )
    with start(model, options, **SETTINGS, **kwargs) as engine:
        outputs = engine.run(2 * prompts, params, adapters=adapters)
        completions = [outputs[str(i)].outputs[0] for i in range(len(adapters))]
        if options is None:
            return completions, {}
        assert engine.llm.llm_engine.model_config.max_model_len == WINDOW
        assert engine.runtime.ops.memory.pool.dtype == torch.float16
        return completions, engine.metrics()


@pytest.mark.feature("LoRA adapters", "float16", "Sliding windows, switched off")
def test_greedy_tokens_are_those_of_stock(llama, mistral, adapter):
    """The prefix of a prompt with the adapter is another one than without."""
    stock, _ = answers(llama, adapter, None, max_model_len=WINDOW)
    options = {"gpu_budget": 1.0, "min_prompt_tokens": 64}
    ours, metrics = answers(mistral, adapter, options, disable_sliding_window=True)
    compared = [
        assert_same_greedy_tokens(mine.token_ids, theirs, NEAR_TIE)
        for mine, theirs in zip(ours, stock, strict=True)
    ]
    assert sum(compared) > 0.8 * NUM_TOKENS * len(ours), compared
    without, adapted = ours[: len(LENGTHS)], ours[len(LENGTHS) :]
    for plain, other in zip(without, adapted, strict=True):
        assert plain.token_ids != other.token_ids
    num_compacted = 2 * sum(length >= 64 for length in LENGTHS)
    assert metrics["requests_compacted{}"] == num_compacted
    rows = num_compacted * (NUM_TOKENS - 1)
    assert metrics["decode_rows{kind=compact,reason=compacted}"] == rows
