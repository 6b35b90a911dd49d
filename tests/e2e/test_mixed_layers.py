"""Models some layers of which vLLM serves: calibrated, with an adapter, on two ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import adapters
import churn
import engines
import hybrid_model
import numpy as np
import parallel
import pytest
import sliding_model
import torch
from mixed_model import (
    FULL,
    NUM_KV_HEADS,
    NUM_TOKENS,
    OTHER_GROUPS,
    SETTINGS,
    completions,
    options,
    prompts,
    run,
)

from vllm_heterocache.calibration.calibrate import calibrate, read_text
from vllm_heterocache.calibration.prompts import CalibrationSizes, ProbePrompt, PromptBuilder
from vllm_heterocache.heads.budget import compact_blocks

ADAPTED = {"enable_lora": True, "max_lora_rank": adapters.RANK}
BUDGET = 0.5  # of the four heads of a rank
TWO_RANKS = {"tensor_parallel_size": parallel.RANKS}
NEAR_TIE = 0.25  # in bfloat16
RECURRENT = SETTINGS | {"dtype": "bfloat16", "mamba_ssm_cache_dtype": "float32"}
# kind -> writer, settings, ranks of stock vLLM: in float32 the sums of two are those of one
KINDS = {
    "sliding": (sliding_model.write, SETTINGS | {"dtype": "float32"}, 1),
    "recurrent": (hybrid_model.delta_net, RECURRENT, parallel.RANKS),
}


class Mixed(NamedTuple):
    model: str
    settings: dict[str, Any]
    ranks_of_stock: int


@pytest.fixture(scope="module", params=KINDS)
def mixed(request, tmp_path_factory) -> Mixed:
    write, *others = KINDS[request.param]
    return Mixed(write(tmp_path_factory.mktemp(request.param)), *others)


@pytest.mark.feature("LoRA adapters beside other layers", "Tensor parallelism beside other layers")
def test_two_ranks_with_an_adapter_give_the_tokens_of_stock(mixed, tmp_path, cpu_ranks):
    """Without the adapter, then with it: of a batch with both, vLLM takes adapters of other rows
    where layers are recurrent."""
    adapter = adapters.write(tmp_path, mixed.model)
    settings = mixed.settings | ADAPTED

    def answers(engine: engines.Engine) -> list[list[Any]]:
        return [completions(run(engine, prompts(), [one] * 3)) for one in (None, adapter)]

    ranks = {"tensor_parallel_size": mixed.ranks_of_stock}
    with engines.start(mixed.model, None, **settings, **ranks) as engine:
        stock = answers(engine)
    with engines.start(mixed.model, options(mixed.model, 1.0), **settings, **TWO_RANKS) as engine:
        plain, adapted = answers(engine)
        metrics = engine.metrics()
    engines.assert_same_completions(plain, stock[0], NEAR_TIE)
    engines.assert_same_completions(adapted, stock[1], NEAR_TIE)
    for one, other in zip(plain, adapted, strict=True):
        assert one.token_ids != other.token_ids
    assert metrics["requests_compacted{}"] == 2 * 2
    assert metrics[churn.COMPACT] == 2 * 2 * (NUM_TOKENS - 1)


@pytest.mark.feature("Calibration beside other layers", "Tensor parallelism beside other layers")
def test_calibration_measures_the_full_layers_and_two_ranks_serve_its_profile(
    mixed, tmp_path, cpu_ranks
):
    """Attention on hidden values is that of transformers."""
    tokenizer = write_tokenizer(mixed.model)
    left_out = ("skip_tokenizer_init", "max_model_len", "max_num_batched_tokens", "max_num_seqs")
    arguments = {name: mixed.settings[name] for name in mixed.settings if name not in left_out}
    profile = calibrate(mixed.model, samples=1, llm_kwargs=arguments, progress=False)
    needles = PromptBuilder(tokenizer, read_text(None), CalibrationSizes.of_samples(1), 0).build()
    expected = attention_on_values(mixed.model, needles[1:])
    assert profile.model.layers == FULL
    assert np.abs(expected[0] / expected[1] - 1).max() > 0.05, "layers must be told apart"
    np.testing.assert_allclose(profile.retrieval, expected, rtol=0.01)
    profile.save(tmp_path / "profile.json")
    longest = prompts()[-1]
    calibrated = options(mixed.model, BUDGET) | {"profile": str(tmp_path / "profile.json")}
    with engines.start(mixed.model, calibrated, **mixed.settings, **TWO_RANKS) as engine:
        total, block = engine.num_free, engine.manager.block_size
        run(engine, [longest])
        held = total - engine.free_blocks[-2]
        assert engine.num_free == total
        assert engine.metrics()["requests_compacted{}"] == 1
        heads = engine.llm.collective_rpc("heterocache_head_roles")
    kept = -(-compact_blocks(len(longest), BUDGET) * 16 // block)
    assert kept < held < -(-len(longest) // block) + OTHER_GROUPS
    assert [(layers, of_rank) for layers, of_rank, _ in heads] == [
        (list(FULL), [0, 1]),
        (list(FULL), [2, 3]),
    ]


def write_tokenizer(folder: str) -> Any:
    """Every byte is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.save_pretrained(folder)
    return fast


def attention_on_values(model: str, needles: list[ProbePrompt]) -> np.ndarray:
    """[len(FULL), NUM_KV_HEADS]: the mean over rows of the most that a query head of the KV head
    sees of the value."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    weights: list[torch.Tensor] = []
    for layer in FULL:
        reference.model.layers[layer].self_attn.register_forward_hook(
            lambda module, args, output: weights.append(output[1][0])
        )
    masses = []
    for needle in needles:
        weights.clear()
        with torch.no_grad():
            reference(torch.tensor([needle.token_ids]))
        for row, first, stop in needle.spec["targets"]:
            of_heads = torch.stack([layer[:, row, first:stop].sum(-1) for layer in weights])
            masses.append(of_heads.view(len(FULL), NUM_KV_HEADS, -1).amax(-1))
    return torch.stack(masses).mean(0).numpy()
