"""InfiniteBench on made-up files of the public form."""

import json

import pytest
from eval_tokenizers import Pieces

from vllm_heterocache.evaluation.infinitebench_tasks import TASKS
from vllm_heterocache.evaluation.sample import Sample, SuiteSettings
from vllm_heterocache.evaluation.suites import make_suite

TOKENIZER = Pieces()
OPTIONS = ["first", "second", "third", "fourth"]
INPUTS = {
    "code_run": "Please give me the value of func_12(-3).",
    "math_find": "You should answer with only one number. The second largest number of the list: ",
}
ANSWERS = {"longbook_choice_eng": "third", "code_debug": ["third"], "math_calc": [1, 2, 3]}


def row(name, index=0, **changes):
    return {
        "id": index,
        "context": f"BEGIN of {name}. " + "Some words {in braces}. " * 40 + "END.",
        "input": INPUTS.get(name, f"INPUT of {name}"),
        "answer": ANSWERS.get(name, [str(7)]),
        "options": OPTIONS if name in ("longbook_choice_eng", "code_debug") else [],
        **changes,
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    for name in TASKS:
        write(tmp_path / f"{name}.jsonl", [row(name, i) for i in range(4)])
    return tmp_path


def samples(folder, tokenizer=TOKENIZER, **settings):
    settings = {"lengths": (2000,), "num_samples": 1, **settings}
    suite = make_suite("infinitebench")
    return list(suite.samples(tokenizer, SuiteSettings(data=folder, **settings)))


def scored(name, text, answers):
    sample = Sample("x", [1], 1, meta={"task": name, "answers": answers, "truncated": False})
    return make_suite("infinitebench").score(sample, [], text)["score"]


def test_every_english_task_but_the_endless_one_is_a_default(folder):
    found = samples(folder)
    assert {s.task for s in found} == set(TASKS) - {"math_calc"} and len(found) == 10
    for sample in [*found, *samples(folder, tasks=("math_calc",))]:
        text = TOKENIZER.decode(sample.prompt)
        assert f"BEGIN of {sample.task}." in text and "{in braces}. END." in text
        assert sample.max_tokens - len(sample.forced or []) == TASKS[sample.task].max_tokens
        assert sample.id == f"infinitebench/{sample.task}/2000/{sample.id.split('/')[-1]}"
        json.dumps(sample.meta)


@pytest.mark.parametrize(
    "name, ending",
    [
        ("passkey", "END.\n\nINPUT of passkey\n\nThe pass key is"),
        ("longbook_choice_eng", "\nA. first\nB. second\nC. third\nD. fourth"),
        ("code_run", "exact value of func_12(-3). The value of func_12(-3) is"),
        ("math_calc", "Values: [8, 5, 7, 3]\n\nExpression: BEGIN of math_calc."),
        ("longdialogue_qa_eng", "been replaced with $$MASK$$ is likely"),
        ("math_find", "What is the second largest number in the following list?\n\nBEGIN"),
    ],
)
def test_prompts_are_filled(folder, name, ending):
    (sample,) = samples(folder, tasks=(name,))
    assert ending in TOKENIZER.decode(sample.prompt)


def test_choices_know_text_and_letter(folder):
    for sample in samples(folder, tasks=("longbook_choice_eng", "code_debug")):
        assert sample.meta["answers"] == ["third", "C"]


@pytest.mark.parametrize("name", ["longbook_choice_eng", "code_debug"])
def test_letter_of_a_choice_is_a_token_of_decode(folder, name):
    """The first token comes from the prefill, which is dense: a letter there tests no policy."""
    (sample,) = samples(folder, tasks=(name,))
    whole = TOKENIZER.decode(sample.prompt + sample.forced)
    assert whole.endswith(TASKS[name].prompt[-22:]) and len(sample.forced) > 1
    suite, ending = make_suite("infinitebench"), TOKENIZER.decode(sample.forced)
    assert suite.score(sample, [], f"{ending} C. third") == {"score": 1, "cut": 0}
    assert suite.score(sample, [], f"{ending} B. third") == {"score": 0, "cut": 0}
    (chat,) = samples(folder, Pieces(chat=True), tasks=(name,), extra={"chat": True})
    assert chat.forced is None


@pytest.mark.parametrize("length", [151, 300])
def test_longer_prompts_lose_their_middle(folder, length):
    for sample in samples(folder, lengths=(length,), tasks=("passkey", "kv_retrieval")):
        text = TOKENIZER.decode(sample.prompt)
        assert len(sample.prompt) == length
        assert make_suite("infinitebench").score(sample, [], "")["cut"] == 1
        assert text.startswith(TASKS[sample.task].prompt[:20])
        assert f"END.\n\nINPUT of {sample.task}" in text


def test_chat_template_goes_around(folder):
    tokenizer = Pieces(chat=True)
    (sample,) = samples(folder, tokenizer, tasks=("passkey",), extra={"chat": "yes"})
    text = tokenizer.decode(sample.prompt)
    assert text.startswith("<s>[user]There is") and text.endswith("key is[/user][assistant]")


@pytest.mark.parametrize(
    "name, text, answers, score",
    [
        ("passkey", " 71432. The", ["71432"], 1),
        ("passkey", " 1 71432", ["71432"], 0),
        ("number_string", "none", ["7"], 0),
        ("kv_retrieval", '"key": "ab-12",', ["ab-12"], 1),
        ("kv_retrieval", "ab-123", ["ab-12"], 0),
        ("longdialogue_qa_eng", " Jerry: yes", ["JERRY"], 1),
        ("longbook_qa_eng", "the Moon", ["a star", "Moon"], 1),
        ("longbook_sum_eng", "One Two", ["one two"], 1),
        ("math_find", " 8.0", [8], 1),
        ("math_find", "8.5", [8.5], 1),
        ("math_find", "x", [8], 0),
        ("math_calc", "[1, 2, 5, 3]", [1, 2, 3, 4], 0.5),
        ("math_calc", "1 2", [[1, 2, 3, 4]], 0.5),
        ("code_run", " value is: 12.", [12], 1),
        ("code_run", "-12", ["-12"], 1),
        ("code_run", "12 is it", [12], 0),
        ("code_run", "", [12], 0),
        ("longbook_choice_eng", " C. third", ["third", "C"], 1),
        ("longbook_choice_eng", "third", ["third", "C"], 1),
        ("longbook_choice_eng", "I say the answer is C", ["third", "C"], 1),
        ("longbook_choice_eng", "I say the answer is: B", ["third", "C"], 0),
        ("longbook_choice_eng", "maybe C or B", ["third", "C"], 1),
        ("longbook_choice_eng", "the answer is", ["third", "C"], 0),
        ("longbook_choice_eng", "", ["third", "C"], 0),
        ("code_debug", " C. third", ["third", "C"], 1),
        ("code_debug", " B. second", ["third", "C"], 0),
        ("code_debug", "The answer is: option third", ["third", "C"], 1),
        ("code_debug", "The answer is: C", ["third", "C"], 1),
        ("code_debug", "Correct option is: third", ["third", "C"], 1),
    ],
)
def test_scores(name, text, answers, score):
    assert scored(name, text, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("code_debug", {"options": ["a"]}, "a row of code_debug has 1 options instead of 4"),
        ("code_debug", {"answer": "fifth"}, "has the answer 'fifth', not an option"),
        ("code_run", {"input": "no call"}, "the input of a row of code_run has nothing like"),
        ("math_find", {"input": "no"}, "the input of a row of math_find has nothing like"),
        ("passkey", {"answer": []}, "a row of passkey has no answer"),
    ],
)
def test_rows_of_another_form_are_refused(folder, name, changes, message):
    write(folder / f"{name}.jsonl", [row(name, **changes)])
    with pytest.raises(ValueError, match=message):
        samples(folder, tasks=(name,))


def test_missing_data_is_refused(folder):
    (folder / "passkey.jsonl").unlink()
    with pytest.raises(
        ValueError, match="has no passkey.jsonl; it should hold the JSON Lines.* --tasks"
    ):
        samples(folder)
    with pytest.raises(ValueError, match="--suite infinitebench reads a local dataset: give"):
        samples(None)
