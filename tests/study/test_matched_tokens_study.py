"""The simulation of what evicted tokens leave behind, on a tiny model with random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compact_heads import Compactor, Method, Prompt, whole_caches
from matched_tokens import Text, chain_text, compare, simulate, table
from simulated_model import SimulatedModel
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.heads.budget import compact_blocks
from vllm_heterocache.heads.profile import HeadProfile, ModelIdentity

LAYERS, HEADS, LENGTH, FOLLOWING = 3, 2, 400, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A Llama of 3 layers, 4 query and 2 KV heads of 16, whose attention is not quite even."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        head_dim=16,
        vocab_size=199,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model(folder) -> SimulatedModel:
    return SimulatedModel(folder, "cpu", torch.float32)


@pytest.fixture(scope="module")
def profile() -> HeadProfile:
    identity = ModelIdentity("tiny", "LlamaForCausalLM", LAYERS, 4, HEADS, 16)
    scores = np.linspace(0.1, 1, LAYERS * HEADS, dtype=np.float32).reshape(LAYERS, HEADS)
    return HeadProfile(identity, {}, {}, retrieval=scores)


@pytest.fixture(scope="module")
def text() -> Text:
    tokens = torch.randint(199, (LENGTH + FOLLOWING,), generator=torch.Generator().manual_seed(3))
    ids = tokens.tolist()
    return Text("prose", 0, ids[:LENGTH], ids[LENGTH:], {})


def test_a_whole_cache_gives_the_log_probabilities_of_the_model(folder, model, profile, text):
    plain = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        logits = plain(torch.tensor([text.prompt + text.tokens])).logits[0, LENGTH:]
    prompt = Prompt(model, model.prefill(text.prompt), seed=0)
    mine = model.follow(text.tokens, LENGTH, whole_caches(prompt))
    torch.testing.assert_close(mine, logits.log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_a_budget_of_all_pages_changes_nothing(model, profile, text):
    methods = [Method(kind) for kind in ("pages", "means", "matched")]
    rows = list(simulate(model, profile, [text], [1.0], methods))
    assert [row["config"]["method"] for row in rows] == ["full", "pages", "means", "matched"]
    for row in rows:
        assert row["kl"] == pytest.approx(0, abs=1e-6)
        assert row["top1"] == 1


def test_matched_tokens_beat_pages_alone_and_means(model, profile, text):
    methods = [Method("pages"), Method("means"), Method("matched")]
    _, pages, means, matched = (
        row["kl"] for row in simulate(model, profile, [text], [0.5], methods)
    )
    assert matched < 0.5 * pages
    assert matched < means


@pytest.mark.parametrize("kind", ["pages", "means", "matched"])
@pytest.mark.parametrize("budget", [0.5, 0.7])
def test_methods_keep_as_many_tokens(model, profile, text, kind, budget):
    prompt = Prompt(model, model.prefill(text.prompt), seed=0)
    compactor = Compactor.of(profile, budget)
    sizes = {
        method: [len(cache.bias) for row in compactor.compact(prompt, method) for cache in row]
        for method in (Method("pages"), Method(kind))
    }
    assert sizes[Method(kind)] == sizes[Method("pages")]
    num_tokens = compact_blocks(LENGTH, budget) * PAGE_SIZE * LAYERS * HEADS
    assert sum(sizes[Method(kind)]) == num_tokens


def test_a_budget_below_the_floor_is_left_out(model, profile, text, capsys):
    rows = list(simulate(model, profile, [text], [0.2], [Method("pages")]))
    assert [row["config"]["method"] for row in rows] == ["full"]
    assert "raise gpu_budget" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    ["behind=0", "means=0.3", "behind=1000", "sample=even", "sample=random", "iterations=30",
     "stored=bfloat16", "positions=20", "pages=reference", "first_layer=0.4", "share=0.3"],
)  # fmt: skip
def test_every_setting_of_matched_tokens_is_near_the_default(model, profile, text, settings):
    method = Method.parse(f"matched,{settings}")
    rows = simulate(model, profile, [text], [0.5], [Method("pages"), method])
    _, pages, matched = (row["kl"] for row in rows)
    assert matched < pages


def test_queries_moved_by_rotation_are_those_of_the_other_position(model):
    vectors = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(1))
    start, end = torch.tensor([0, 3, 9, 40, 7]), torch.tensor([9, 0, 300, 41, 7])
    there = model.rotated(vectors, end)
    moved = model.rotated(model.rotated(vectors, start), end - start)
    torch.testing.assert_close(moved, there, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model.rotated(vectors, start), there, atol=1e-2)


def test_the_table_has_means_of_texts_and_sums_of_questions():
    same = {"tokens": 100, "config": {"gpu_budget": 0.1, "method": "pages"}}
    rows = [
        same | {"kl": 0.1, "kl_of_last": 0.0, "top1": 0.5},
        same | {"kl": 0.3, "kl_of_last": 1.0, "top1": 1.0},
    ]
    rows += [same | {"right": 2, "asked": 3}, same | {"right": 1, "asked": 3}]
    assert table(rows) == [[100, 0.1, "pages", 2, 0.2, 0.5, 0.75, 3, 6]]


def test_methods_are_read_as_they_are_written():
    method = Method("matched", share=0.25, sample="random")
    assert str(method) == "matched,share=0.25,sample=random"
    assert Method.parse(str(method)) == method
    with pytest.raises(ValueError, match="'sahre' is none of kind, share"):
        Method.parse("matched,sahre=1")
    with pytest.raises(ValueError, match="sample is one of random, even, last"):
        Method.parse("matched,sample=first")


class _Letters:
    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(letter) % 199 for letter in text]


def test_an_answer_counts_if_each_of_its_tokens_is_the_likeliest():
    text = chain_text(_Letters(), 3000, 0, "register", 4)
    assert len(text.answers) == 3  # without the first question's
    right = torch.nn.functional.one_hot(torch.tensor(text.tokens), 199).float()
    greedy = right.roll(-1, 0)
    assert compare(text, greedy, greedy) == {"right": 3, "asked": 3}
    start, answer = next(iter(text.answers.items()))
    wrong = greedy.clone()
    wrong[start + len(answer) - 2] = right[0].roll(1)
    assert compare(text, greedy, wrong) == {"right": 2, "asked": 3}
