"""What the soak's engine has in its own process: vLLM names these classes in its options.

Scheduler and worker are in one process, so that one call sees both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import psutil
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class Executor(UniProcExecutor):
    """A step is scheduled while the one before runs, as on CUDA; vLLM's CPU platform forbids it."""

    def _init_executor(self) -> None:
        self.scheduler_config.async_scheduling = True
        super()._init_executor()


class Scheduler(AsyncScheduler):
    """Keeps in mind when requests were preempted, and which steps overlapped."""

    latest: Scheduler

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokens_at_preemption: dict[str, int] = {}  # the first one of each request
        self.num_overlaps = 0  # steps scheduled while the one before runs
        Scheduler.latest = self

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self.num_overlaps += any(r.num_output_placeholders for r in self.running)
        return super().schedule(*args, **kwargs)

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        # vLLM's own ids are the caller's and a random suffix
        name = request.request_id.rsplit("-", 1)[0]
        self.tokens_at_preemption.setdefault(name, request.num_output_tokens)
        super()._preempt_request(request, *args, **kwargs)


class WorkerExtension:
    """What the worker gets: methods for `collective_rpc`."""

    def soak_touch(self) -> None:
        """Make both pools resident, which they otherwise become as they are used."""
        runtime: Any = self.heterocache  # type: ignore[attr-defined]
        runtime.host_pool.pages.zero_()
        runtime.ops.memory.pool.zero_()

    def soak_look(self) -> int:
        """Check that no page is lost; return the bytes of memory of this process."""
        _manager().check_integrity()
        self.heterocache_check_integrity()  # type: ignore[attr-defined]
        return psutil.Process().memory_info().rss

    def soak_preemptions(self) -> dict[str, int]:
        """Tokens that each preempted request had when that first happened, by the client's name."""
        return Scheduler.latest.tokens_at_preemption

    def soak_state(self) -> dict[str, Any]:
        """Who is there, which blocks are in use, and how much every container holds."""
        scheduler, manager = Scheduler.latest, _manager()
        runtime: Any = self.heterocache  # type: ignore[attr-defined]
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        roots = {
            "scheduler": scheduler,
            "kv_cache_manager": scheduler.kv_cache_manager,
            "manager": manager,
            "runner": runner,
            "input_batch": runner.input_batch,
            "runtime": runtime,
        }
        sizes: dict[str, int] = {}
        for name, root in roots.items():
            _measure(name, root, sizes, set())
        del sizes["scheduler.tokens_at_preemption"]
        pool, host = manager.block_pool, runtime.host_pool
        return {
            "overlaps": scheduler.num_overlaps,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "blocks_used": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "host_blocks_used": host.num_blocks - host.num_free,
            "host_blocks": host.num_blocks,
            "sizes": sizes,
        }


def _manager() -> Any:
    return Scheduler.latest.kv_cache_manager.coordinator.single_type_managers[0]


def _measure(path: str, one: Any, sizes: dict[str, int], seen: set[int]) -> None:
    """Entries of each container among the attributes of an object, and of the plugin's objects
    there."""
    seen.add(id(one))
    for name, value in vars(one).items():
        where = f"{path}.{name}"
        if isinstance(value, Mapping | list | set | deque):
            sizes[where] = len(value)
        is_ours = type(value).__module__.startswith("vllm_heterocache.")
        if is_ours and hasattr(value, "__dict__") and id(value) not in seen:
            _measure(where, value, sizes, seen)
