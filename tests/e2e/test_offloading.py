"""vLLM's OffloadingConnector beside ours: prompts are copied to the host while they are dense."""

from __future__ import annotations

import numpy as np
import parallel
import pytest

from vllm_heterocache.heads.matched_tokens import REFERENCE_POSITIONS

PAGE, LENGTH = 16, 900
OFFLOADING = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "cpu_bytes_to_use": 64 << 20,
        "spec_name": "HostOffloadingSpec",
        "spec_module_path": "host_offload",
    },
}


@pytest.mark.feature("KV offloading of vLLM")
def test_a_prompt_that_the_gpu_forgot_is_loaded_from_the_host(tmp_path):
    """Blocks are reused, and filled with NaN, while late copies of others are under way. Finders
    fetch the same pages from the host pool both times."""
    from vllm import SamplingParams

    model = parallel.write_model(tmp_path, "float32")
    options = parallel.options(model, parallel.BUDGET, debug_poison=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    prompts = np.random.default_rng(7).integers(0, 499, (5, LENGTH)).tolist()
    settings = {"kv_cache_memory_bytes": 20 << 20, "tensor_parallel_size": 1}
    with parallel.start(model, options, kv_transfer_config=OFFLOADING, **settings) as engine:
        total = engine.num_free
        first = engine.run(prompts, sampling)
        assert engine.num_free == total and total < len(prompts) * LENGTH // PAGE
        assert engine.llm.reset_prefix_cache()
        again = engine.run(prompts, sampling)
        metrics = engine.metrics()
    for name, output in again.items():
        assert first[name].num_cached_tokens == 0
        assert output.num_cached_tokens >= LENGTH - REFERENCE_POSITIONS - 2 * PAGE
        assert output.outputs[0].token_ids == first[name].outputs[0].token_ids
    assert metrics["requests_compacted{}"] == 2 * len(prompts)
    assert metrics["pages_fetched{}"] > 0
