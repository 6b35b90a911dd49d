"""LongBench on made-up files of the public form."""

import json

import pytest
from eval_tokenizers import Pieces

from vllm_heterocache.evaluation.longbench_tasks import TASKS
from vllm_heterocache.evaluation.sample import Sample, SuiteSettings
from vllm_heterocache.evaluation.suites import make_suite

TOKENIZER = Pieces(bos=True)
FEW_SHOT = {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}


def row(name, index=0):
    return {
        "input": f"INPUT of {name}",
        "context": f"BEGIN of {name}. " + "Some words {in braces} here. " * 40 + "END.",
        "answers": ["Paragraph 3" if "retrieval" in name else "3", "Paragraph 4"],
        "all_classes": ["3", "4"],
        "length": 160,
        "dataset": name,
        "language": "en",
        "_id": f"{name}-{index}",
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    for name in [*TASKS, "qasper_e"]:
        write(tmp_path / f"{name}.jsonl", [row(name, i) for i in range(5)])
    return tmp_path


def samples(folder, tokenizer=TOKENIZER, **settings):
    settings = {"lengths": (2000,), "num_samples": 1, **settings}
    suite = make_suite("longbench")
    return list(suite.samples(tokenizer, SuiteSettings(data=folder, **settings)))


def scored(name, text, answers, classes=()):
    meta = {"task": name, "answers": answers, "classes": list(classes), "truncated": False}
    return make_suite("longbench").score(Sample("x", [1], 1, meta=meta), [], text)["score"]


def test_every_english_task_has_its_prompt_whole(folder):
    found = samples(folder)
    assert [s.task for s in found] == list(TASKS) and len(TASKS) == 16
    for sample in found:
        text = TOKENIZER.decode(sample.prompt)
        task = TASKS[sample.task]
        assert text.startswith(f"<s>{task.prompt[:20]}") and f"BEGIN of {sample.task}." in text
        assert "{in braces} here. END." in text and not sample.meta["truncated"]
        asks = "{input}" in task.prompt
        assert (f"INPUT of {sample.task}" in text) == asks
        assert sample.max_tokens in (32, 64, 128, 512)
        json.dumps(sample.meta)


def test_passages_prompt_word_by_word(folder):
    (sample,) = samples(folder, tasks=("musique",))
    rule = (
        "Answer the question based on the given passages. Only give me the answer and do not "
        "output any other words."
    )
    assert TOKENIZER.decode(sample.prompt) == (
        f"<s>{rule}\n\nThe following are given passages.\n{row('musique')['context']}\n\n{rule}"
        "\n\nQuestion: INPUT of musique\nAnswer:"
    )


@pytest.mark.parametrize("length", [131, 256])
def test_longer_prompts_lose_their_middle(folder, length):
    for sample in samples(folder, lengths=(length,), tasks=("qasper", "qasper_e", "lcc")):
        text = TOKENIZER.decode(sample.prompt)
        assert len(sample.prompt) == length
        assert make_suite("longbench").score(sample, [], "")["cut"] == 1
        assert text.endswith("\n\nAnswer:" if "qasper" in sample.task else "Next line of code:\n")
        assert text.startswith(f"<s>{TASKS[sample.task.removesuffix('_e')].prompt[:20]}")


def test_chat_template_is_not_used_for_examples_and_code(folder):
    tokenizer = Pieces(bos=True, chat=True)
    for sample in samples(folder, tokenizer=tokenizer, extra={"chat": True}):
        text = tokenizer.decode(sample.prompt)
        assert text.startswith("<s>[user]") != (sample.task in FEW_SHOT)
        assert text.endswith("[/user][assistant]") != (sample.task in FEW_SHOT)


def test_samples_are_drawn_by_seed_and_known_by_the_rows_id(folder):
    settings = {"tasks": ("qmsum",), "num_samples": 3}
    found = samples(folder, **settings)
    assert found == samples(folder, **settings) and len({s.id for s in found}) == 3
    assert all(s.id.startswith("longbench/qmsum/2000/qmsum-") for s in found)
    assert {s.id for s in samples(folder, seed=1, **settings)} != {s.id for s in found}
    assert len(samples(folder, tasks=("qmsum",), num_samples=100)) == 5


@pytest.mark.parametrize(
    "name, text, answers, score",
    [
        ("hotpotqa", "the Paris", ["London", "Paris"], 1),
        ("triviaqa", "\nParis\nPassage: Rome", ["Paris"], 1),
        ("narrativeqa", "Paris\nPassage: Rome", ["Paris"], 0.5),
        ("trec", "Date\nCity", ["Date"], 1),
        ("trec", "Date City", ["Date"], 0.5),
        ("passage_count", "There are 3", ["3"], 1),
        ("passage_retrieval_en", "Paragraph 3, not 4", ["Paragraph 3"], 0.5),
        ("lcc", "\nreturn x\nmore", ["return x"], 1),
        ("samsum", "a b\nc d", ["a b"], 1),
    ],
)
def test_scores(name, text, answers, score):
    found = scored(name, text, answers, ["Date", "City"])
    assert found == pytest.approx(score, abs=1e-6)


def test_missing_and_broken_data_is_refused(folder):
    (folder / "hotpotqa.jsonl").unlink()
    with pytest.raises(
        ValueError, match="has no hotpotqa.jsonl or data/hotpotqa.jsonl; it.* --tasks"
    ):
        samples(folder)
    write(folder / "trec.jsonl", [{**row("trec"), "all_classes": None}])
    with pytest.raises(ValueError, match="a row of trec has no field all_classes"):
        samples(folder, tasks=("trec",))
    write(folder / "lcc.jsonl", [{**row("lcc"), "answers": []}])
    with pytest.raises(ValueError, match="a row of lcc has no answers"):
        samples(folder, tasks=("lcc",))
    with pytest.raises(ValueError, match="--suite longbench reads a local dataset: give --data"):
        samples(None)
    with pytest.raises(ValueError, match="--tasks dureader is not a task of --suite longbench"):
        samples(folder, tasks=("dureader",))
