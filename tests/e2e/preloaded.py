"""Processes that have imported vLLM when they start, which is most of the time of a small engine's
rank: a server imports it once and forks them."""

from __future__ import annotations

import gc
import os
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

MODULES = [
    "vllm.entrypoints.llm",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.executor.multiproc_executor",
]


class PreloadedProcess(ForkServerProcess):
    """With the environment of the process that starts it, as a spawned one has. The server keeps
    that of its own start."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _in_environment, (type(self), dict(os.environ)), self.__dict__


def _in_environment(kind: type, environment: dict[str, str]) -> Any:
    """Comes before anything that the process is given is unpickled. What the server has imported is
    no garbage to look for."""
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    return kind.__new__(kind)


class Preloaded(ForkServerContext):
    Process = PreloadedProcess


def context() -> Preloaded:
    """multiprocessing's context of such processes; all share one server."""
    made = Preloaded()
    made.set_forkserver_preload(MODULES)
    return made
