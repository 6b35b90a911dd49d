"""RULER's question answering on made-up files of the public form."""

import json
import re

import pytest
from eval_tokenizers import Pieces

from vllm_heterocache.evaluation.sample import SuiteSettings
from vllm_heterocache.evaluation.suites import make_suite
from vllm_heterocache.evaluation.suites.ruler.suite import GENERATED, TASKS

TOKENIZER = Pieces(bos=True)


def samples(*tasks, **settings):
    settings = {"lengths": (1500,), "num_samples": 1, **settings}
    suite = make_suite("ruler")
    return list(suite.samples(TOKENIZER, SuiteSettings(tasks=tasks or None, **settings)))


def text_of(sample):
    return TOKENIZER.decode(sample.prompt)


def squad(answerable=True):
    paragraphs = [
        {
            "context": f"{topic} text {i}. " + f"{topic} filler. " * 10,
            "qas": [
                {
                    "question": f"What is {topic} {i}?",
                    "is_impossible": not answerable,
                    "answers": [{"text": f"{topic} text {i}"}, {"text": f"text {i}"}],
                }
            ],
        }
        for topic in ("alpha", "beta")
        for i in range(3)
    ]
    return {"data": [{"paragraphs": paragraphs[:3]}, {"paragraphs": paragraphs[3:]}]}


def hotpot():
    titles = [f"Title {i}" for i in range(10)]
    context = [[title, [f"{title} is old.", " It is far."]] for title in titles]
    return [{"question": "Which is old?", "answer": "Title 3", "context": context}]


@pytest.fixture
def qa_folder(tmp_path):
    (tmp_path / "squad.json").write_text(json.dumps(squad()))
    (tmp_path / "hotpotqa.json").write_text(json.dumps(hotpot()))
    return tmp_path


def test_question_answering_has_its_document_among_others(qa_folder):
    first, second = samples("qa_1", "qa_2", data=qa_folder, lengths=(2000,))
    topic, number = re.search(r"Question: What is (\w+) (\d)\? Answer:$", text_of(first)).groups()
    assert first.meta["answers"] == [f"{topic} text {number}", f"text {number}"]
    assert f"{topic} text {number}. {topic} filler." in text_of(first)
    documents = re.findall(r"\nDocument (\d+):\n", text_of(first))
    assert documents == [str(i) for i in range(1, first.meta["size"] + 1)]
    assert "\nTitle 3\nTitle 3 is old. It is far." in text_of(second)
    assert second.meta["answers"] == ["Title 3"]
    assert all(1700 < len(sample.prompt) <= 2000 for sample in (first, second))
    suite = make_suite("ruler")
    assert suite.score(first, [], f"It is text {number}") == {"score": 1}


def test_few_documents_come_from_the_same_article(qa_folder):
    for sample in samples("qa_1", data=qa_folder, lengths=(270,), num_samples=4):
        assert 1 < sample.meta["size"] <= 3
        assert len(set(re.findall(r"Document \d+:\n(\w+)", text_of(sample)))) == 1


def test_question_answering_is_a_default_where_its_files_are(qa_folder):
    (qa_folder / "hotpotqa.json").unlink()
    found = {sample.task for sample in samples(data=qa_folder, lengths=(1000,))}
    assert found == {*GENERATED, "qa_1"} and set(TASKS) - found == {"qa_2"}


def test_question_answering_without_its_file_is_refused(qa_folder):
    with pytest.raises(ValueError, match=r"give --data DIR with squad\.json for --tasks qa_1"):
        samples("qa_1")
    (qa_folder / "squad.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"squad\.json is not of its public form"):
        samples("qa_1", data=qa_folder)
    (qa_folder / "squad.json").write_text(json.dumps(squad(answerable=False)))
    with pytest.raises(ValueError, match=r"squad\.json has no question that can be answered"):
        samples("qa_1", data=qa_folder)
    (qa_folder / "squad.json").unlink()
    with pytest.raises(ValueError, match=r"--tasks qa_1 reads squad\.json, which --data"):
        samples("qa_1", data=qa_folder)
