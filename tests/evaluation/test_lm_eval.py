"""Tasks of lm-eval: asked during decode by suite `lm_eval`, and by lm-eval's own command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from engines import DTYPE, GIB
from eval_tokenizers import Pieces

from vllm_heterocache.evaluation.sample import SuiteSettings
from vllm_heterocache.evaluation.suites.lm_eval import LmEvalSuite, split

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "tests" / "evaluation" / "lm_eval_tasks"
TOKENIZER = Pieces(bos=True)


@pytest.fixture(autouse=True)
def at_root(monkeypatch, tmp_path_factory):
    """lm-eval is installed; the tasks' data files are found, and nothing is kept of them."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `eval`)")
    monkeypatch.chdir(ROOT)
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def samples(*tasks, **changes):
    suite = LmEvalSuite()
    values = {"lengths": (9000,), "num_samples": 2, "data": TASKS, "tasks": tasks} | changes
    return suite, list(suite.samples(TOKENIZER, SuiteSettings(**values)))


def answered(suite, sample, answer):
    """Scores of an output that ends with `answer`."""
    return suite.score(sample, sample.forced + TOKENIZER.encode(answer, False), "")


def test_the_question_is_forced_after_the_document():
    _, found = samples("hidden_number")
    for sample in found:
        prompt, question = TOKENIZER.decode(sample.prompt), TOKENIZER.decode(sample.forced)
        name = re.fullmatch(r"\n\nThe locker of (\w+) opens with the number", question)[1]
        assert prompt.startswith("<s>The grass is green.")
        assert prompt.endswith("There and back again.")
        assert f"The locker of {name} opens with the number " in prompt
        assert sample.max_tokens == len(sample.forced) + 16 and sample.ends_freely


def test_generated_answers_pass_the_tasks_filter_and_metric():
    suite, (sample, _) = samples("hidden_number")
    name = re.search(r"of (\w+) opens", TOKENIZER.decode(sample.forced))[1]
    (number,) = [
        row["answer"]
        for row in map(json.loads, (TASKS / "numbers.jsonl").read_text().splitlines())
        if row["name"] == name
    ]
    right = {"score": 1, "exact_match": 1, "cut": 0}
    assert answered(suite, sample, f" {number}. It") == right
    assert answered(suite, sample, f" {number}\n77") == right, "the answer ends with its line"
    assert answered(suite, sample, f"\n{number}")["score"] == 0
    assert answered(suite, sample, f" 7{number}")["score"] == 0


def test_choices_are_answered_in_decode_too():
    suite, found = samples("hidden_city", num_samples=6)
    rows = map(json.loads, (TASKS / "cities.jsonl").read_text().splitlines())
    for sample, row in zip(found, rows, strict=True):
        assert TOKENIZER.decode(sample.forced).endswith("(D) Oslo\n\nThe correct answer is (")
        for letter in "ABCD":
            right = letter == "ABCD"[row["answer"]]
            scores = answered(suite, sample, f"{letter}) is")
            assert scores == {"score": right, "answered": 1, "cut": 0}
        assert answered(suite, sample, " Answers")["answered"] == 0


def test_long_documents_lose_their_middle_and_no_question():
    suite, (sample, *_) = samples("hidden_number", lengths=(100,))
    assert len(sample.prompt) == 100
    assert TOKENIZER.decode(sample.prompt).endswith("back again.")
    assert "opens with the number" in TOKENIZER.decode(sample.forced)
    assert answered(suite, sample, " 1")["cut"] == 1


@pytest.mark.parametrize(
    ("tasks", "changes", "message"),
    [
        ((), {"tasks": None}, "needs --tasks"),
        (("hiden_number",), {}, "--tasks hiden_number is not known to lm-eval"),
        (("hidden_number",), {"extra": {"context": "text"}}, "has no field 'text'"),
    ],
)
def test_what_cannot_be_asked_is_refused(tasks, changes, message):
    with pytest.raises(ValueError, match=message):
        samples(*tasks, **changes)


def test_a_document_that_ends_the_prompt_is_refused():
    """As InfiniteBench's summaries: what is asked stands before it."""
    task = SimpleNamespace(
        config=SimpleNamespace(task="sum"), fewshot_context=lambda doc, shots: f"Q {doc['context']}"
    )
    with pytest.raises(ValueError, match=r"--tasks sum is refused: .* name the document's field"):
        split(task, {"context": "a b"}, "context")


@pytest.mark.feature("lm-eval", "Offline API")
@pytest.mark.slow
@pytest.mark.e2e
def test_lm_eval_itself_runs_on_compacted_prompts(small_model, tmp_path):
    """As docs/evaluation.md has it: `lm_eval --model vllm`, options as JSON."""
    arguments = {
        "pretrained": small_model,
        "dtype": DTYPE,
        "max_model_len": 4096,
        "enforce_eager": True,
        "kv_cache_memory_bytes": GIB,
        "disable_log_stats": False,
        "attention_backend": "heterocache",
        "additional_config": {"heterocache": {"policy": "snapkv", "gpu_budget": 0.3}},
    }
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "vllm"]
    command += ["--model_args", json.dumps(arguments), "--tasks", "hidden_number"]
    command += ["--include_path", str(TASKS), "--output_path", str(tmp_path), "--limit", "1"]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOG_STATS_INTERVAL": "0.1",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.rglob("results_*.json")
    score = json.loads(file.read_text())["results"]["hidden_number"]["exact_match,first_number"]
    assert score == 1, "a number of five digits is not found by chance"
    compacted = re.findall(r"heterocache_requests_compacted=(\d+)", done.stdout + done.stderr)
    assert sum(map(int, compacted)) == 1
