import itertools
import json
import re

import pytest
from eval_tokenizers import Pieces

from vllm_heterocache.evaluation.prose import split_sentences
from vllm_heterocache.evaluation.sample import SuiteSettings
from vllm_heterocache.evaluation.suites import make_suite

TOKENIZER = Pieces(bos=True)
MAGIC = r" The special magic number for (\S+) is: (\d{7})\."


def samples(tokenizer=TOKENIZER, **settings):
    settings = {"lengths": (777,), "num_samples": 1, **settings}
    return list(make_suite("needle").samples(tokenizer, SuiteSettings(**settings)))


def test_grid_has_every_length_depth_and_sample():
    found = samples(lengths=(500, 777), num_samples=2, extra={"depths": 3})
    assert [(s.length, s.meta["depth"]) for s in found] == [
        (length, depth)
        for length, depth, _ in itertools.product((500, 777), (0, 50, 100), range(2))
    ]
    assert len({s.id for s in found}) == len({tuple(s.prompt) for s in found}) == len(found)
    assert [s.meta["depth"] for s in samples()] == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]


@pytest.mark.parametrize("length", [400, 777, 3001])
def test_prompt_is_exactly_as_long_as_asked_for_and_asks_for_its_needle(length):
    for sample in samples(lengths=(length,)):
        text = TOKENIZER.decode(sample.prompt)
        assert len(sample.prompt) == length and text.startswith("<s>You are a helpful AI bot")
        ((key, value),) = re.findall(MAGIC, text)
        assert sample.meta["answers"] == [value]
        assert f"\n\nWhat is the special magic number for {key}? Don't" in text
        assert text.endswith(f" The special magic number for {key} is:")
        json.dumps(sample.meta)


def num_tokens(text: str) -> int:
    return len(TOKENIZER.encode(text, add_special_tokens=False))


def test_needle_stands_at_its_depth_after_a_whole_sentence():
    """It is put before the sentence that its depth lies in."""
    for sample in samples(lengths=(20_000,)):
        text = TOKENIZER.decode(sample.prompt)
        context = text[text.index("direct.\n\n") + 9 : text.index("\n\nWhat is the special")]
        before, _, _, after = re.split(MAGIC, context)
        share = sample.meta["depth"] / 100
        depth = share * (num_tokens(before) + num_tokens(after))
        next_sentence = f" {split_sentences(after)[0]}" if after else ""
        assert num_tokens(before) <= depth <= num_tokens(before + next_sentence)
        if 0 < share < 1:
            assert before[-1] in ".!?"
    first, last = samples(extra={"depths": 2})
    assert re.search(rf"direct\.\n\n{MAGIC}", TOKENIZER.decode(first.prompt))
    assert re.search(rf"{MAGIC}\n\nWhat", TOKENIZER.decode(last.prompt))


def test_seed_decides_everything():
    assert samples(seed=3) == samples(seed=3)
    assert not {s.id for s in samples(seed=3)} & {s.id for s in samples(seed=4)}


def test_magic_number_is_found_or_not():
    suite, sample = make_suite("needle"), samples()[0]
    (value,) = sample.meta["answers"]
    assert suite.score(sample, [], f" {value}.\nAnd") == {"score": 1}
    assert suite.score(sample, [], value[:-1]) == {"score": 0}


def test_sandwich_scores_by_words():
    suite, sample = make_suite("needle"), samples(tasks=("sandwich",))[5]
    text = TOKENIZER.decode(sample.prompt)
    assert text.count(" The best thing to do in San Francisco is eat a sandwich and sit in D") == 1
    assert text.endswith(" The best thing to do in San Francisco is")
    assert suite.score(sample, [], sample.meta["answers"][0]) == {"score": 1}
    score = suite.score(sample, [], "Eat a sandwich.")["score"]
    assert score == pytest.approx(2 / 10)  # eat sandwich and sit in dolores park on sunny day


def test_chat_ends_with_the_question():
    tokenizer = Pieces(chat=True)
    for sample in samples(tokenizer=tokenizer, extra={"chat": True}):
        text = tokenizer.decode(sample.prompt)
        assert len(sample.prompt) == 777 and text.startswith("<s>[user]You are")
        assert text.endswith("or repeat your findings.[/user][assistant]")


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="--lengths 90 is too short for --suite needle"):
        samples(lengths=(90,))
    with pytest.raises(ValueError, match="--set depths=1 must be 2 or more"):
        samples(extra={"depths": 1})
    with pytest.raises(ValueError, match="did you mean depths"):
        samples(extra={"depth": 3})
