"""LongBench v2 on a made-up file of the public form."""

import json

import pytest
from eval_tokenizers import Pieces

from vllm_heterocache.evaluation.longbench_v2 import read_choice
from vllm_heterocache.evaluation.sample import SuiteSettings
from vllm_heterocache.evaluation.suites import make_suite

TOKENIZER = Pieces(bos=True)


def samples(folder, tokenizer=TOKENIZER, **settings):
    settings = {"lengths": (2000,), "num_samples": 1, **settings}
    suite = make_suite("longbench_v2")
    return list(suite.samples(tokenizer, SuiteSettings(data=folder, **settings)))


def choice_row(index, length="short"):
    return {
        "_id": f"id{index}",
        "domain": "Single-Document QA",
        "sub_domain": "Academic",
        "difficulty": "easy",
        "length": length,
        "question": " Which {one} is it? ",
        **{f"choice_{letter}": f"the {letter} one" for letter in "ABCD"},
        "answer": "C",
        "context": "BEGIN. " + "Some words. " * 100 + "END.\n",
    }


@pytest.fixture
def folder(tmp_path):
    classes = ["short", "short", "medium", "long"]
    rows = [choice_row(i, length) for i, length in enumerate(classes)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path


def test_multiple_choice_prompt_of_a_base_model(folder):
    found = samples(folder, num_samples=5)
    assert [s.task for s in found] == ["short", "short", "medium", "long"]
    text = TOKENIZER.decode(found[0].prompt)
    assert text.startswith("<s>Please read the following text and answer the question below.\n\n")
    assert "<text>\nBEGIN. Some" in text and "END.\n</text>\n\nWhat is the correct answer" in text
    assert "question: Which {one} is it?\nChoices:\n(A) the A one\n(B) the B one\n" in text
    assert text.endswith("(D) the D one"), "a base model copies the sentence about the format"
    assert samples(folder / "data.json", num_samples=5) == found
    (short,) = samples(folder, tasks=("long",), lengths=(222,))
    assert len(short.prompt) == 222
    assert make_suite("longbench_v2").score(short, [], "") == {"score": 0, "answered": 0, "cut": 1}


def test_letter_of_a_base_model_is_a_token_of_decode(folder):
    """The first token comes from the prefill, which is dense: a letter there tests no policy."""
    for sample in samples(folder):
        assert TOKENIZER.decode(sample.forced) == "\n\nThe correct answer is ("
        assert sample.max_tokens > len(sample.forced) > 1
    assert samples(folder, Pieces(chat=True), extra={"chat": True})[0].forced is None


def test_multiple_choice_of_a_chat_model_is_read_from_its_sentence(folder):
    tokenizer = Pieces(chat=True)
    suite = make_suite("longbench_v2")
    found = samples(folder, tokenizer, extra={"chat": True})[0]
    assert tokenizer.decode(found.prompt).endswith('answer here)".[/user][assistant]')
    good = suite.score(found, [], "Well. The correct answer is **(C)**.")
    assert good == {"score": 1, "answered": 1, "cut": 0}
    assert suite.score(found, [], "C") == {"score": 0, "answered": 0, "cut": 0}


@pytest.mark.parametrize(
    "text, score, answered",
    [("C) the", 1, 1), (" C", 1, 1), ("A)", 0, 1), ("Cats", 0, 0), ("the C one", 0, 0), ("", 0, 0)],
)
def test_multiple_choice_of_a_base_model_is_its_first_letter(folder, text, score, answered):
    sample = samples(folder)[0]
    text = f"\n\nThe correct answer is ({text}"
    found = make_suite("longbench_v2").score(sample, [], text)
    assert found == {"score": score, "answered": answered, "cut": 0}


def test_choice_in_parentheses_comes_first():
    assert read_choice("The correct answer is A? The correct answer is (B)") == "B"
    assert read_choice("The correct answer is D.") == "D"
    assert read_choice("The correct answer is (E)") is None


def test_multiple_choice_file_of_another_form_is_refused(folder):
    (folder / "data.json").write_text('[{"_id": 1}]')
    with pytest.raises(ValueError, match="row 1 of .*data.json has no field domain, difficulty"):
        samples(folder)
    (folder / "data.json").unlink()
    with pytest.raises(ValueError, match="has no data.json or data.jsonl"):
        samples(folder)
