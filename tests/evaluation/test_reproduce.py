"""`heterocache reproduce` from its options to one report, with engines that are not there."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from eval_fakes import Characters, EchoSuite, FakeEngines
from eval_tokenizers import Pieces

from vllm_heterocache.commands import cli
from vllm_heterocache.config import DEFAULT_MATCHED_SHARE
from vllm_heterocache.evaluation import suites
from vllm_heterocache.evaluation.engine import runner, worker
from vllm_heterocache.evaluation.reproduction import command
from vllm_heterocache.evaluation.reproduction.parts import PARTS
from vllm_heterocache.evaluation.run_folder import configuration
from vllm_heterocache.heads.profile import HeadProfile, ModelIdentity
from vllm_heterocache.policies import POLICIES

BASE = ["reproduce", "org/m", "--no-plots"]
OUTPUT = 6  # tokens of EchoSuite's answers, whose prompts are a token longer than their length


class Wordings(EchoSuite):
    """Four questions a task; `fidelity` has KL, as in suite `quick`."""

    def __init__(self):
        super().__init__(questions=4)

    def samples(self, tokenizer, settings):
        tasks = (*(settings.tasks or ("prose",)), "fidelity")
        yield from super().samples(tokenizer, replace(settings, tasks=tasks))

    def score(self, sample, tokens, text):
        scores = super().score(sample, tokens, text)
        return scores | ({"kl": 0.25} if sample.task == "fidelity" else {})


@pytest.fixture
def engines(monkeypatch):
    """Engines in place of processes, a suite that fits in the head in place of all suites."""
    engines = FakeEngines()

    def run_in_process(folder, configuration, stop):
        suite = suites.SUITES[folder.run().suite]()
        worker.run_configuration(folder, configuration, Characters(), engines.open, suite)

    monkeypatch.setattr(runner, "run_in_process", run_in_process)
    monkeypatch.setattr(command, "longest_context", lambda *_: 10**6)
    monkeypatch.setattr(worker, "load_tokenizer", lambda *_: Characters())
    for name in suites.SUITES:
        monkeypatch.setitem(suites.SUITES, name, Wordings if name == "quick" else EchoSuite)
    return engines


def options(*words):
    args = cli.build_parser().parse_args([*BASE, "--out", "out", *words])
    return command.evaluations(args)


def names(one):
    return [configuration(options).name for options in one.config]


def test_each_part_is_a_run_of_eval_at_every_budget():
    found = options()
    assert list(found) == ["quick", "chain", "ruler", "probes", "lm_eval"]
    for name, one in found.items():
        assert one.suite == name and str(one.out) == f"out/{name}" and not one.resume
        assert names(one) == [f"heterocache {budget}" for budget in (0.2, 0.1, 0.05)]
    assert found["quick"].lengths == [4000, 16000, 32000]
    assert found["probes"].llm == {"enable_prefix_caching": True}


def test_ablations_switch_each_mechanism_off_at_every_budget():
    found = options("--parts", "ablations")["ablations"]
    assert found.lengths == [4000, 16000, 64000] and found.suite == "quick"
    per_budget = (len(found.config) - 1) // 5
    assert [one["gpu_budget"] for one in found.config[:-1:per_budget]] == [
        0.3,
        0.2,
        0.1,
        0.05,
        0.02,
    ]
    found = options("--parts", "ablations", "--gpu-budget", "0.1")["ablations"]
    assert DEFAULT_MATCHED_SHARE == 0.5
    assert names(found) == [
        "heterocache 0.1",
        "heterocache 0.1 full_share=0",
        "heterocache 0.1 finder_share=0",
        "heterocache 0.1 drift_threshold=0",
        "heterocache 0.1 matched_share=0",
        "heterocache 0.1 evicted_means=False matched_share=0.5",
        "heterocache 0.1 evicted_means=False",
        "heterocache 0.1 even_budgets=True",
        "heterocache 0.1 even_budgets=True evicted_means=False finder_share=0 full_share=0",
        "heterocache 0.3 recipe=paper",
    ]


def test_every_policy_has_a_row_at_every_budget():
    found = options("--parts", "policies")["policies"]
    assert found.lengths == [4000, 16000]
    for budget in (0.2, 0.1):
        asked = {one.get("policy") for one in found.config if one["gpu_budget"] == budget}
        assert asked == {None, *POLICIES} - {"heterocache", "full", "oracle"}
        assert f"heterocache {budget} recipe=paper" in names(found)


def test_options_of_the_engine_and_of_the_run_reach_every_part():
    words = ["--llm", '{"dtype": "float32"}', "--jobs", "2", "--resume", "--profile", "/p.json"]
    for one in options(*words, "--small").values():
        assert one.llm["dtype"] == "float32" and one.jobs == 2 and one.resume
        assert str(one.profile) == "/p.json" and names(one) == ["heterocache 0.1"]
    assert one.lengths == [4000]  # of LongBench


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", [name for name in PARTS if name != "lm_eval"])
def test_the_suites_have_samples_for_what_a_part_asks(name, small):
    (one,) = options("--parts", name, *["--small"] * small).values()
    one.lengths = one.lengths[:1]
    assert command.leave_out({name: one}, Pieces(bos=True), 10**6) == []


def test_one_report_has_every_part(tmp_path, engines, capsys):
    engines.wrong = lambda one, sample: one.options is not None and sample.task == "prose/station"
    words = ["--small", "--parts", "quick", "ruler", "--out", str(tmp_path)]
    assert cli.main([*BASE, *words]) == 0
    assert engines.opened == ["stock", "heterocache 0.1"] * 2
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out and "## Not in this report" not in text
    # of two wordings one is right; station is a label
    assert re.search(r"^\|  \| stock \| ; 8 of 8 \| 8 \| 4 \|", text, re.MULTILINE)
    row = r"^\| 10 % \| heterocache \| 0\.2500; 4 of 8 \| 50\.0% \| 0\.0% \|"
    assert re.search(row, text, re.MULTILINE)
    assert "| niah_single_2 | 2,000 | 3 | 1.000 | 1.000 |" in text
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["benchmark"] for row in rows} == {"eval_quick", "eval_ruler"}
    assert (tmp_path / "ruler" / "report.md").is_file()


def test_cells_behind_stock_are_named(tmp_path, engines, monkeypatch):
    engines.wrong = lambda one, sample: one.options is not None
    part = PARTS["chain"]._replace(options="--suite chain --lengths 30 --samples 16")
    monkeypatch.setitem(PARTS, "chain", part)
    profile = tmp_path / "heads.json"
    scores = np.ones((1, 1), np.float32)
    HeadProfile(
        ModelIdentity("m", "M", 1, 1, 1, 64), {"top_share": 0.2}, {}, retrieval=scores
    ).save(profile)
    words = ["--parts", "chain", "--gpu-budget", "0.2", "--out", str(tmp_path)]
    assert cli.main([*BASE, *words, "--profile", str(profile)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "Behind stock (p under 0.05): 1 of 1 cells." in text
    assert "- heterocache 0.2, echo, 30 tokens: 0.000 for 1.000 (p 3.1e-05)" in text
    assert "- head profile: heads.json" in text and "profile=" not in text


def test_what_cannot_be_asked_is_left_out_with_its_reason(tmp_path, engines, monkeypatch):
    class Unreachable(EchoSuite):
        def samples(self, tokenizer, settings):
            raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setitem(suites.SUITES, "lm_eval", Unreachable)
    monkeypatch.setattr(command, "longest_context", lambda *_: 4000 + 1 + OUTPUT)
    words = ["--parts", "lm_eval", "chain", "--gpu-budget", "0.2", "--out", str(tmp_path)]
    assert cli.main([*BASE, *words]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "- lm_eval at 16,000 tokens was left out: Couldn't reach the Hub" in text
    left_out = "was left out: it needs 16,007 tokens with its answers, and the model takes 4,007"
    assert f"- chain at 16,000 tokens {left_out}" in text
    settings = json.loads((tmp_path / "chain" / "run.json").read_text())["settings"]
    assert settings["lengths"] == [4000] and not (tmp_path / "lm_eval").exists()


def test_a_run_of_which_nothing_is_left_says_so(tmp_path, engines, monkeypatch, capsys):
    monkeypatch.setattr(command, "longest_context", lambda *_: 100)
    assert cli.main([*BASE, "--parts", "ruler", "--small", "--out", str(tmp_path)]) == 1
    message = "no part can be evaluated: ruler at 2,000 tokens was left out"
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_part_whose_engine_fails_is_named_and_the_others_go_on(tmp_path, engines, capsys):
    def fails(one, sample):
        if one.options is None and sample.length == 2000 and sample.task.startswith("niah"):
            raise RuntimeError("out of memory")
        return False

    engines.wrong = fails
    words = ["--small", "--parts", "ruler", "chain", "--out", str(tmp_path)]
    assert cli.main([*BASE, *words]) == 1
    assert "heterocache reproduce: ruler failed: out of memory" in capsys.readouterr().err
    text = (tmp_path / "report.md").read_text()
    assert "- ruler failed: out of memory" in text and "## chain" in text
    engines.wrong = lambda *_: False
    assert cli.main([*BASE, *words]) == 1, "a run is continued on request alone"
    assert "--resume" in capsys.readouterr().err
    opened = len(engines.opened)
    assert cli.main([*BASE, *words, "--resume"]) == 0
    assert engines.opened[opened:] == ["stock", "heterocache 0.1"], "of ruler alone"
    assert "## ruler" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu-budget", "1.5"], "gpu_budget=1.5 is refused"),
        (["--profile", "/nowhere.json"], "profile /nowhere.json cannot be read"),
        (["--llm", '{"dtyp": "float32"}'], "dtyp"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(words, message, monkeypatch, capsys):
    monkeypatch.setattr(worker, "load_tokenizer", lambda *_: pytest.fail("it was loaded"))
    assert cli.main([*BASE, "--out", "out", *words]) == 1
    captured = capsys.readouterr().err
    assert captured.startswith("heterocache reproduce: error: ") and message in captured
    assert captured.count("\n") == 1
