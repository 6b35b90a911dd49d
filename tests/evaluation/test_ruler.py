"""RULER's tasks on a tokenizer of small pieces, and on a real one where it is there."""

import collections
import json
import random
import re

import pytest
from eval_tokenizers import Pieces

from vllm_heterocache.evaluation.prose import ESSAYS, Prose, load_prose, split_sentences
from vllm_heterocache.evaluation.sample import SuiteSettings
from vllm_heterocache.evaluation.suites import make_suite
from vllm_heterocache.evaluation.suites.ruler.suite import GENERATED
from vllm_heterocache.evaluation.suites.ruler.task import NOISE, hide_in_lines, hide_in_prose

TOKENIZER = Pieces(bos=True)
NEEDLE = r"One of the special magic (?:number|uuid)s for (\S+) is: (\S+)\."


def samples(*tasks, tokenizer=TOKENIZER, **settings):
    settings = {"lengths": (1500,), "num_samples": 1, **settings}
    suite = make_suite("ruler")
    return list(suite.samples(tokenizer, SuiteSettings(tasks=tasks or None, **settings)))


def text_of(sample, tokenizer=TOKENIZER):
    return tokenizer.decode(sample.prompt)


@pytest.mark.parametrize("length", [1111, 4096])
def test_every_task_fills_its_length_and_holds_its_answers(length):
    found = samples(lengths=(length,), num_samples=2)
    assert [s.task for s in found] == [name for name in GENERATED for _ in range(2)]
    assert len({s.id for s in found}) == len(found)
    for sample in found:
        text = text_of(sample)
        assert 0.95 * length < len(sample.prompt) <= length, sample.id
        assert text.startswith("<s>") and sample.length == length
        assert all(answer in text for answer in sample.meta["answers"])
        json.dumps(sample.meta)


def test_seed_decides_everything():
    assert samples(seed=1) == samples(seed=1)
    one, other = samples("vt", "fwe", seed=1), samples("vt", "fwe", seed=2)
    assert all(a.prompt != b.prompt and a.id != b.id for a, b in zip(one, other, strict=True))
    first, second = samples("cwe", num_samples=2)
    assert first.prompt != second.prompt


@pytest.mark.parametrize(
    ("task", "keys", "values", "asked"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_2", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 4, 1, 1),
        ("niah_multivalue", 1, 4, 1),
        ("niah_multiquery", 4, 1, 4),
    ],
)
def test_needles_are_as_many_as_the_task_says(task, keys, values, asked):
    (sample,) = samples(task)
    text = text_of(sample)
    hidden = collections.defaultdict(list)
    for key, value in re.findall(NEEDLE, text):
        hidden[key].append(value)
    assert len(hidden) == keys and {len(v) for v in hidden.values()} == {values}
    named = re.search(r"for ([^\n]+) mentioned in the provided text\?", text)[1]
    wanted = re.split(r", and |, ", named)
    assert len(wanted) == asked
    expected = [value for key in wanted for value in hidden[key]]
    assert sorted(sample.meta["answers"]) == sorted(expected)
    uuids = task == "niah_single_3"
    assert all(re.fullmatch(r"[0-9a-f-]{36}" if uuids else r"\d{7}", x) for x in expected)


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_haystack_of_needles_has_one_with_the_key_asked_for(task):
    (sample,) = samples(task)
    pairs = re.findall(NEEDLE, text_of(sample))
    key = re.search(r"for (\S+) mentioned in the provided text\?", text_of(sample))[1]
    assert len(pairs) == sample.meta["size"] + 1
    assert [value for k, value in pairs if k == key] == sample.meta["answers"]


def test_one_answer_is_asked_for_in_the_singular():
    (one,), (many,) = samples("niah_single_2"), samples("niah_multivalue")
    assert re.search(
        r"A special magic number is hidden within .* about the number afterwards\.\n.*\nWhat is "
        r"the special magic number for (\S+) mentioned in the provided text\? The special magic "
        r"number for \1 mentioned in the provided text is$",
        text_of(one),
        re.DOTALL,
    )
    assert "What are all the special magic numbers for" in text_of(many)
    assert text_of(many).endswith("mentioned in the provided text are")


def test_variables_of_the_chain_are_the_answers():
    (sample,) = samples("vt", lengths=(5000,))
    text = text_of(sample)
    asked = text[text.rindex("Memorize and track") :]
    value = re.search(r"assigned the value (\d{5}) in the text above\. Answer:", asked)[1]
    known = {value}
    chain = []
    for name, source in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+) ?$", asked, re.MULTILINE):
        assert source in known, "each variable comes after the one it is taken from"
        known.add(name)
        chain.append(name)
    assert chain == sample.meta["answers"] and len(chain) == 5
    example = text[: len(text) - len(asked)]
    assert "they are:  " not in asked and re.search(r"they are:  ?([A-Z]{3} ?){5}\n\n$", example)
    assert asked.count(NOISE) == sample.meta["size"] > 5


@pytest.mark.parametrize(("length", "common", "rare"), [(1500, 6, 1), (6000, 30, 3)])
def test_common_words_are_common(length, common, rare):
    (sample,) = samples("cwe", lengths=(length,))
    text = text_of(sample)
    listed = text[text.rindex("Below is a numbered list") :].split("\nQuestion")[0].split("\n")[1]
    counts = collections.Counter(re.findall(r"\d+\. (\S+)", listed))
    answers = sample.meta["answers"]
    assert len(answers) == 10 and {counts.pop(word) for word in answers} == {common}
    assert set(counts.values()) == {rare} and len(counts) + 10 == sample.meta["size"]
    example = text[: text.rindex("Below is a numbered list")]
    assert re.search(r"in the list are: 1\. \S+ 2\. .* 10\. \S+\n$", example)


@pytest.mark.parametrize("length", [1000, 3333])
def test_frequent_words_are_the_three_after_the_dots(length):
    (sample,) = samples("fwe", lengths=(length,))
    coded = text_of(sample).split("coded words. ")[1].split("\nQuestion")[0]
    ranked = collections.Counter(coded.split()).most_common(5)
    assert ranked[0][0] == "..." and [w for w, _ in ranked[1:4]] == sample.meta["answers"]
    assert ranked[1][1] > ranked[2][1] > ranked[3][1] > ranked[4][1]


def test_score_is_the_share_of_answers_found():
    suite = make_suite("ruler")
    (sample,) = samples("niah_multivalue")
    first, second, third, fourth = sample.meta["answers"]
    assert suite.score(sample, [], f" {first}, {third} and 12") == {"score": 0.5}
    assert suite.score(sample, [], f"{second}{first}{fourth}{third}") == {"score": 1}
    assert suite.score(sample, [], "") == {"score": 0}


def test_chat_begins_the_answer_after_the_turn():
    tokenizer = Pieces(chat=True)
    (sample,) = samples("niah_single_1", tokenizer=tokenizer, extra={"chat": "true"})
    text = text_of(sample, tokenizer)
    assert text.startswith("<s>[user]A special magic number")
    assert re.search(r"text\?\[/user\]\[assistant\] The special .* in the provided text is$", text)
    assert len(sample.prompt) <= 1500


@pytest.mark.parametrize("task", ["niah_single_2", "vt", "cwe", "fwe"])
def test_too_short_a_length_is_refused(task):
    with pytest.raises(ValueError, match=f"--lengths 60 is too short for --tasks {task}"):
        samples(task, lengths=(60,))


def test_unknown_task_is_refused():
    with pytest.raises(ValueError, match="--tasks niah is not a task of --suite ruler; choose"):
        samples("niah")


def test_essays_of_ruler_are_used_where_they_are(tmp_path):
    (tmp_path / ESSAYS).write_text(json.dumps({"text": "Essays are long. They repeat. " * 3}))
    (sample,) = samples("niah_single_2", data=tmp_path)
    assert text_of(sample).count("They repeat.") > 50
    assert "assert" in load_prose(None).text, "Python's reference otherwise"
    (tmp_path / ESSAYS).write_text("[]")
    with pytest.raises(ValueError, match=r'is not of the form \{"text"'):
        samples("niah_single_2", data=tmp_path)


def test_prose_gives_distinct_words_and_whole_sentences():
    prose = Prose("One two. Three four five! Six")
    assert prose.sentences(5) == ["One two.", "Three four five!"]
    assert prose.sentences(9) == ["One two.", "Three four five!", "Six One two.", "Three"]
    count = len(prose.single_words) + 100
    words = prose.draw_words(random.Random(0), count)
    assert len(set(words)) == count and sum("-" in word for word in words) == 100
    assert len(set(prose.key_words)) == len(prose.key_words) > 50_000
    with pytest.raises(ValueError, match="distinct words are needed"):
        prose.draw_words(random.Random(0), 10**6)


def test_hidden_lines_keep_their_order_and_the_rest():
    lines, hidden = [f"line {i}." for i in range(9)], ["A", "B", "C"]
    for seed in range(20):
        mixed = hide_in_lines(random.Random(seed), lines, hidden).split("\n")
        assert [x for x in mixed if x in hidden] == hidden
        assert [x for x in mixed if x not in hidden] == lines


def test_needles_in_prose_reach_both_ends():
    prose = Prose("Aa bb. " * 100)
    places = set()
    for seed in range(200):
        pieces = split_sentences(hide_in_prose(random.Random(seed), prose, 200, ["Needle."]))
        assert len(pieces) == 101
        places.add(pieces.index("Needle."))
    assert len(places) > 30 and min(places) == 0 and max(places) == 100


def test_lengths_hold_with_a_real_tokenizer(long_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(long_model)
    for sample in samples(tokenizer=tokenizer, lengths=(1000, 4000)):
        text = tokenizer.decode(sample.prompt)
        assert 0.95 * sample.length < len(sample.prompt) <= sample.length
        assert all(answer in text for answer in sample.meta["answers"])
