"""Requests that join, leave, are aborted, preempted and hit prefixes, under drift triggers. Finders
meet the same in test_soak.py, test_sliding_windows.py and test_recurrent_layers.py."""

from __future__ import annotations

import churn
import engines
import numpy as np
import parallel
import pytest

from common.profiles import TINY
from vllm_heterocache.plugin import register


@pytest.fixture
def async_scheduling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is scheduled while the one before runs, as on CUDA; vLLM's CPU platform forbids it."""
    from vllm.platforms import current_platform
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    register()  # it hooks the same method, for ever: before, or undoing this would undo the hook
    platform = type(current_platform)
    check_config = platform.check_and_update_config

    def check_and_allow(cls, vllm_config) -> None:
        check_config(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True
        vllm_config.scheduler_config.scheduler_cls = AsyncScheduler

    monkeypatch.setattr(platform, "check_and_update_config", classmethod(check_and_allow))


@pytest.mark.feature(
    "Asynchronous scheduling", "Preemption", "Aborted requests", "Reset of the prefix cache"
)
def test_churn_leaks_nothing_and_reads_nothing_stale(tmp_path, async_scheduling):
    model = parallel.write_model(tmp_path, "float32")
    tokens = np.random.default_rng(1).integers(0, TINY.vocab_size, 90000).tolist()
    with engines.start(
        model,
        churn.OPTIONS | churn.SATELLITES | {"profile": f"{model}/alike.json"},
        skip_tokenizer_init=True,
        max_model_len=3200,
        max_num_batched_tokens=1024,
        max_num_seqs=8,
        kv_cache_memory_bytes=270 * TINY.block_bytes,
    ) as engine:
        assert engine.core.vllm_config.max_concurrent_batches == 2
        churn.check(churn.run(engine, tokens, num_late=8, longest=2500))
