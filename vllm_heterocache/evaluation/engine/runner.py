"""Runs an evaluation: stock vLLM first, then each configuration, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict

from vllm_heterocache.evaluation.run_folder import Configuration, Run, RunFolder, stock

POLL_S = 1.0
SAY_EVERY_S = 30.0  # where the progress line cannot be overwritten
END_S = 10.0  # an interrupted engine may take to end
LOG_LINES = 3  # of a failed engine's log that the message shows

# Answers what a configuration lacks in the folder; raises RuntimeError where its engine fails, or
# soon after the event is set.
RunEngine = Callable[[RunFolder, Configuration, threading.Event], None]


def evaluate(
    folder: RunFolder,
    run: Run,
    configurations: Sequence[Configuration],
    resume: bool,
    run_engine: RunEngine | None = None,
    jobs: int = 1,
) -> dict[str, str]:
    """Fill the folder with the answers of stock vLLM and of all configurations.

    Args:
        jobs: configurations that have their engines at the same time. Stock is done before.

    Returns:
        configuration name -> why its engine failed. The others are complete.

    Raises:
        ValueError: two configurations are the same, or the folder holds another run.
        RuntimeError: stock vLLM failed, without which nothing can be compared.
    """
    wanted = [stock(), *configurations]
    if len({configuration.name for configuration in wanted}) < len(wanted):
        names = ", ".join(configuration.name for configuration in configurations)
        raise ValueError(f"two configurations are the same: {names}; name each once")
    folder.begin(run, resume)
    run_engine = run_engine or (run_in_process if jobs == 1 else run_beside_others)
    run_engine(folder, wanted[0], threading.Event())
    return _run_all(folder, configurations, run_engine, jobs)


def _run_all(
    folder: RunFolder, configurations: Sequence[Configuration], run_engine: RunEngine, jobs: int
) -> dict[str, str]:
    failures = {}
    stop = threading.Event()
    with ThreadPoolExecutor(jobs) as pool:
        started = {pool.submit(run_engine, folder, one, stop): one.name for one in configurations}
        try:
            for future in as_completed(started):
                try:
                    future.result()
                except RuntimeError as error:
                    failures[started[future]] = str(error)
                    print(f"{started[future]}: failed: {error}", flush=True)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def run_in_process(
    folder: RunFolder,
    configuration: Configuration,
    stop: threading.Event,
    overwrite: bool | None = None,
) -> None:
    """Start worker.py for one configuration and show how far it is.

    Args:
        overwrite: whether the progress line may be overwritten; None: on a terminal.

    Raises:
        RuntimeError: it ended with an error (its log is in the folder), or was stopped.
    """
    command = [sys.executable, "-m", "vllm_heterocache.evaluation.engine.worker", str(folder.path)]
    command.append(json.dumps(asdict(configuration)))
    log_file = folder.log_file(configuration)
    progress = Progress(folder, configuration, overwrite)
    with log_file.open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while (code := _wait(process)) is None:
                if stop.is_set():
                    raise RuntimeError("stopped")
                progress.show()
        finally:
            _end(process)
    progress.end()
    if code:
        raise RuntimeError(f"{failure_in(log_file.read_text(errors='replace'))} (see {log_file})")


def run_beside_others(
    folder: RunFolder, configuration: Configuration, stop: threading.Event
) -> None:
    """`run_in_process` with a line of its own each time."""
    run_in_process(folder, configuration, stop, overwrite=False)


def failure_in(log: str) -> str:
    """The error that a log ends with: its last lines that name one, or its last lines."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line and "Engine core init" not in line]
    # vLLM prints an engine's error in that process and again in this one
    return (errors[0] if errors else " | ".join(lines[-LOG_LINES:])).split("] ")[-1]


def _end(process: subprocess.Popen) -> None:
    """After Ctrl-C or a failure: neither the worker nor the engine's own processes stay behind.

    The process leads a group of its own. vLLM does not always heed an interrupt while it starts.
    """
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=END_S)
    with contextlib.suppress(ProcessLookupError):  # nobody is left, as it should be
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait(process: subprocess.Popen) -> int | None:
    try:
        return process.wait(timeout=POLL_S)
    except subprocess.TimeoutExpired:
        return None


class Progress:
    """A line such as "gpu_budget=0.3: 12/64 samples, mean score 0.988, 85 s"."""

    def __init__(
        self, folder: RunFolder, configuration: Configuration, overwrite: bool | None = None
    ) -> None:
        self.folder, self.configuration = folder, configuration
        self.started = time.monotonic()
        self.said = self.started
        self.overwrite = sys.stdout.isatty() if overwrite is None else overwrite

    def line(self) -> str:
        rows = list(self.folder.rows(self.configuration).values())
        total = (self.folder.engine(self.configuration) or {}).get("samples", "?")
        parts = [f"{self.configuration.name}: {len(rows)}/{total} samples"]
        if rows:
            mean = sum(row["scores"]["score"] for row in rows) / len(rows)
            parts.append(f"mean score {mean:.3f}")
        parts.append(f"{time.monotonic() - self.started:.0f} s")
        return ", ".join(parts)

    def show(self) -> None:
        if self.overwrite:
            print(f"\r{self.line():<78}", end="", flush=True)
        elif time.monotonic() - self.said >= SAY_EVERY_S:
            self.said = time.monotonic()
            print(self.line(), flush=True)

    def end(self) -> None:
        print(f"\r{self.line():<78}" if self.overwrite else self.line(), flush=True)
