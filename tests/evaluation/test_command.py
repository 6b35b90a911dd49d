"""`heterocache eval` from its options to the engines."""

import json

import pytest

from vllm_heterocache.commands import cli
from vllm_heterocache.evaluation import command
from vllm_heterocache.evaluation.engine import runner, worker
from vllm_heterocache.evaluation.run_folder import configuration, variant

BASE = ["eval", "org/m", "--suite", "chain"]


def parse(*words):
    return cli.build_parser().parse_args([*BASE, *words])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [{"gpu_budget": 0.3}, {"gpu_budget": 0.2}]),
        (["--gpu-budget", "0.5"], [{"gpu_budget": 0.5}]),
        (["--config", '{"full_share": 0.4}'], [{"full_share": 0.4}]),
        (
            ["--recipe", "paper", "--gpu-budget", "0.5", "--config", "{}", "--profile", "/p.json"],
            [{"profile": "/p.json", "gpu_budget": 0.5, "recipe": "paper"}, {"profile": "/p.json"}],
        ),
        (
            ["--gpu-budget", "0.5", "0.3", "--recipe", "retrieval", "paper"],
            [
                {"gpu_budget": budget, "recipe": recipe}
                for recipe in ("retrieval", "paper")
                for budget in (0.5, 0.3)
            ],
        ),
    ],
    ids=["default", "budget", "config", "profile", "crossed"],
)
def test_configurations(words, expected):
    assert command.configurations_of(parse(*words)) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--policy", "streaming", "heterocache", "--gpu-budget", "0.4", "0.1"],
            ["streaming 0.4", "streaming 0.1", "heterocache 0.4", "heterocache 0.1"],
        ),
        (["--policy", "streaming"], ["streaming 0.3", "streaming 0.2"]),
        (["--policy", "full", "--gpu-budget", "0.4", "0.1"], ["full 1"]),
        (
            "--policy full heterocache streaming --gpu-budget 0.5 --recipe paper retrieval".split(),
            [
                "full 1",
                "heterocache 0.5 recipe=paper",
                "heterocache 0.5 recipe=retrieval",
                "streaming 0.5",
            ],
        ),
        (
            ["--config", '{"policy": "streaming", "sink_pages": 2, "gpu_budget": 0.25}'],
            ["streaming 0.25 sink_pages=2"],
        ),
    ],
    ids=["crossed", "default budgets", "full has one", "only one has recipes", "config alone"],
)
def test_policies_are_crossed_with_what_they_have(words, expected):
    options = command.configurations_of(parse(*words))
    assert [configuration(one).name for one in options] == expected


def test_profile_goes_to_policies_that_need_one():
    words = ["--policy", "streaming", "heterocache", "--gpu-budget", "0.3", "--profile", "/p.json"]
    words += ["--config", '{"policy": "full", "gpu_budget": 1}']
    has = [one.get("profile") for one in command.configurations_of(parse(*words))]
    assert has == [None, "/p.json", None]


def test_options_of_a_policy_stand_in_the_name():
    options = {"policy": "any", "policy_options": {"window": 8, "pool": 3}, "profile": "/a/b.json"}
    one = configuration(options)
    assert one.name == "any 0.3 pool=3 profile=b.json window=8"
    assert variant(options | {"gpu_budget": 0.1}) == "any pool=3 profile=b.json window=8"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "x"], "x is not JSON"),
        (["--llm", "[1]"], "is not a JSON object"),
        (["--set", "facts"], "is not NAME=VALUE"),
        (["--lengths", "0"], "0 is not a positive number"),
        (["--recipe", "papr"], "invalid choice"),
        (["--policy", "streeming"], "invalid choice"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_options_are_wrong_usage(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*words)
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "chian"], "--suite chian is not one of chain"),
        (["--data", "/nowhere"], "--data /nowhere does not exist"),
        (["--gpu-budget", "1.5"], "gpu_budget=1.5 is refused"),
        (["--out", __file__], f"--out {__file__} is no folder"),
        (["--profile", "/nowhere.json"], "profile /nowhere.json cannot be read"),
        (["--config", '{"profile": "/nowhere.json"}'], "profile /nowhere.json cannot be read"),
        (["--llm", '{"dtipe": "float32"}'], "no argument 'dtipe' (did you mean 'dtype'?)"),
        (["--config", '{"gpu_budgt": 0.3}'], "gpu_budgt"),
        (["--policy", "streaming", "--recipe", "paper"], "only policy heterocache has recipes"),
        (["--config", '{"policy": "full"}'], "policy 'full' keeps everything"),
        (
            ["--config", '{"policy": "streaming", "policy_options": {"windw": 8}}'],
            "has no option 'windw'",
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes_are_found_before_an_engine_starts(words, message, monkeypatch, capsys):
    monkeypatch.setattr(runner, "evaluate", lambda *a, **k: pytest.fail("it ran"))
    assert cli.main([*BASE, "--no-plots", *words]) == 1
    captured = capsys.readouterr().err
    assert captured.startswith("heterocache eval: error: ") and message in captured
    assert captured.count("\n") == 1


def test_missing_model_makes_no_folder(tmp_path, capsys):
    words = ["eval", str(tmp_path / "missing"), "--suite", "chain", "--no-plots"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr().err
    assert "missing" in captured and captured.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture
def engines(monkeypatch):
    """Engines that are always right, in place of processes."""
    from eval_fakes import Characters, EchoSuite, FakeEngines

    engines = FakeEngines()

    def run_in_process(folder, configuration, stop):
        if (configuration.options or {}).get("recipe") == "paper":
            raise RuntimeError("below the floor")
        worker.run_configuration(folder, configuration, Characters(), engines.open, EchoSuite())

    monkeypatch.setattr(runner, "run_in_process", run_in_process)
    return engines


def test_a_run_leaves_rows_report_and_plots(tmp_path, engines, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    words = ["--lengths", "30", "60", "--samples", "2", "--seed", "3", "--out", str(out)]
    words += ["--set", "facts=8", "--set", "kind=odd", "--tasks", "a", "b"]
    assert cli.main([*BASE, *words]) == 0
    assert engines.opened == ["stock", "heterocache 0.3", "heterocache 0.2"]
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert settings["extra"] == {"facts": 8, "kind": "odd"} and settings["seed"] == 3
    assert settings["lengths"] == [30, 60] and settings["tasks"] == ["a", "b"]
    # three configurations, two lengths, two tasks and both together
    assert len((out / "results.jsonl").read_text().splitlines()) == 18
    printed = capsys.readouterr().out
    assert "## a, 30 tokens" in printed and f"wrote {out / 'report.md'}" in printed
    assert (out / "score_by_length.png").is_file()
    assert cli.main([*BASE, *words]) == 1, "not twice into one folder"
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*BASE, *words, "--resume"]) == 0 and len(engines.opened) == 3


def test_failed_engine_is_reported_and_the_exit_status_says_so(tmp_path, engines, capsys):
    words = ["--gpu-budget", "0.3", "--recipe", "paper", "retrieval", "--no-plots"]
    assert cli.main([*BASE, *words, "--out", str(tmp_path / "o")]) == 1
    captured = capsys.readouterr()
    assert "heterocache 0.3 recipe=paper failed: below the floor" in captured.err
    text = (tmp_path / "o" / "report.md").read_text()
    assert "- heterocache 0.3 recipe=paper: below the floor" in text
    assert "| heterocache 0.3 recipe=retrieval |" in text
