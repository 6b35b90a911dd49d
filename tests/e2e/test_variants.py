"""One engine for several rows: an adapter, in float16, over a model whose windows are switched off.

Stock serves the same weights as a Llama, which has no windows. The model is tiny, because a CPU
without instructions for float16 takes forty times as long as in float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import adapters
import pytest
import tiny_llama
import torch
from engines import assert_same_completions
from tiny_llama import MAX_MODEL_LEN, NEAR_TIE

SETTINGS = {"dtype": "float16", "enable_lora": True, "max_lora_rank": adapters.RANK}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """Folder of the model."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama.write(folder)
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
        "sliding_window": MAX_MODEL_LEN,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def adapter(llama, tmp_path_factory):
    return adapters.write(tmp_path_factory.mktemp("adapter"), llama)


def check(engine) -> None:
    assert engine.llm.llm_engine.model_config.max_model_len == MAX_MODEL_LEN
    assert engine.runtime.ops.memory.pool.dtype == torch.float16


@pytest.mark.feature("LoRA adapters", "float16", "Sliding windows, switched off")
def test_greedy_tokens_are_those_of_stock(llama, mistral, adapter):
    """The prefix of a prompt with the adapter is another one than without."""
    prompts = tiny_llama.text_prompts()
    of_prompts = [None] * len(prompts) + [adapter] * len(prompts)
    stock = tiny_llama.stock_completions(llama, 2 * prompts, of_prompts, **SETTINGS)
    ours = tiny_llama.compacted_completions(
        mistral,
        2 * prompts,
        check,
        of_prompts,
        **SETTINGS,
        max_model_len=None,
        disable_sliding_window=True,
    )
    assert_same_completions(ours, stock, NEAR_TIE)
    for plain, adapted in zip(ours[: len(prompts)], ours[len(prompts) :], strict=True):
        assert plain.token_ids != adapted.token_ids
