"""One engine prefills and another one decodes, over vLLM's NixlConnector. It needs NIXL
(`pip install nixl`)."""

from __future__ import annotations

import numpy as np
import parallel
import prefill_engine
import pytest

from vllm_heterocache.heads.matched_tokens import REFERENCE_POSITIONS

pytest.importorskip("nixl", reason="NIXL is not installed")

PAGE, LENGTHS = 16, (900, 901, 500, 40)


@pytest.mark.parametrize("gpu_budget", [1.0, parallel.BUDGET])
def test_a_received_prompt_is_answered_as_one_that_was_prefilled_here(
    tmp_path, monkeypatch, gpu_budget
):
    from vllm import SamplingParams

    model = parallel.write_model(tmp_path, "float32")
    options = parallel.options(model, gpu_budget, debug_poison=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    rng = np.random.default_rng(7)
    prompts = [rng.integers(0, 499, length).tolist() for length in LENGTHS]
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", prefill_engine.free_port())
    settings = {"tensor_parallel_size": 1, "kv_transfer_config": prefill_engine.nixl("kv_consumer")}
    with (
        prefill_engine.start(model, options, tensor_parallel_size=1) as elsewhere,
        parallel.start(model, options, **settings) as engine,
    ):
        total = engine.num_free
        here = engine.run(prompts, sampling)
        assert engine.llm.reset_prefix_cache()
        received = elsewhere.prefill(prompts)
        params = [SamplingParams(
            temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False,
            extra_args={"kv_transfer_params": one}) for one in received]
        there = engine.run(prompts, params)
        assert engine.num_free == total
        metrics, state = engine.metrics(), elsewhere.state()
    for name, output in there.items():
        print(name, here[name].num_cached_tokens, output.num_cached_tokens,
              here[name].outputs[0].token_ids, output.outputs[0].token_ids)
    print(metrics, state)
