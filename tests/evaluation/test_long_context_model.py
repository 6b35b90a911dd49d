"""The 128K test model: its adapter, and the training that made it, in a tiny form."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from build_smollm2_128k import SCALE, long_context, merge, read_adapter

NUM_LAYERS, NUM_PROJECTIONS, RANK = 30, 7, 32


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    path = tmp_path_factory.mktemp("prose") / "prose.u16"
    np.random.default_rng(0).integers(2000, 30000, 150_000).astype(np.uint16).tofile(path)
    return path


def test_the_adapter_has_both_factors_of_every_projection():
    adapter = read_adapter()
    assert len(adapter) == NUM_LAYERS * NUM_PROJECTIONS * 2
    for name, factor in adapter.items():
        assert factor.dtype == torch.bfloat16
        assert factor.shape[0 if "lora_A" in name else 1] == RANK


def test_factors_are_added_to_the_weight_that_they_are_of():
    weights = {"q.weight": torch.zeros(3, 2), "k.weight": torch.ones(3, 2)}
    a, b = torch.randn(1, 2), torch.randn(3, 1)
    merge(weights, {"q.lora_A.weight": a, "q.lora_B.weight": b})
    torch.testing.assert_close(weights["q.weight"], SCALE * (b @ a))
    assert torch.equal(weights["k.weight"], torch.ones(3, 2))


@pytest.mark.parametrize("has_parameters", [False, True])
def test_only_length_and_rope_base_change(has_parameters):
    rope = {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}
    settings = {"max_position_embeddings": 8192} | (rope if has_parameters else {"rope_theta": 1e5})
    changed = long_context(settings)
    assert changed["max_position_embeddings"] == 131072
    assert (changed["rope_parameters"] if has_parameters else changed)["rope_theta"] == 8e6
    assert settings["max_position_embeddings"] == 8192


@pytest.mark.parametrize("is_listing", [False, True])
def test_a_sample_asks_for_every_fact_that_it_tells(small_model, prose, is_listing):
    from recall_samples import Sampler
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model)
    sampler = Sampler(tokenizer, np.fromfile(prose, dtype=np.uint16))
    sample = sampler.sample(
        random.Random(5), 4096, num_facts=8, form=0, hay="noise", is_listing=is_listing
    )
    assert len(sample.tokens) == len(sample.weights) == 4096
    text = tokenizer.decode(sample.tokens)
    told = text.count(" is: ")
    assert told == 8 * 2
    values = [t for t, w in zip(sample.tokens, sample.weights, strict=True) if w == 1.0]
    answers = tokenizer.decode(values).split()
    assert len(answers) == 8 and all(text.count(f"is: {answer}") == 2 for answer in answers)


@pytest.mark.slow
def test_two_steps_of_training_give_an_adapter_to_merge_and_to_resume(small_model, prose, tmp_path):
    from train_long_context import main

    common = [small_model, str(prose), "--tiny", "--evaluate"]
    losses = main([*common[:2], str(tmp_path / "a"), *common[2:], "4096", "--steps", "2"])
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    adapter = read_adapter(tmp_path / "a" / "smollm2-128k-lora.safetensors.xz")
    assert len(adapter) == 2 * NUM_PROJECTIONS * 2
    assert all(factor.abs().max() > 0 for factor in adapter.values())
    resumed = [*common, "--steps", "1", "--resume", str(tmp_path / "a")]
    main([*resumed[:2], str(tmp_path / "b"), *resumed[2:]])
    again = read_adapter(tmp_path / "b" / "smollm2-128k-lora.safetensors.xz")
    change = max(float((again[n].float() - adapter[n].float()).abs().max()) for n in adapter)
    assert 0 < change < 1e-2
