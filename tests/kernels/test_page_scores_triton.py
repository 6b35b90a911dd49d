"""`page_scores` against its reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from dense_prompt import DensePrompt, make_dense_prompt
from triton_mode import DEVICE, FP8_ON_DEVICE, ON_GPU

from vllm_heterocache.kernels import page_scores as module
from vllm_heterocache.kernels.page_scores import (
    PageScoresLaunch,
    page_scores,
    page_scores_workspace,
)
from vllm_heterocache.kernels.page_scores_ref import page_scores_ref

CASES = [  # tokens, L, H, G, D, dtype
    (16, 1, 1, 1, 64, torch.float32),
    (63, 2, 3, 2, 64, torch.bfloat16),
    (64, 2, 1, 4, 128, torch.bfloat16),
    (257, 1, 2, 4, 128, torch.float16),
    (97, 3, 2, 8, 64, torch.float16),
    (80, 2, 1, 3, 256, torch.bfloat16),
    (49, 1, 2, 5, 128, torch.float16),
    (127, 1, 1, 7, 64, torch.float32),
    (79, 1, 1, 16, 64, torch.bfloat16),
]
LARGE_CASES = [
    (20011, 2, 8, 4, 128, torch.bfloat16),
    (130001, 1, 8, 4, 128, torch.bfloat16),
    (66666, 1, 3, 3, 64, torch.float16),
    (9001, 2, 2, 6, 256, torch.bfloat16),
]


def case_id(case) -> str:
    return "T{}-L{}-H{}-G{}-D{}-{}".format(*case[:5], str(case[5])[6:])


def make_outputs(case) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and a workspace of just the size that is asked for, both NaN."""
    num_tokens, num_layers, num_kv_heads, group = case[:4]
    size = page_scores_workspace(num_tokens, num_kv_heads, group)
    scores = torch.full((num_layers, num_kv_heads, num_tokens // 16), torch.nan, device=DEVICE)
    return scores, torch.full((size,), torch.nan, device=DEVICE)


def check(
    case, prompt: DensePrompt, scale: float, launch=None, rtol: float = 1e-4, logits=(None, 0.0)
) -> None:
    """`logits`: of the sinks, and their soft cap."""
    inputs = prompt.last_query, prompt.pages, prompt.dense_blocks, case[0], scale
    expected, _ = make_outputs(case)
    page_scores_ref(*inputs, expected, prompt.kv_scales, *logits)
    actual, workspace = make_outputs(case)
    page_scores(*inputs, actual, workspace, launch, prompt.kv_scales, *logits)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("case", CASES + LARGE_CASES if ON_GPU else CASES, ids=case_id)
def test_scores_are_those_of_the_reference_and_nothing_else_is_read(case, generator):
    check(case, make_dense_prompt(*case, generator), case[4] ** -0.5)


@pytest.mark.parametrize("page_dtype", FP8_ON_DEVICE, ids=str)
@pytest.mark.parametrize("case", CASES[1:6], ids=case_id)
def test_keys_of_fp8_pages_are_scaled(case, page_dtype, generator):
    check(case, make_dense_prompt(*case, generator, page_dtype), case[4] ** -0.5)


@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("group", [4, 24, 64])
def test_sinks_soft_caps_and_wide_groups(group, has_sinks, soft_cap, generator):
    case = (111, 2, 2, group, 64, torch.bfloat16)
    sinks = 4 * torch.randn(2, 2 * group, generator=generator, device=DEVICE).bfloat16()
    logits = (sinks if has_sinks else None, soft_cap)
    check(case, make_dense_prompt(*case, generator), 0.125, logits=logits)


@pytest.mark.parametrize("max_programs", [1, 2, 5, 9])
def test_runs_of_any_length_give_the_same(max_programs, generator, monkeypatch):
    monkeypatch.setattr(module, "MAX_PROGRAMS", max_programs)
    case = (747, 1, 2, 3, 64, torch.float16)
    check(case, make_dense_prompt(*case, generator), 0.125)


@pytest.mark.parametrize("tile_tokens", [16, 32, 128])
def test_tiles_of_every_size_give_the_same(tile_tokens, generator):
    case = (300, 1, 1, 4, 64, torch.bfloat16)
    launch = PageScoresLaunch(tile_tokens=tile_tokens)
    check(case, make_dense_prompt(*case, generator), 0.125, launch)


def test_many_runs_and_many_pages(generator):
    """More than one block of runs, and of pages, in the second launch."""
    num_tokens = (module.SCORE_PAGES + 1) * 16 + 5
    assert num_tokens // 32 > module.SCORE_RUNS
    case = (num_tokens, 1, 1, 2, 64, torch.float16)
    launch = PageScoresLaunch(tile_tokens=32)
    check(case, make_dense_prompt(*case, generator), 0.125, launch)


def test_two_million_tokens(generator):
    case = (2097149, 1, 1, 2, 16, torch.float16)
    launch = None if ON_GPU else PageScoresLaunch(tile_tokens=16384)
    check(case, make_dense_prompt(*case, generator), 0.25, launch)


@pytest.mark.parametrize("place", [0, 40, 150, 162])
def test_one_token_may_draw_nearly_everything(place, generator):
    """Logits of hundreds, which overflow without a running maximum; at 162 in the partial page."""
    case = (163, 1, 1, 2, 64, torch.float16)
    prompt = make_dense_prompt(*case, generator)
    row = prompt.pages[prompt.dense_blocks[place // 16].item(), place % 16]
    row[:64] = prompt.last_query[0, 0] * 4
    check(case, prompt, 1.0, rtol=1e-3)


def test_a_prompt_without_a_full_page_writes_nothing(generator):
    case = (15, 2, 1, 1, 64, torch.float16)
    prompt = make_dense_prompt(*case, generator)
    scores, workspace = make_outputs(case)
    page_scores(*prompt[:3], 15, 0.125, scores, workspace)
    assert workspace.isnan().all()


@pytest.mark.gpu
def test_prompts_of_all_lengths_share_one_compiled_kernel(generator):
    kernels = [module._page_lse_kernel, module._share_kernel]

    def num_compiled() -> list[int]:
        device = torch.cuda.current_device()
        return [len(kernel.device_caches[device][0]) for kernel in kernels]

    sizes = [16, 17, 160, 1024, 5003]
    for i, num_tokens in enumerate(sizes):
        case = (num_tokens, 2, 1, 4, 64, torch.bfloat16)
        check(case, make_dense_prompt(*case, generator), 0.125)
        if i == 0:
            before = num_compiled()
    assert num_compiled() == before
