"""A Ray cluster within this machine, on which vLLM's CPU workers can be placed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import pytest

# Ray counts this resource and needs no device for it. Ray tells actors which ones they hold, and
# vLLM's executor asks for that.
RESOURCE = "GPU"
OBJECT_STORE_BYTES = 80 << 20


def name_resource() -> None:
    """Say which of Ray's resources a rank takes; vLLM's CPU platform names none, and vLLM refuses
    Ray there. Runs in every worker process."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = RESOURCE


@contextlib.contextmanager
def cluster(num_ranks: int) -> Iterator[None]:
    """The cluster that vLLM finds, with room for as many ranks."""
    import ray
    from vllm.platforms.cpu import CpuPlatform

    assert not CpuPlatform.ray_device_key, "vLLM names a resource now: this module can go"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "ray_device_key", RESOURCE)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else every other process goes first
        ray.init(
            "local",
            num_cpus=num_ranks,
            num_gpus=num_ranks,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            runtime_env={
                "worker_process_setup_hook": name_resource,
                "env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)},
            },
        )
        try:
            yield
        finally:
            ray.shutdown()
