"""Suites `chain` and `fidelity` without an engine."""

import dataclasses
import math
import random
import re
import string

import numpy as np
import pytest
from eval_fakes import Characters

from vllm_heterocache.calibration.wordings import CITIES, FAMILIES, NAMES, NOUNS
from vllm_heterocache.evaluation import chain, haystacks
from vllm_heterocache.evaluation.engine.worker import prompt_digest
from vllm_heterocache.evaluation.sample import SuiteSettings
from vllm_heterocache.evaluation.suites import SUITES, make_suite
from vllm_heterocache.evaluation.suites.chain import ChainSuite
from vllm_heterocache.evaluation.suites.fidelity import Distributions, FidelitySuite, bucketed_kl
from vllm_heterocache.evaluation.suites.quick import QuickSuite

# Wordings that state a number for the name that is asked for.
ONE_NUMBER = ["magic", "invoice", "register", "station"]
SETTINGS = SuiteSettings(lengths=(3000,), num_samples=2, extra={"facts": 4})


class Words:
    """One token per word or other character, so that texts have about as many as with a model."""

    def __init__(self):
        self.ids = {}

    def encode(self, text, add_special_tokens):
        return [
            self.ids.setdefault(part, len(self.ids))
            for part in re.findall(r" ?\w+|\s|[^\w\s]", text)
        ]


def samples(suite=None, tokenizer=None, **changes):
    if isinstance(suite, FidelitySuite):
        changes = {"extra": {}} | changes
    settings = dataclasses.replace(SETTINGS, **changes)
    return list((suite or ChainSuite()).samples(tokenizer or Characters(), settings))


def test_unknown_suite_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="chian is not one of chain, fidelity, quick"):
        make_suite("chian")
    assert make_suite("chain").name == "chain" and make_suite("fidelity").name == "fidelity"
    assert {"needle", "ruler", "lm_eval"} <= SUITES.keys()


# --- chain ---


def test_default_chains_are_the_recorded_ones(monkeypatch):
    """Digests are of the chains that commit a9e5b70 makes of this text from 25000 * i with seed i.

    That commit measured the first rows of docs/results/forced_chain.jsonl. Python's reference is
    another text in every Python version, so that the text here stands for it.
    """
    text = "".join(random.Random(0).choices("abcdefgh", k=75_000))
    monkeypatch.setitem(haystacks.HAYSTACKS, "prose", lambda: text)
    found = samples(num_samples=3)
    assert [prompt_digest(one) for one in found] == ["71f66b6a3aa3", "b9d48d8522a0", "dd7834ca1e78"]
    assert all(one.max_tokens == len(one.forced) for one in found)


def test_every_question_is_scored():
    suite = ChainSuite()
    (sample, _) = samples(suite)
    output = list(sample.forced)
    for start, answer in zip(sample.meta["positions"], sample.meta["answers"], strict=True):
        output[start : start + len(answer)] = answer
    assert suite.right(sample, output) == [True] * 4
    assert suite.score(sample, output, "") == {"score": 1.0, "prefix": 1.0}
    output[sample.meta["positions"][2] + 2] += 1  # the third of a space and five digits
    assert suite.right(sample, output) == [True, True, False, True]
    assert suite.score(sample, output, "") == {"score": 0.75, "prefix": (3 + 2 / 6) / 4}
    assert suite.right(sample, []) == [False] * 4
    assert suite.score(sample, [], "") == {"score": 0.0, "prefix": 0.0}


@pytest.mark.parametrize("haystack", haystacks.HAYSTACKS)
@pytest.mark.parametrize("wording", ONE_NUMBER)
def test_tasks_have_their_haystack_and_wording(haystack, wording):
    (sample,) = samples(tasks=(f"{haystack}/{wording}",), num_samples=1)
    text = "".join(map(chr, sample.prompt))
    assert sample.task == f"{haystack}/{wording}" and len(sample.prompt) == 3000
    words = chain.WORDINGS[wording]
    pattern = re.escape(words.statement)
    pattern = pattern.replace(r"\{key\}", r"(\w+)").replace(r"\{value\}", r"(\d+)")
    facts = re.findall(pattern, text)
    assert len(facts) == 4
    question = text.rsplit("\n", 1)[1]
    asked = [key for key, _ in facts if words.question.format(key=key) == question]
    answers = ["".join(map(chr, answer)) for answer in sample.meta["answers"]]
    assert answers[0] == " " + dict(facts)[asked[0]]
    assert sorted(answers) == sorted(f" {value}" for _, value in facts)
    filler = re.sub(" " + pattern, "", text).rsplit("\n\n\n", 1)[0]
    assert filler in haystacks.HAYSTACKS[haystack]()


@pytest.mark.parametrize("facts", [8, 33, 64])
def test_chains_have_8_to_64_facts(facts):
    for task in ONE_NUMBER:
        (sample,) = samples(
            tasks=(f"prose/{task}",), num_samples=1, lengths=(9000,), extra={"facts": facts}
        )
        assert len(sample.meta["answers"]) == facts == sample.meta["facts"]


@pytest.mark.parametrize("wording", ["copy", "tracking"])
def test_copying_and_tracking_are_tasks_of_their_own(wording):
    suite = ChainSuite()
    (sample,) = samples(suite, tasks=(f"noise/{wording}",), num_samples=1)
    assert sample.task == f"noise/{wording}" and len(sample.meta["answers"]) == 4
    output = list(sample.forced)
    for start, answer in zip(sample.meta["positions"], sample.meta["answers"], strict=True):
        output[start : start + len(answer)] = answer
    assert suite.right(sample, output) == [True] * 4


def test_turns_ask_the_same_of_further_requests():
    plain, turns = samples(), samples(extra={"facts": 4, "turns": True})
    assert [(s.prompt, s.forced) for s in turns] == [(s.prompt, s.forced) for s in plain]
    assert all(s.in_turns for s in turns) and not any(s.in_turns for s in plain)
    assert not {s.id for s in turns} & {s.id for s in plain}


@pytest.mark.parametrize("suite", [ChainSuite, FidelitySuite, QuickSuite])
def test_a_misspelt_setting_is_refused(suite):
    with pytest.raises(ValueError, match=f"--set fcats=... is not .* --suite {suite.name}"):
        samples(suite(), extra={"fcats": 4})


def test_wordings_are_not_calibrations():
    def plain(template):
        names = [name for _, name, *_ in string.Formatter().parse(template) if name]
        return re.sub(r"\W+", " ", template.format(**dict.fromkeys(names, ""))).lower().strip()

    calibration = {plain(t) for family in FAMILIES for t in (family.statement, family.question)}
    for wording in chain.WORDINGS.values():
        assert plain(wording.statement) not in calibration
        assert plain(wording.question) not in calibration
        assert len(set(wording.keys)) == 64
    for name in ("invoice", "station"):
        assert not {*CITIES, *NAMES, *NOUNS} & {*chain.WORDINGS[name].keys}


def test_samples_are_stable_and_differ_by_seed():
    one, again, other = samples(), samples(), samples(seed=1)
    assert one == again
    assert [s.prompt for s in one] != [s.prompt for s in other]
    many = samples(tasks=("prose", "noise", "prose/invoice"), lengths=(2000, 3000))
    assert len({sample.id for sample in many}) == len(many) == 12


@pytest.mark.parametrize("task", ["essay", "prose/riddle", ""])
def test_unknown_task_is_refused(task):
    with pytest.raises(ValueError, match="HAYSTACK/WORDING"):
        samples(tasks=(task,))


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (0, "refused: it must be a whole number above 0"),
        (1.5, "not of type int"),
        ("many", "not of type int"),
        (True, "not of type int"),
    ],
)
def test_wrong_setting_is_refused(facts, reason):
    with pytest.raises(ValueError, match=f"--set facts={facts} is {reason}"):
        samples(extra={"facts": facts})


def test_haystack_goes_round():
    text = "".join(random.Random(1).choices("abc", k=60_000))
    assert haystacks.piece(text, 0, 100) == text[:100]
    assert haystacks.piece(text, 1, 100) == text[25000:25100]
    assert haystacks.piece(text, 2, 130_000) == (text[50000:] + text * 3)[:130_000]
    assert haystacks.piece(text, 3, 5) == text[15000:15005]


# --- fidelity ---


def distributions(logits, taken, top_k) -> Distributions:
    """As the engine knows them: the `top_k` best of [N, V] logits."""
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1)[:, :top_k].astype(np.int32)
    best = np.take_along_axis(logprobs, ids, axis=1).astype(np.float32)
    chosen = logprobs[np.arange(len(taken)), taken].astype(np.float32)
    return Distributions(ids, best, chosen)


@pytest.fixture
def logits():
    rng = np.random.default_rng(8)
    full = 3 * rng.normal(size=(9, 50))
    return full, full + rng.normal(size=full.shape) / 2


def whole_kl(full, other, row):
    p, q = (np.exp(x[row]) / np.exp(x[row]).sum() for x in (full, other))
    return (p * np.log(p / q)).sum()


def test_kl_over_the_whole_vocabulary_is_the_definition(logits):
    taken = [1] * 9
    full, other = (distributions(x, taken, 50) for x in logits)
    for row in range(9):
        kl, rest = bucketed_kl(full, other, row)
        assert kl == pytest.approx(whole_kl(*logits, row), abs=1e-4) and rest < 1e-6


@pytest.mark.parametrize("top_k", [5, 10, 20, 40])
def test_kl_with_a_rest_is_a_lower_bound_that_closes(logits, top_k):
    full, other = (distributions(x, [1] * 9, top_k) for x in logits)
    for row in range(9):
        kl, rest = bucketed_kl(full, other, row)
        exact = whole_kl(*logits, row)
        assert 0 <= kl <= exact + 1e-6
        common = np.intersect1d(full.ids[row], other.ids[row])
        p = np.exp(logits[0][row]) / np.exp(logits[0][row]).sum()
        assert rest == pytest.approx(1 - p[common].sum(), abs=1e-6)
        if top_k == 40:
            assert kl == pytest.approx(exact, rel=0.1)


def test_full_attention_against_itself_is_perfect(logits):
    full = distributions(logits[0], [2] * 9, 10)
    scores = FidelitySuite().score_distributions(full, full)
    assert scores["kl"] == 0 and scores["top1"] == scores["score"] == 1


def test_means_leave_the_prefills_position_out(logits):
    taken = list(range(9))
    full, other = (distributions(x, taken, 50) for x in logits)
    ids, chosen = other.ids.copy(), other.chosen.copy()
    ids[0], chosen[0] = ids[0, ::-1], -9
    wrong_first = dataclasses.replace(other, ids=ids, chosen=chosen)
    scores = FidelitySuite().score_distributions(full, other)
    assert scores == FidelitySuite().score_distributions(full, wrong_first)
    agree = [logits[0][i].argmax() == logits[1][i].argmax() for i in range(1, 9)]
    assert scores["top1"] == sum(agree) / 8
    logprobs = [logits[1][i][i] - math.log(np.exp(logits[1][i]).sum()) for i in range(1, 9)]
    assert scores["nll"] == pytest.approx(-sum(logprobs) / 8, abs=1e-5)
    exact = np.mean([whole_kl(*logits, i) for i in range(1, 9)])
    assert scores["kl"] == pytest.approx(exact, abs=1e-4)


def test_fidelity_forces_the_texts_continuation(tmp_path):
    text = "".join(random.Random(2).choices("abcdef ", k=40_000))
    (tmp_path / "text").write_text(text)
    suite = FidelitySuite()
    first, second = samples(suite, data=tmp_path / "text", extra={"tokens": 20})
    assert "".join(map(chr, first.prompt + first.forced)) == text[:3020]
    assert "".join(map(chr, second.prompt + second.forced)) == text[25000:28020]
    assert first.max_tokens == 20 and len(first.prompt) == 3000
    assert suite.score(first, list(first.forced), "") == {"forced": 1.0}
    assert suite.score(first, first.forced[:-1], "") == {"forced": 0.0}


def test_fidelitys_own_text_and_its_refusals(tmp_path):
    suite = FidelitySuite()
    assert len(samples(suite, Words(), extra={})[0].forced) == 128
    with pytest.raises(ValueError, match="has no tasks"):
        samples(suite, tasks=("prose",))
    (tmp_path / "empty").write_text("     ")
    with pytest.raises(ValueError, match="has 0 tokens and 3128 are needed"):
        samples(suite, SilentTokenizer(), data=tmp_path / "empty", extra={})


# --- quick ---


def test_quick_has_both_kinds_length_by_length():
    suite, words = QuickSuite(), Words()
    extra = {"facts": 4, "tokens": 20, "top_k": 9}
    found = samples(suite, words, lengths=(2000, 3000), extra=extra)
    assert [(s.length, s.task) for s in found] == [
        (length, task)
        for length in (2000, 3000)
        for task in ("prose", "prose", "fidelity", "fidelity")
    ]
    assert [s.top_k for s in found] == [None, None, 9, 9] * 2
    chains = samples(ChainSuite(), words, lengths=(2000, 3000))
    assert [s for s in found if s.task == "prose"] == chains
    of_texts = {"tokens": 20, "top_k": 9}
    texts = samples(FidelitySuite(), words, lengths=(2000, 3000), extra=of_texts)
    assert [(s.prompt, s.forced) for s in found if s.task == "fidelity"] == [
        (s.prompt, s.forced) for s in texts
    ]


def test_quick_scores_each_sample_as_its_own_suite_does(logits):
    suite = QuickSuite()
    asked, _, told, _ = samples(suite, Words(), extra={"facts": 4, "tokens": 20})
    output = [0] * asked.max_tokens
    assert suite.right(asked, output) == [False] * 4
    assert suite.score(asked, output, "") == {"score": 0.0, "prefix": 0.0}
    assert suite.right(told, told.forced) == []
    assert suite.score(told, told.forced, "") == {"forced": 1.0}
    full, other = (distributions(x, [1] * 9, 20) for x in logits)
    expected = FidelitySuite().score_distributions(full, other)
    assert suite.score_distributions(full, other) == expected


class SilentTokenizer:
    def encode(self, text, add_special_tokens):
        return []
