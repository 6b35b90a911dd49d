"""When a launch may come before the kernel before it has ended."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import triton
from triton_mode import ON_GPU

from vllm_heterocache.kernels.dependent_launch import has_dependent_launch


@pytest.fixture(autouse=True)
def asked_anew():
    has_dependent_launch.cache_clear()
    yield
    has_dependent_launch.cache_clear()


@pytest.mark.skipif(ON_GPU, reason="kernels are compiled there")
def test_the_interpreter_runs_one_kernel_after_the_other():
    assert not has_dependent_launch()


@pytest.mark.parametrize(
    ("backend", "arch", "expected"),
    [("cuda", 80, False), ("cuda", 89, False), ("cuda", 90, True), ("hip", "gfx942", False)],
)
def test_gpus_of_compute_capability_9_and_above_have_it(backend, arch, expected, monkeypatch):
    target = SimpleNamespace(backend=backend, arch=arch)
    driver = SimpleNamespace(get_current_target=lambda: target)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
    assert has_dependent_launch() == expected
