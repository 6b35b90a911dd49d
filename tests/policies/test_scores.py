"""The published formulas, written out in loops, against what the policies compute."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.heads.budget import compact_blocks, page_budgets
from vllm_heterocache.policies.cake import LEAST_WEIGHT, Cake
from vllm_heterocache.policies.chunkkv import ChunkKV
from vllm_heterocache.policies.h2o import H2O
from vllm_heterocache.policies.policy import Shard
from vllm_heterocache.policies.pyramidkv import PyramidKV
from vllm_heterocache.policies.snapkv import SnapKV
from vllm_heterocache.policies.window import ALWAYS

LAYERS, HEADS, GROUP = 3, 2, 3


class FakePrompt:
    """Random attention: [L, H, G, W, P], which adds up to less than 1 (a partial last page)."""

    def __init__(self, window: int = 5, num_pages: int = 11, kept_pages: int = 6) -> None:
        generator = torch.Generator().manual_seed(window)
        shape = (LAYERS, HEADS, GROUP, window, num_pages + 1)
        self.mass = torch.rand(shape, generator=generator).pow(3)
        self.mass = (self.mass / self.mass.sum(-1, keepdim=True))[..., :-1]
        self.shape, self.num_pages, self.kept_pages = (LAYERS, HEADS), num_pages, kept_pages
        self.window, self.device = window, torch.device("cpu")
        self.asked: list[int] = []

    def window_mass(self, layer: int) -> torch.Tensor:
        self.asked.append(layer)
        return self.mass[layer]

    def accumulated_mass(self) -> torch.Tensor:
        return self.mass.sum(dim=(2, 3))

    def over_window(self, layer: int, head: int, member: int, page: int) -> list[float]:
        return self.mass[layer, head, member, :, page].double().tolist()


def slow_scores(prompt: FakePrompt, of_page, group: str, width: int) -> torch.Tensor:
    """[L, H, P]; `of_page` makes a score of one query head's masses over the window."""
    join = statistics.fmean if group == "mean" else max
    scores = torch.empty(LAYERS, HEADS, prompt.num_pages)
    for layer in range(LAYERS):
        for head in range(HEADS):
            own = [
                join([of_page(prompt.over_window(layer, head, g, p)) for g in range(GROUP)])
                for p in range(prompt.num_pages)
            ]
            for page in range(prompt.num_pages):
                first = max(0, page - width // 2)
                scores[layer, head, page] = max(own[first : page + width // 2 + 1])
    return scores


@pytest.mark.parametrize("group", ["mean", "max"])
@pytest.mark.parametrize("width", [1, 3, 5])
@pytest.mark.parametrize(("window", "own_pages"), [(5, 1), (17, 2), (32, 2), (33, 3), (300, 11)])
def test_snapkv_averages_over_the_window_and_keeps_the_windows_pages(
    group, width, window, own_pages
):
    prompt = FakePrompt(window)
    policy = SnapKV(window=window, pool_pages=width, group=group)
    scores = policy.scores(prompt)
    expected = slow_scores(prompt, statistics.fmean, group, width)
    before = prompt.num_pages - own_pages
    torch.testing.assert_close(scores[..., :before], expected[..., :before])
    assert bool((scores[..., before:] == ALWAYS).all())


@pytest.mark.parametrize("window", [1, 2, 20])
def test_cake_scores_pages_by_mean_and_variance(window):
    def indicator(masses: list[float]) -> float:
        return statistics.fmean(masses) + 7 * (statistics.variance(masses) if window > 1 else 0)

    prompt = FakePrompt(window)
    scores = Cake(window=window, gamma=7.0).rank(prompt).scores
    expected = slow_scores(prompt, indicator, "mean", 1)
    torch.testing.assert_close(scores[..., :9], expected[..., :9])


@pytest.mark.parametrize(("tau1", "tau2"), [(1.0, 1.0), (1.6, 0.4)])
def test_cake_weighs_layers_by_entropy_and_variance_before_the_window(tau1, tau2):
    prompt = FakePrompt(20)
    prompt.mass[1] = prompt.mass[1].pow(2)  # a layer that is more concentrated
    preferences = []
    for layer in range(LAYERS):
        entropy = variance = 0.0
        for head in range(HEADS):
            for member in range(GROUP):
                for page in range(11 - 2):
                    masses = prompt.over_window(layer, head, member, page)
                    entropy -= sum(m * math.log(m) for m in masses)
                    variance += statistics.variance(masses)
        preferences.append(entropy ** (1 / tau1) * variance ** (1 / tau2))
    weights = Cake(tau1=tau1, tau2=tau2).rank(prompt).weights
    assert weights.shape == (LAYERS, HEADS)
    for layer, preference in enumerate(preferences):
        np.testing.assert_allclose(weights[layer], preference / max(preferences), rtol=1e-4)


def test_cake_weighs_alike_where_nothing_shifts_and_lets_no_layer_go():
    prompt = FakePrompt(1)
    assert (Cake(window=1).rank(prompt).weights == 1).all()
    still = FakePrompt(8)
    still.mass[2] = 1 / 12
    weights = Cake(window=8, tau2=0.1).rank(still).weights
    assert (weights[2] == LEAST_WEIGHT).all() and (weights > 0).all() and weights.max() == 1


@pytest.mark.parametrize("pool_pages", [23, 2**31 + 1, 10**30 + 1])
def test_a_pool_wider_than_the_prompt_gives_every_page_the_best_score(pool_pages):
    prompt = FakePrompt(17)
    scores = SnapKV(window=17, pool_pages=pool_pages).scores(prompt)
    best = slow_scores(prompt, statistics.fmean, "mean", 1).amax(dim=-1, keepdim=True)
    torch.testing.assert_close(scores[..., :9], best.expand(-1, -1, 9))


@pytest.mark.parametrize(
    ("chunk_pages", "reuse_layers"),
    [(1, 1), (4, 1), (4, 2), (3, 3), (50, 2), (2**40, 10**30), (10**30, 1)],
)
def test_chunkkv_scores_chunks_alike_in_all_heads_and_reuses_layers(chunk_pages, reuse_layers):
    prompt = FakePrompt()
    scores = ChunkKV(chunk_pages=chunk_pages, reuse_layers=reuse_layers).scores(prompt)
    own = slow_scores(prompt, statistics.fmean, "mean", 1)
    for layer in range(LAYERS):
        chooser = layer - layer % reuse_layers
        for page in range(10):  # the last one is the window's
            first = page - page % chunk_pages
            chunk = own[chooser, :, first : min(first + chunk_pages, 11)]
            torch.testing.assert_close(scores[layer, 0, page], chunk.mean())
        assert torch.equal(scores[layer, 0], scores[layer, 1])
    assert prompt.asked == list(range(0, LAYERS, reuse_layers))


@pytest.mark.parametrize(("share", "recent"), [(0.5, 3), (0.0, 0), (1.0, 6), (0.4, 2)])
def test_h2o_keeps_heavy_hitters_and_a_share_of_recent_pages(share, recent):
    prompt = FakePrompt()
    scores = H2O(recent_share=share).scores(prompt)
    expected = prompt.accumulated_mass()
    assert torch.equal(scores[..., : 11 - recent], expected[..., : 11 - recent])
    assert bool((scores[..., 11 - recent :] == ALWAYS).all())
    assert bool((prompt.accumulated_mass() < 100).all()), "the prompt's own sums were changed"


# the authors' rule in tokens: k_last = (C - a) / beta, k_first = 2 (C - a) - k_last, a line
# between; where k_first is over the prompt, it is the prompt and k_last = 2 (C - a) - k_first
@pytest.mark.parametrize("budget", [0.1, 0.3, 0.5, 0.6, 0.9])
@pytest.mark.parametrize("beta", [1, 14, 20])
def test_pyramidkv_gives_layers_a_falling_line_of_the_same_total(budget, beta):
    num_tokens, num_layers = 10_000, 30
    capacity = budget * num_tokens
    last = capacity / beta
    first = 2 * capacity - last
    if first > num_tokens:
        first = num_tokens
        last = 2 * capacity - first
    step = (first - last) / (num_layers - 1)
    shares = PyramidKV(beta=beta).layer_shares(budget, num_layers)
    for layer, share in enumerate(shares):
        assert share * num_tokens == pytest.approx(first - layer * step)
    assert shares.mean() == pytest.approx(budget)


def test_pyramidkv_budgets_are_whole_pages_above_the_floor():
    config = HeteroCacheConfig(policy="pyramidkv", gpu_budget=0.3)
    assignment = PyramidKV().assign(config, Shard(range(30), range(3), 30))
    total = compact_blocks(4000, 0.3) * 90
    budgets = page_budgets(assignment, 250, total, config.min_pages)
    assert budgets.sum() == total == 75 * 90
    by_layer = budgets.mean(axis=1)
    assert (np.diff(by_layer) <= 0.4).all() and by_layer[0] > 140 and by_layer[-1] == 5
    assert (budgets.max(axis=1) - budgets.min(axis=1) <= 1).all()


def test_pyramidkv_ranks_take_their_part_of_the_line():
    config = HeteroCacheConfig(policy="pyramidkv", gpu_budget=0.2)
    whole = PyramidKV().assign(config, Shard(range(8), range(2), 8)).weights
    part = PyramidKV().assign(config, Shard(range(4, 8), [1], 8)).weights
    assert np.array_equal(part[:, 0], whole[4:, 1])
