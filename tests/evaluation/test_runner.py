"""A whole evaluation with engines that are not there: order, resumption, failures."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from eval_fakes import Characters, EchoSuite, FakeEngines, echo_run

from vllm_heterocache.evaluation.engine import runner, worker
from vllm_heterocache.evaluation.run_folder import Run, RunFolder, configuration, stock
from vllm_heterocache.evaluation.sample import Sample

CONFIGURATIONS = [configuration({"gpu_budget": 0.3}), configuration({"gpu_budget": 0.1})]


def run(path, engines, suite=None, resume=False, configurations=CONFIGURATIONS, **settings):
    def run_engine(folder, configuration, stop):
        worker.run_configuration(
            folder, configuration, Characters(), engines.open, suite or EchoSuite()
        )

    folder = RunFolder(path)
    failures = runner.evaluate(folder, echo_run(**settings), configurations, resume, run_engine)
    return folder, failures


def test_stock_comes_first_and_everyone_answers_every_sample(tmp_path):
    engines = FakeEngines()
    folder, failures = run(tmp_path / "run", engines)
    assert engines.opened == ["stock", "heterocache 0.3", "heterocache 0.1"] and not failures
    assert engines.closed == 3
    ids = {f"echo-{length}-{i}" for length in (20, 40) for i in range(4)}
    for one in (stock(), *CONFIGURATIONS):
        rows = folder.rows(one)
        assert rows.keys() == ids
        assert all(row["scores"]["score"] == 1 and row["id"] == i for i, row in rows.items())
    assert [len(ids) for ids in engines.asked] == [3, 1] * 6, "batches of three"
    assert engines.longest == 41 + 6, "longest prompt and its output"


def test_rows_and_engine_say_what_happened(tmp_path):
    folder, _ = run(tmp_path, FakeEngines(), suite=EchoSuite(questions=2))
    row = folder.rows(stock())["echo-40-3"]
    assert (row["task"], row["length"], row["depth"], row["text"]) == ("echo", 40, 0.75, "text")
    assert (row["prompt_tokens"], row["output_tokens"]) == (41, 6)
    assert row["right"] == [True, True]
    engine = folder.engine(CONFIGURATIONS[0])
    assert {"date", "commit", "device", "versions", "seconds"} <= engine.keys()
    assert engine["resident"]["40"]["share"] == 0.31 and engine["samples"] == 8
    assert engine["seconds"].keys() == {"20", "40"}


@pytest.mark.parametrize("answers", [1, 3, 7])
def test_interrupted_run_goes_on_where_it_stopped(tmp_path, answers):
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, FakeEngines(fail_after=answers))
    assert len(RunFolder(tmp_path).rows(stock())) == answers
    engines = FakeEngines()
    folder, _ = run(tmp_path, engines, resume=True)
    asked = [i for batch in engines.asked for i in batch]
    assert len(asked) == 24 - answers, "nothing is asked twice"
    assert all(len(folder.rows(one)) == 8 for one in (stock(), *CONFIGURATIONS))
    assert folder.engine(stock())["resident"].keys() == {"20", "40"}, "of both sessions"
    again = FakeEngines()
    run(tmp_path, again, resume=True)
    assert again.opened == [], "a complete run starts no engine"


def test_half_written_line_is_written_again(tmp_path):
    folder, _ = run(tmp_path, FakeEngines())
    file = folder.samples_file(stock())
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][:30])
    assert len(folder.rows(stock())) == 7
    engines = FakeEngines()
    run(tmp_path, engines, resume=True)
    assert engines.opened == ["stock"] and len(folder.rows(stock())) == 8
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_configurations_can_be_added(tmp_path):
    run(tmp_path, FakeEngines(), configurations=CONFIGURATIONS[:1])
    engines = FakeEngines()
    run(tmp_path, engines, resume=True)
    assert engines.opened == ["heterocache 0.1"]


def test_a_copy_of_a_run_without_its_logs_goes_on(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin(echo_run(), resume=False)
    (folder.path / "samples" / "stock.jsonl").write_text('{"id": "a"}\n')
    (folder.path / "logs").rmdir()
    folder.begin(echo_run(), resume=True)
    assert (folder.path / "logs").is_dir()


def test_existing_run_is_neither_overwritten_nor_mixed(tmp_path):
    run(tmp_path, FakeEngines())
    with pytest.raises(ValueError, match="add --resume to continue it"):
        run(tmp_path, FakeEngines())
    with pytest.raises(ValueError, match=r"settings was .* and is"):
        run(tmp_path, FakeEngines(), resume=True, seed=5)


def test_refused_run_is_begun_anew_in_its_folder(tmp_path):
    """The suite's answer to a mistyped option does not cost the folder's name."""

    class Picky(EchoSuite):
        def samples(self, tokenizer, settings):
            if settings.tasks == ("ecko",):
                raise ValueError("ecko is not a task")
            return super().samples(tokenizer, settings)

    with pytest.raises(ValueError, match="ecko is not a task"):
        run(tmp_path, FakeEngines(), suite=Picky(), tasks=("ecko",))
    folder, _ = run(tmp_path, FakeEngines(), suite=Picky(), tasks=("echo",))
    assert folder.run().settings.tasks == ("echo",) and len(folder.rows(stock())) == 8


def test_tasks_share_batches(tmp_path):
    """Two samples of each task and length, three in the engine at once."""
    engines = FakeEngines()
    run(tmp_path, engines, configurations=[], tasks=("a", "b"), num_samples=2)
    assert engines.asked == [
        ["a-20-0", "a-20-1", "b-20-0"], ["b-20-1"], ["a-40-0", "a-40-1", "b-40-0"], ["b-40-1"]
    ]  # fmt: skip


def test_changed_prompts_are_not_mixed_with_old_answers(tmp_path):
    class Other(EchoSuite):
        def samples(self, tokenizer, settings):
            for sample in super().samples(tokenizer, settings):
                yield Sample(sample.id, [8, *sample.prompt[1:]], 6, meta=sample.meta)

    run(tmp_path, FakeEngines())
    with pytest.raises(ValueError, match=r"echo-20-0 .* has another prompt"):
        run(tmp_path, FakeEngines(), suite=Other(), resume=True)


def test_failed_configuration_does_not_stop_the_others(tmp_path, capsys):
    engines = FakeEngines()

    def run_engine(folder, configuration, stop):
        if configuration.name == "heterocache 0.3":
            raise RuntimeError("budget below the floor")
        worker.run_configuration(folder, configuration, Characters(), engines.open, EchoSuite())

    folder = RunFolder(tmp_path)
    failures = runner.evaluate(folder, echo_run(), CONFIGURATIONS, False, run_engine)
    assert failures == {"heterocache 0.3": "budget below the floor"}
    assert engines.opened == ["stock", "heterocache 0.1"]
    assert "heterocache 0.3: failed" in capsys.readouterr().out


def test_jobs_are_engines_at_the_same_time_after_stock(tmp_path):
    both_are_there = threading.Barrier(2, timeout=20)
    order = []

    def run_engine(folder, configuration, stop):
        order.append(configuration.name)
        if configuration.options is not None:
            both_are_there.wait()
            if configuration.name == "heterocache 0.3":
                raise RuntimeError("no memory left")

    folder = RunFolder(tmp_path)
    failures = runner.evaluate(folder, echo_run(), CONFIGURATIONS, False, run_engine, jobs=2)
    assert order[0] == "stock" and len(order) == 3
    assert failures == {"heterocache 0.3": "no memory left"}


def test_an_error_that_is_no_engines_failure_stops_the_engines_beside_it(tmp_path):
    both_are_there, stopped = threading.Barrier(2, timeout=20), []

    def run_engine(folder, configuration, stop):
        if configuration.options is not None:
            both_are_there.wait()
            if configuration.name == "heterocache 0.3":
                raise KeyboardInterrupt
            stopped.append(stop.wait(timeout=20))
            raise RuntimeError("stopped")

    with pytest.raises(KeyboardInterrupt):
        runner.evaluate(RunFolder(tmp_path), echo_run(), CONFIGURATIONS, False, run_engine, jobs=2)
    assert stopped == [True]


def test_same_configuration_twice_is_refused(tmp_path):
    twice = [configuration({"gpu_budget": 0.3})] * 2
    with pytest.raises(ValueError, match="name each once"):
        run(tmp_path, FakeEngines(), configurations=twice)


def test_suite_without_samples_or_with_equal_ids_is_refused(tmp_path):
    class Twice(EchoSuite):
        def samples(self, tokenizer, settings):
            yield from [Sample("a", [1], 1), Sample("a", [2], 1)]

    class Empty(EchoSuite):
        def samples(self, tokenizer, settings):
            yield from ()

    with pytest.raises(ValueError, match="the same id"):
        run(tmp_path / "twice", FakeEngines(), suite=Twice())
    with pytest.raises(ValueError, match="no samples"):
        run(tmp_path / "empty", FakeEngines(), suite=Empty())


def test_run_survives_its_folder(tmp_path):
    values = echo_run(tasks=("a", "b"), data=tmp_path / "d", extra={"facts": 3}, seed=4)
    RunFolder(tmp_path).begin(values, resume=False)
    assert RunFolder(tmp_path).run() == values
    assert isinstance(RunFolder(tmp_path).run(), Run)


def test_file_names_tell_configurations_apart():
    names = [
        configuration(options).file_name
        for options in ({}, {"profile": "/a/p.json"}, {"profile": "/b/p.json"}, {"gpu_budget": 1})
    ]
    assert len(set(names)) == 4 and not any("/" in name for name in names)


def test_process_that_fails_is_reported_from_its_log(tmp_path, monkeypatch, capsys):
    """The real process: there is no suite `echo`."""
    folder = RunFolder(tmp_path)
    folder.begin(echo_run(), resume=False)
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nprint('x')\nraise SystemExit('ValueError: no suite')\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(RuntimeError, match=r"ValueError: no suite \(see .*stock.*log\)"):
        runner.run_in_process(folder, stock(), threading.Event())
    assert "stock: 0/? samples" in capsys.readouterr().out


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """Neither the worker nor its child outlives a parent that could not tell them."""
    code = """
import subprocess, sys, time
from vllm_heterocache.evaluation.engine import worker
worker.PARENT_POLL_S = 0.05
worker.end_with_parent()
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
time.sleep(60)
"""
    start = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:], start_new_session=True);"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"{start} time.sleep(60)", sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(parent.stdout.readline())
    assert status_of(child), "gone before its parent"  # its name may still be that of Python
    parent.kill()
    parent.wait()
    assert_gone(child)


def test_interrupted_process_leaves_no_process_behind(tmp_path, monkeypatch):
    """A worker that ignores the interrupt, and its child."""
    folder = RunFolder(tmp_path)
    folder.begin(echo_run(), resume=False)
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\ntrap '' INT\nsleep 60 &\necho $!\nwait\nsleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(runner, "END_S", 0.2)

    def interrupt(self):
        if folder.log_file(stock()).read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.Progress, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.run_in_process(folder, stock(), threading.Event())
    assert_gone(int(folder.log_file(stock()).read_text()))


def assert_gone(process: int) -> None:
    for _ in range(100):  # a killed process is there until init has taken note
        if not Path(f"/proc/{process}").exists() or "Z (" in status_of(process):
            return
        time.sleep(0.05)
    pytest.fail("the worker's child is still running")


def status_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/status").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("a\nb\nc\nd\n", "b | c | d"),
        (
            "(EngineCore pid=3) ERROR 11-22 [core.py:9] ValueError: gpu_budget=0.2 is too low\n"
            "RuntimeError: Engine core initialization failed.\n",
            "ValueError: gpu_budget=0.2 is too low",
        ),
        ("", ""),
    ],
)
def test_message_of_a_log_is_the_first_error(log, message):
    assert runner.failure_in(log) == message


@pytest.mark.parametrize(
    ("options", "is_graphed"),
    [
        (None, True),
        ({"gpu_budget": 0.2}, True),
        ({"policy": "quest"}, True),
        ({"policy": "fier"}, True),
        ({"policy": "rocketkv", "gpu_budget": 0.2}, True),
        ({"policy": "oracle"}, False),
    ],
)
def test_policies_that_wait_in_their_steps_get_no_graphs(options, is_graphed):
    one = stock() if options is None else configuration(options)
    assert worker.is_graphed(one) == is_graphed


def test_a_folder_knows_the_configurations_that_its_engines_had(tmp_path):
    folder, _ = run(tmp_path, FakeEngines())
    assert folder.configurations() == CONFIGURATIONS[::-1], "in the order of their names"
