"""Preemption in the middle of decode: vLLM frees a request, replays it, and it compacts again."""

from __future__ import annotations

import numpy as np
import parallel
import pytest

from common.profiles import TINY

POOL_BLOCKS = 190


@pytest.mark.feature("Preemption", "float32")
def test_preempted_requests_finish_and_leak_nothing(tmp_path):
    """In float32 batching does not change what the first request says, nor what its finders fetch.
    (test_churn.py preempts under drift.)"""
    from vllm import SamplingParams

    def greedy(max_tokens: int) -> SamplingParams:
        return SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )

    model = parallel.write_model(tmp_path, "float32")
    prompts = np.random.default_rng(0).integers(0, TINY.vocab_size, (4, 1000)).tolist()
    with parallel.start(
        model,
        parallel.options(model, 0.5),
        dtype="float32",
        tensor_parallel_size=1,
        max_model_len=1400,
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=(POOL_BLOCKS + 1) * TINY.block_bytes,
    ) as engine:
        free_before = engine.num_free
        assert free_before == POOL_BLOCKS
        outputs = engine.run(prompts, greedy(260))
        metrics = engine.metrics()
        alone = engine.run(prompts[:1], greedy(100))["0"].outputs[0].token_ids
        assert engine.num_free == free_before
    assert [len(outputs[str(i)].outputs[0].token_ids) for i in range(4)] == [260] * 4
    assert metrics["requests_compacted{}"] > len(prompts), "none was preempted"
    assert metrics["pages_fetched{}"] > 0
    # The first to come is the last to be preempted.
    assert list(outputs["0"].outputs[0].token_ids[:100]) == list(alone)
