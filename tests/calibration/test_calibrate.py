import hashlib
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_heterocache.calibration.calibrate import (
    BUNDLED_TEXT,
    _longest_context,
    calibrate,
    measure_profile,
    read_text,
    similarity,
    stability,
)
from vllm_heterocache.calibration.model_identity import loading_facts
from vllm_heterocache.calibration.probe import AttentionProbe, Measurement
from vllm_heterocache.calibration.profile_cache import MEASUREMENT
from vllm_heterocache.calibration.prompts import (
    SHORTEST_PROMPT,
    SHORTEST_TEXT,
    CalibrationSizes,
    PromptBuilder,
)
from vllm_heterocache.calibration.wordings import FAMILIES
from vllm_heterocache.heads.profile import LEAD_LAYERS, HeadProfile, ModelIdentity

MODULE = "vllm_heterocache.calibration.calibrate"
BOS = 1
SIZES = CalibrationSizes()


class WordTokenizer:
    """Words with their leading space are tokens, numbered as they come; BOS in front or not."""

    vocab_size = 5000

    def __init__(self, bos: bool = True) -> None:
        self.bos = bos
        self.ids: dict[str, int] = {}

    def encode(self, text, add_special_tokens=True):
        words = re.findall(r"\s?\w+|\W", text)
        ids = [self.ids.setdefault(word, 3 + len(self.ids)) for word in words]
        assert len(self.ids) < self.vocab_size - 10
        return [BOS] * (add_special_tokens and self.bos) + ids

    def decode(self, ids):
        words = {number: word for word, number in self.ids.items()}
        return "".join(words.get(i, "?") for i in ids)


class DummyPrefixTokenizer(WordTokenizer):
    """Puts a token of its own before each text, as sentencepiece tokenizers of Llama 2 do."""

    def encode(self, text, add_special_tokens=True):
        ids = super().encode(text, add_special_tokens=False)
        return [BOS] * (add_special_tokens and self.bos) + [4999] + ids


TOKENIZERS = [WordTokenizer(), WordTokenizer(bos=False), DummyPrefixTokenizer()]
each_tokenizer = pytest.mark.parametrize(
    "tokenizer", TOKENIZERS, ids=["bos", "no_bos", "dummy_prefix"]
)


def build(tokenizer=TOKENIZERS[0], sizes=SIZES, seed=0):
    return PromptBuilder(tokenizer, read_text(None), sizes, seed).build()


# --- prompts


@each_tokenizer
def test_needle_row_predicts_the_token_that_its_span_hides(tokenizer):
    for prompt in (p for p in build(tokenizer) if p.kind == "needle"):
        ids, by_span = prompt.token_ids, {}
        for row, first, stop in prompt.spec["targets"]:
            by_span.setdefault((first, stop), []).append(row)
        assert len(by_span) == 6
        for (first, stop), rows in by_span.items():
            assert [ids[row + 1] for row in rows] == ids[first:stop]
            assert rows == list(range(rows[0], rows[0] + stop - first)) and stop <= rows[0]


def test_needle_prompts_ask_what_the_haystack_states_among_like_worded_facts():
    tokenizer = WordTokenizer()
    asked = Counter()
    for prompt in (p for p in build(tokenizer) if p.kind == "needle"):
        text = tokenizer.decode(prompt.token_ids)
        for family in FAMILIES:
            wording = re.escape(family.statement)
            for slot in ("subject", "value"):
                wording = wording.replace(rf"\{{{slot}\}}", r"([\w-]+)")
            question = re.escape(family.question).replace(r"\{subject\}", r"([\w-]+)")
            stated = dict(re.findall(wording, text))
            for subject, *_, value in re.findall(rf"\n{question} ([\w-]+)", text):
                assert stated[subject] == value
                assert len(set(stated.values())) >= 2
                asked[family.name] += 1
    assert set(asked) == {family.name for family in FAMILIES}
    assert asked.total() == 72


def test_haystacks_are_prose_and_noise_in_turn():
    tokenizer = WordTokenizer()
    texts = [tokenizer.decode(p.token_ids) for p in build(tokenizer) if p.kind == "needle"]
    noisy = [len(re.findall(r"stands beside|lies under", text)) > 20 for text in texts]
    assert noisy == [True, False] * 6


def test_needles_lie_at_all_depths():
    depths = [
        first / len(prompt.token_ids)
        for prompt in build()
        if prompt.kind == "needle"
        for _, first, _ in prompt.spec["targets"]
    ]
    counts = np.histogram(depths, bins=4, range=(0, 1))[0]
    assert (counts > 0).all()


def test_wordings_are_mixed_and_leave_out_the_evaluation():
    assert len(FAMILIES) >= 6
    for family in FAMILIES:
        assert family.statement.count(" {value}") == 1
        assert "special magic number" not in (family.statement + family.question).lower()


@each_tokenizer
def test_prose_windows_cover_the_text_from_end_to_end(tokenizer):
    text = tokenizer.encode(" ".join(read_text(None).split()), add_special_tokens=False)
    prompts = [p for p in build(tokenizer) if p.kind == "prose"]
    bos = int(tokenizer.bos)
    for prompt in prompts:
        sets = prompt.spec["sets"]
        assert sets["columns"] == 2000 + bos
        assert sets["top_k"] == 400
        assert sets["rows"] == list(range(1999 + bos, 2064 + bos))
        assert len(prompt.token_ids) == sets["rows"][-1] + 1
    assert prompts[0].token_ids[bos:] == text[:2064]
    assert prompts[-1].token_ids[bos:] == text[-2064:]
    assert [p.token_ids[0] == BOS for p in prompts] == [tokenizer.bos] * 3


@pytest.mark.parametrize("limit", [SHORTEST_PROMPT, 1001, 2047, 5000])
@each_tokenizer
def test_no_prompt_is_longer_than_the_model_allows(tokenizer, limit):
    sizes = CalibrationSizes().fit(limit)
    for seed in range(3):
        prompts = build(tokenizer, sizes, seed)
        assert max(len(p.token_ids) for p in prompts) <= min(limit, sizes.longest_prompt)
        assert Counter(p.kind for p in prompts) == {"prose": 3, "needle": 12}


def test_context_too_short_is_refused():
    with pytest.raises(ValueError, match=r"max_model_len leaves 767 tokens .* needs 768"):
        CalibrationSizes().fit(767)


def test_samples_scale_both_kinds_of_prompt():
    kinds = Counter(p.kind for p in build(sizes=CalibrationSizes.of_samples(1)))
    assert kinds == {"prose": 1, "needle": 4}
    with pytest.raises(ValueError, match="samples is 0"):
        CalibrationSizes.of_samples(0)


def test_seed_decides_the_prompts():
    assert build(seed=3) == build(seed=3)
    assert build(seed=3) != build(seed=4)


def test_prompts_are_those_that_cached_profiles_were_measured_with():
    """Other prompts give other scores; where they change, MEASUREMENT must rise with them."""
    digest = hashlib.sha256(json.dumps(build(WordTokenizer())).encode()).hexdigest()[:16]
    assert (MEASUREMENT, digest) == (1, "8051f1aab6faca7e")


def test_short_text_shrinks_the_windows_and_a_shorter_one_is_refused():
    tokenizer = WordTokenizer(bos=False)
    enough = " word" * SHORTEST_TEXT
    prompts = PromptBuilder(tokenizer, enough, CalibrationSizes(), 0).build()
    assert prompts[0].spec["sets"]["columns"] == SHORTEST_TEXT - 64
    with pytest.raises(ValueError, match=r"text has 10 tokens.*give a longer text"):
        PromptBuilder(tokenizer, " word" * 10, CalibrationSizes(), 0).build()


def test_text_without_sentences_still_makes_haystacks():
    prompts = PromptBuilder(WordTokenizer(), "漢字" * 3000, CalibrationSizes(), 0)
    with pytest.raises(ValueError, match="text has 1 tokens"):
        prompts.build()
    letters = "".join(f"{a}{b}," for a in "abcdefghij" for b in "abcdefghij") * 10
    kinds = Counter(
        p.kind for p in PromptBuilder(WordTokenizer(), letters, CalibrationSizes(), 0).build()
    )
    assert kinds["needle"] == 12


def test_bundled_text_is_plain_english_of_a_useful_length():
    text = read_text(None)
    assert BUNDLED_TEXT.name == "calibration.txt" and text.isascii()
    assert 2500 < len(text.split()) < 6000


# --- statistics


def random_sets(steps, num_layers, num_heads, columns, top_k, seed=0):
    rng = np.random.default_rng(seed)
    order = rng.random((steps, num_layers, num_heads, columns)).argsort(axis=-1)
    return order < top_k


@pytest.mark.parametrize(("steps", "num_layers", "num_heads"), [(2, 1, 1), (6, 7, 3), (9, 3, 2)])
def test_stability_and_similarity_agree_with_a_slow_reference(steps, num_layers, num_heads):
    sets = random_sets(steps, num_layers, num_heads, 37, 11)
    members = {
        (t, layer, head): set(np.flatnonzero(sets[t, layer, head]).tolist())
        for t in range(steps)
        for layer in range(num_layers)
        for head in range(num_heads)
    }
    got_stability, got_similarity = stability(sets), similarity(sets)
    assert got_similarity.shape == (1 + LEAD_LAYERS, num_layers, num_heads, num_heads)
    for layer in range(num_layers):
        for h in range(num_heads):
            prefill = members[0, layer, h]
            shared = [len(members[t, layer, h] & prefill) / 11 for t in range(1, steps)]
            assert got_stability[layer, h] == pytest.approx(median(shared))
            for d in range(1 + LEAD_LAYERS):
                for g in range(num_heads):
                    if layer + d >= num_layers:
                        assert np.isnan(got_similarity[d, layer, h, g])
                        continue
                    shared = [
                        len(members[t, layer, h] & members[t, layer + d, g]) / 11
                        for t in range(1, steps)
                    ]
                    assert got_similarity[d, layer, h, g] == pytest.approx(median(shared))


def test_scores_are_means_over_prompts_and_rows():
    """A runner that returns made-up measurements, so that every mean is known."""
    sizes = replace(CalibrationSizes(), prose_tokens=600, prose_steps=8)
    sets = [random_sets(9, 2, 2, 601, 120, seed) for seed in range(3)]
    prose, masses = iter(sets), []

    def run(token_ids, spec):
        if spec["sets"]:
            assert (len(spec["sets"]["rows"]), spec["sets"]["top_k"]) == (9, 120)
            packed = np.packbits(next(prose), axis=-1)
            return Measurement([0, 1], [0, 1], 601, packed, np.zeros((0, 2, 2), np.float32))
        rows = np.random.default_rng(len(token_ids)).random((len(spec["targets"]), 2, 2))
        masses.append(rows.astype(np.float32))
        return Measurement([0, 1], [0, 1], 0, np.zeros((0, 2, 2, 0), np.uint8), masses[-1])

    identity = ModelIdentity("toy", "Toy", 2, 2, 2, 8)
    profile = measure_profile(run, build(sizes=sizes), identity)
    np.testing.assert_allclose(profile.stability, np.mean([stability(s) for s in sets], axis=0))
    np.testing.assert_allclose(
        profile.similarity, np.mean([similarity(s) for s in sets], axis=0), atol=1e-6
    )
    assert len(masses) == 12
    np.testing.assert_allclose(profile.retrieval, np.concatenate(masses).mean(axis=0), rtol=1e-5)
    assert profile.chance == 0.2


# --- a whole run


class ToyEngine:
    """Stands in for vllm.LLM: two layers of two KV heads on two tensor-parallel ranks.

    Head (1, 0) retrieves: its key at a position is the embedding of the token itself, its query
    that of the token to come, so an answer finds where it was stated. The other heads are noise.
    """

    num_layers, num_kv_heads, group, head_dim, chunk = 2, 2, 2, 32, 512

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.embedding = torch.randn(5000, self.head_dim, generator=torch.manual_seed(0))
        self.model_config = SimpleNamespace(
            model="toy/model",
            model_weights="",
            tokenizer="toy/model",
            tokenizer_revision="abc",
            tokenizer_mode="auto",
            architecture="ToyForCausalLM",
            revision="abc",
            code_revision=None,
            config_format="auto",
            dtype="torch.float32",
            quantization=None,
            quantization_config=None,
            hf_config=SimpleNamespace(),
            hf_text_config=SimpleNamespace(),
            get_sliding_window=lambda: None,
            hf_config_path=None,
            hf_overrides={},
            model_class_overrides={},
            model_arch_config=SimpleNamespace(total_num_attention_heads=4),
            get_total_num_hidden_layers=lambda: self.num_layers,
            get_total_num_kv_heads=lambda: self.num_kv_heads,
            get_head_size=lambda: self.head_dim,
        )
        vllm_config = SimpleNamespace(
            model_config=self.model_config,
            cache_config=SimpleNamespace(cache_dtype="auto"),
            quant_config=None,
        )
        self.llm_engine = SimpleNamespace(vllm_config=vllm_config)
        self.probes: list[AttentionProbe] = []

    def get_tokenizer(self):
        return self.tokenizer

    def collective_rpc(self, method, args):
        if method == "heterocache_start_probe":
            spec = json.loads(json.dumps(args[0]))
            self.probes = [
                AttentionProbe(spec, range(self.num_layers), [rank], self.group, 1.0)
                for rank in range(self.num_kv_heads)
            ]
        else:
            assert method == "heterocache_finish_probe"
            for rank, probe in enumerate(self.probes):
                probe.save(f"{args[0]}.rank{rank}.npz")

    def generate(self, prompt, sampling_params, use_tqdm):
        assert sampling_params.max_tokens == 1 and use_tqdm is False
        ids = torch.tensor(prompt["prompt_token_ids"])
        own, following = self.embedding[ids], self.embedding[ids.roll(-1)]
        noise = torch.Generator().manual_seed(len(ids))
        for layer in range(self.num_layers):
            for rank, probe in enumerate(self.probes):
                if (layer, rank) == (1, 0):
                    query, keys = following, own
                else:
                    query, keys = torch.randn(2, *own.shape, generator=noise) / 4
                query, keys = query[:, None].repeat(1, self.group, 1), keys[:, None]
                for first in range(0, len(ids), self.chunk):
                    stop = min(first + self.chunk, len(ids))
                    probe.observe(layer, query[first:stop], first, keys[:stop])


@pytest.fixture
def engine(monkeypatch):
    """calibrate() runs on a ToyEngine; .started holds what it was started with."""
    toy = ToyEngine(WordTokenizer())
    toy.started = {}

    def llm(model, **settings):
        toy.started.update(settings, model=model)
        return toy

    fake_vllm = SimpleNamespace(LLM=llm, SamplingParams=lambda **k: SimpleNamespace(**k))
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm)
    monkeypatch.setattr(f"{MODULE}._longest_context", lambda model, settings: 131072)
    return toy


def test_calibrate_finds_the_retrieval_head_and_describes_the_run(engine, tmp_path):
    profile = calibrate("toy/model", samples=1, seed=7, progress=False)
    assert np.unravel_index(profile.retrieval.argmax(), (2, 2)) == (1, 0)
    # The head divides its attention among all earlier places of the token to come.
    shares = []
    for prompt in build(WordTokenizer(), CalibrationSizes.of_samples(1), seed=7):
        ids = prompt.token_ids
        for row, first, stop in prompt.spec["targets"]:
            shares.append(ids[first:stop].count(ids[row + 1]) / ids[: row + 1].count(ids[row + 1]))
    assert profile.retrieval[1, 0] == pytest.approx(np.mean(shares), abs=0.02)
    assert np.sort(profile.retrieval.ravel())[-2] < 0.1
    assert profile.stability.shape == (2, 2) and profile.similarity.shape == (3, 2, 2, 2)
    assert profile.model == ModelIdentity("toy/model", "ToyForCausalLM", 2, 4, 2, 32, "abc")
    assert profile.settings["seed"] == 7 and profile.settings["top_share"] == 0.2
    assert profile.settings["loading"] == loading_facts(engine.model_config, "auto")
    assert profile.settings["needle_prompts"] == 4
    assert profile.provenance["text"] == "bundled" and profile.provenance["prompts"] == 5
    assert profile.provenance["needle_rows"] > 24
    assert profile.assignment.num_full >= 1
    profile.save(tmp_path / "profile.json")
    assert HeadProfile.load(tmp_path / "profile.json").provenance == profile.provenance


def test_engine_is_dense_uncached_and_just_long_enough(engine):
    calibrate("toy/model", samples=1, llm_kwargs={"dtype": "float32"}, progress=False)
    assert engine.started["model"] == "toy/model" and engine.started["dtype"] == "float32"
    assert engine.started["attention_backend"] == "heterocache"
    assert engine.started["enable_prefix_caching"] is False
    assert engine.started["max_model_len"] == CalibrationSizes().longest_prompt + 1
    assert engine.started["max_num_batched_tokens"] >= CalibrationSizes().longest_prompt
    options = engine.started["additional_config"]["heterocache"]
    assert options["gpu_budget"] == 1.0
    assert options["min_prompt_tokens"] > engine.started["max_model_len"]


def test_prompts_shrink_to_the_context_of_the_model(engine, monkeypatch):
    monkeypatch.setattr(f"{MODULE}._longest_context", lambda model, settings: 1024)
    profile = calibrate("toy/model", samples=1, progress=False)
    assert engine.started["max_model_len"] <= 1024
    assert profile.settings["prose_tokens"] < 1024


def test_model_without_a_stated_context_gets_the_default_sizes(engine, monkeypatch):
    monkeypatch.setattr(f"{MODULE}._longest_context", lambda model, settings: None)
    profile = calibrate("toy/model", samples=1, progress=False)
    assert profile.settings["prose_tokens"] == 2000


def test_max_model_len_too_short_is_refused_before_the_engine_starts(engine):
    with pytest.raises(ValueError, match="max_model_len leaves 511 tokens"):
        calibrate("toy/model", llm_kwargs={"max_model_len": 512}, progress=False)
    assert engine.started == {}


def test_unreadable_text_is_refused_before_the_engine_starts(engine, tmp_path):
    with pytest.raises(ValueError, match=r"text is '.*missing.txt', which cannot be read"):
        calibrate("toy/model", text=str(tmp_path / "missing.txt"), progress=False)
    assert engine.started == {}


def test_own_text_replaces_the_bundled_one(engine, tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("One two three. Four five six! " * 300)
    profile = calibrate("toy/model", text=str(path), samples=1, progress=False)
    assert profile.provenance["text"] == "own.txt"
    assert (
        profile.provenance["text_sha256"]
        != calibrate("toy/model", samples=1, progress=False).provenance["text_sha256"]
    )


def test_model_without_a_tokenizer_is_refused(engine):
    engine.tokenizer = None
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        calibrate("toy/model", progress=False)


def test_context_length_is_read_from_the_model_folder(tmp_path):
    pytest.importorskip("transformers")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config |= {"max_position_embeddings": 900, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert _longest_context(str(tmp_path), {}) == 900
    assert _longest_context(str(tmp_path / "missing"), {"revision": "main"}) is None
