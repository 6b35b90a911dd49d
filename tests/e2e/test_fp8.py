"""An fp8 KV cache: the tokens of stock vLLM whose keys and values were rounded before it cached
them. (Stock's own fp8 cache needs AVX-512 on a CPU.)"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engines import ON_GPU, run_greedy, start

from vllm_heterocache.kernels.kv_scales import to_elements

pytestmark = pytest.mark.skipif(ON_GPU, reason="stock's CPU attention is made to round")

LAYERS, HEADS = 30, 3
FP8_KV = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
SIZES = {"max_model_len": 1024, "max_num_batched_tokens": 512}
# A sum in another order rounds an element to its neighbour now and then, and what a layer is given
# changes all elements of the next. So engines with the same cache differ by a share of what fp8
# changes at all: log-probabilities here by up to 0.16, and by 0.43 from those without fp8.
LOGPROB_ERROR = 0.25


def scales_of(strategy: str | None) -> torch.Tensor:
    """[2, LAYERS, HEADS], of keys and of values; 1 without a checkpoint that has others."""
    generator = torch.Generator().manual_seed(11)
    exponents = torch.randint(-4, 1, (2, LAYERS, HEADS), generator=generator)
    if strategy is None:
        exponents.zero_()
    if strategy == "tensor":
        exponents = exponents[..., :1].expand_as(exponents)
    return exponents.float().exp2()


@pytest.fixture
def with_scales(small_model, tmp_path):
    """`make(strategy)` is a checkpoint of the small model that asks for an fp8 KV cache."""
    from safetensors.torch import save_file

    def make(strategy: str) -> str:
        for file in Path(small_model).iterdir():
            if file.name != "config.json":
                (tmp_path / file.name).symlink_to(file)
        config = json.loads((Path(small_model) / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "config_groups": {},
            "ignore": ["lm_head"],
            "kv_cache_scheme": {**FP8_KV, "strategy": strategy},
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        width = HEADS if strategy == "attn_head" else 1
        weights = {
            f"model.layers.{layer}.self_attn.{name}_scale": scales[layer, :width].clone()
            for name, scales in zip("kv", scales_of(strategy), strict=True)
            for layer in range(LAYERS)
        }
        save_file(weights, tmp_path / "scales.safetensors")
        return str(tmp_path)

    return make


@contextlib.contextmanager
def rounding_stock(scales: torch.Tensor, dtype: torch.dtype) -> Iterator[None]:
    """Let stock's CPU attention round keys and values to the elements of an fp8 cache."""
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    write = CPUAttentionBackendImpl.do_kv_cache_update

    def rounded(numbers: torch.Tensor, of_heads: torch.Tensor) -> torch.Tensor:
        elements = to_elements(numbers, of_heads, dtype).float()
        return (elements * of_heads[:, None]).to(numbers.dtype)

    def write_rounded(self, layer, key, value, kv_cache, slot_mapping) -> None:
        of_keys, of_values = scales[:, extract_layer_index(layer.layer_name)]
        key, value = rounded(key, of_keys), rounded(value, of_values)
        write(self, layer, key, value, kv_cache, slot_mapping)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPUAttentionBackendImpl, "do_kv_cache_update", write_rounded)
        yield


@pytest.fixture(scope="module")
def prompts(small_model) -> list[list[int]]:
    from transformers import AutoTokenizer

    import vllm_heterocache

    text = (Path(vllm_heterocache.__file__).parent / "data" / "calibration.txt").read_text()
    ids = AutoTokenizer.from_pretrained(small_model)(text)["input_ids"]
    return [ids[700 * i : 700 * i + n] for i, n in enumerate((40, 130, 257, 530))]


DECLARED = pytest.mark.feature("fp8 KV cache that a checkpoint declares")


@pytest.mark.feature("Log-probabilities of output tokens")
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(None, marks=pytest.mark.feature("fp8 KV cache, e4m3")),
        pytest.param("tensor", marks=DECLARED),
        pytest.param("attn_head", marks=DECLARED),
    ],
)
def test_greedy_tokens_are_those_of_stock_over_rounded_keys_and_values(
    strategy, small_model, with_scales, prompts
):
    """The option names fp8, or the checkpoint does."""
    model, kwargs = small_model, {"kv_cache_dtype": "fp8"}
    if strategy is not None:
        model, kwargs = with_scales(strategy), {}
    scales = scales_of(strategy)
    with rounding_stock(scales, torch.float8_e4m3fn), start(small_model, **SIZES) as engine:
        stock = run_greedy(engine, prompts)
    with start(model, {"gpu_budget": 1.0, "min_prompt_tokens": 64}, **SIZES, **kwargs) as engine:
        memory = engine.runtime.ops.memory
        assert memory.pool.dtype == torch.float8_e4m3fn
        assert torch.equal(torch.stack(memory.kv_scales[:2]), scales)
        kv_bytes, _ = engine.llm.collective_rpc("heterocache_block_bytes")[0]
        assert kv_bytes == LAYERS * HEADS * 16 * 2 * 64
        ours = run_greedy(engine, prompts)
        metrics = engine.metrics()
    assert metrics["decode_rows{kind=compact,reason=compacted}"] > 0
    num_compared = 0
    for mine, theirs in zip(ours, stock, strict=True):
        for position, (token, expected) in enumerate(
            zip(mine.token_ids, theirs.token_ids, strict=True)
        ):
            logprobs = theirs.logprobs[position]
            if token != expected:
                best, second = sorted((e.logprob for e in logprobs.values()), reverse=True)[:2]
                assert best - second <= 2 * LOGPROB_ERROR, (position, best - second)
                break
            difference = mine.logprobs[position][token].logprob - logprobs[token].logprob
            assert abs(difference) < LOGPROB_ERROR, position
            num_compared += 1
    assert num_compared > 40, os.linesep.join(str(o.token_ids) for o in (*ours, *stock))


@pytest.mark.feature("fp8 KV cache, e5m2")
def test_a_compressed_fp8_cache_keeps_its_books(small_model, prompts):
    options = {"gpu_budget": 0.5, "min_prompt_tokens": 64, "policy": "snapkv"}
    with start(small_model, options, **SIZES, kv_cache_dtype="fp8_e5m2") as engine:
        outputs = run_greedy(engine, prompts)  # every step checks integrity
        assert engine.runtime.ops.memory.pool.dtype == torch.float8_e5m2
        # the window of the last queries alone fills the budget of two
        assert engine.metrics()["requests_compacted{}"] == 2
    assert all(len(output.token_ids) == 24 for output in outputs)
