"""A model that sees images: a tiny Llava of random numbers, whose decoder is a Llama."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_llama
import torch
from engines import Engine, assert_same_completions
from safetensors.torch import load_file, save_file
from tiny_llama import SHAPE

WORDS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
IMAGE_TOKEN = WORDS.index("<image>")
IMAGE_SIZE, PATCH_SIZE = 28, 14  # pixels of a side; vLLM puts 4 patches in the image token's place
SETTINGS = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 1}}
# Of weights: with less, neither attention nor an image decides tokens
SPREAD = 0.1


def _write_weights(folder: Path) -> None:
    """Weights and config.json."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    config = LlavaConfig(
        text_config=LlamaConfig(**SHAPE.config()),
        vision_config=vision,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() == 2 and "vision_tower" not in name:
                weights.normal_(std=SPREAD)
        model.lm_head.weight.mul_(tiny_llama.SHARPNESS)
    model.save_pretrained(folder)
    _name_as_published(folder / "model.safetensors")


def _name_as_published(file: Path) -> None:
    """Newer versions of transformers leave out a part of the names of CLIP's weights."""
    weights = load_file(file)
    tower = "vision_tower."
    names = {
        name: name.replace(tower, f"{tower}vision_model.")
        for name in weights
        if tower in name and f"{tower}vision_model." not in name
    }
    save_file({names.get(name, name): one for name, one in weights.items()}, file, {"format": "pt"})


def _write_processor(folder: Path) -> None:
    """A tokenizer of a word for each token id, and what makes pixels of images."""
    import tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = [*WORDS, *(f"w{i}" for i in range(len(WORDS), SHAPE.vocab_size))]
    ids = {word: i for i, word in enumerate(words)}
    words_alone = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    words_alone.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_alone,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    pixels = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


@pytest.fixture
def llava(tmp_path) -> str:
    """Folder of the model."""
    _write_weights(tmp_path)
    _write_processor(tmp_path)
    return str(tmp_path)


@pytest.fixture
def prompts() -> list:
    """One text behind two images, and a text alone."""
    from PIL import Image

    rng = np.random.default_rng(1)
    text = rng.integers(len(WORDS), SHAPE.vocab_size, 300).tolist()
    pixels = rng.integers(0, 256, (2, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    with_images = [
        {
            "prompt_token_ids": [*text[:50], IMAGE_TOKEN, *text[50:100]],
            "multi_modal_data": {"image": Image.fromarray(one)},
        }
        for one in pixels
    ]
    return [*with_images, text[100:]]


@pytest.mark.feature("Multimodal models with a causal text decoder")
def test_greedy_tokens_are_those_of_stock(llava, prompts):
    def check(engine: Engine) -> None:
        assert engine.llm.llm_engine.model_config.is_multimodal_model

    stock = tiny_llama.stock_completions(llava, prompts, **SETTINGS)
    ours = tiny_llama.compacted_completions(llava, prompts, check, **SETTINGS)
    assert_same_completions(ours, stock)
    assert ours[0].token_ids != ours[1].token_ids  # the image alone is another one
