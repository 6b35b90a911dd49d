"""What stand-ins weigh and give while pages that they stand for are in a head's list.

C checks, P full pages, m stand-ins (means, then matched tokens), N reference queries. State 0 of
C + 1 is what compaction left; state c is what check c - 1 asked for.
"""

from __future__ import annotations

import torch
from compact_heads import KeptHead, Method, Prompt

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.kernels.bounded_least_squares_ref import bounded_descent_ref
from vllm_heterocache.kernels.matched_tokens import (
    ABSENT_BIAS,
    LARGEST_WEIGHT,
    LEAST_WEIGHT,
    VALUE_RIDGE,
    WEIGHT_RIDGE,
    largest_eigenvalue,
)

# Elements of one temporary of a fit over checks.
FIT_ELEMENTS = 1 << 26
# A weight that stands for pages which left the list grows so many times at most.
MOST_GROWTH = 8.0
REFIT_ITERATIONS = 200


class Counting:
    """What a head's stand-ins weigh and give while pages that they stand for are in its list.

    twice: what they did before, as in the engine; pages that left the list are in nothing.
    means: a mean stands for those of its run's tokens that are not in the list.
    own: so it does, and a matched token weighs 1 less while its own page is in the list.
    shares: a matched token loses, or gains, the part of its weight that stems from pages which are
        in the list, or left it: each token's attention counts for the matched token it is most
        alike, as reference queries see it.
    refit: weights and values of the same keys are fitted anew, exactly.
    """

    def __init__(self, prompt: Prompt, method: Method, layer: int, head: int, kept: KeptHead):
        self._method, self._kept = method, kept
        self._keys = prompt.read.keys[layer][:, head].float()
        self._values = prompt.read.values[layer][:, head].float()
        self._full = prompt.num_pages * PAGE_SIZE
        self._queries = prompt.reference_queries(layer, head, method)[0]  # [N, D]

    def of(self, held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Biases [C + 1, m] and values [C + 1, m, D] at lists [C + 1, P]; one state of either
        where it does not change."""
        stand_ins, num_means = self._kept.stand_ins, self._kept.num_means
        bias, values = stand_ins.bias[None], stand_ins.values[None]
        if self._method.counted == "twice":
            return bias, values
        bias = bias.repeat(len(held), 1)
        gone = (~held).float()  # [C + 1, P]
        if num_means:
            bias[:, :num_means] += self._growth_of_means(gone)
            bias.clamp_(min=ABSENT_BIAS)
        if self._method.counted == "means" or num_means == bias.shape[1]:
            return bias, values
        matched = bias[:, num_means:]
        if self._method.counted == "own":
            page = self._places() // PAGE_SIZE
            less = (matched.exp() - 1).clamp(min=LEAST_WEIGHT).log()
            bias[:, num_means:] = torch.where(held[:, page], less, matched)
        elif self._method.counted == "shares":
            bias[:, num_means:] += self._growth_of_matched(gone)
        else:
            of_means = (stand_ins.keys[:num_means], values[0, :num_means], bias[:, :num_means])
            fitted, given = self._refit(gone, *of_means)
            bias[:, num_means:] = fitted
            means = values[:, :num_means].expand(len(held), -1, -1)
            values = torch.cat([means, given], 1)
        return bias, values

    def _places(self) -> torch.Tensor:
        """[m] tokens of the prompt whose keys were taken; looked up by a sum of their elements."""
        factors = torch.arange(1, self._keys.shape[1] + 1, device=self._keys.device).sqrt().double()
        of_prompt = (self._keys.double() * factors).sum(1)
        keys = self._kept.stand_ins.keys[self._kept.num_means :]
        of_taken = (keys.double() * factors).sum(1)
        return (of_taken[:, None] - of_prompt[None]).abs().argmin(1)

    def _growth_of_means(self, gone: torch.Tensor) -> torch.Tensor:
        """[C + 1, k]: logarithm of the share of its tokens that each mean stands for now. A page
        that left the list counts for the run before it."""
        evicted, count = ~self._kept.pages, self._kept.num_means
        run = (evicted.cumsum(0) * count - 1) // max(int(evicted.sum()), 1)
        of_run = torch.nn.functional.one_hot(run.clamp(min=0), count).float()  # [P, k]
        before = evicted.float() @ of_run
        return (gone @ of_run / before.clamp(min=1)).log().clamp(min=ABSENT_BIAS)

    def _shares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, P * PAGE_SIZE] of the tokens of full pages, and the log-sum-exp [N] of all."""
        logits = self._queries @ self._keys.T
        lse = logits.logsumexp(-1)
        return (logits[:, : self._full] - lse[:, None]).exp(), lse

    def _growth_of_matched(self, gone: torch.Tensor) -> torch.Tensor:
        """[C + 1, m]: logarithm of how much each matched token is to stand for, by what it did."""
        shares, _ = self._shares()
        units = shares / shares.norm(dim=0).clamp(min=1e-30)
        alike = units[:, self._places()].T @ units  # [m, tokens]
        mass = torch.zeros_like(alike).scatter_(0, alike.argmax(0)[None], shares.sum(0)[None])
        of_page = mass.unflatten(1, (-1, PAGE_SIZE)).sum(2).T  # [P, m]
        before = (~self._kept.pages).float() @ of_page
        growth = torch.where(before > 0, gone @ of_page / before.clamp(min=1e-30), 1)
        return growth.clamp(LEAST_WEIGHT, MOST_GROWTH).log()

    def _refit(
        self,
        gone: torch.Tensor,
        mean_keys: torch.Tensor,
        mean_values: torch.Tensor,
        mean_bias: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Biases [C + 1, m] and values [C + 1, m, D], beside means with biases [C + 1, k].

        kernels/matched_tokens.py with the products of columns formed first, because the columns
        are the same at all checks: what is asked for is a sum over the pages that are gone.
        """
        shares, lse = self._shares()
        shares, places = shares.double(), self._places()
        mine, own = shares[:, places], self._values[places].double()
        products = mine.T @ mine
        alike = (mine.T @ shares).unflatten(1, (-1, PAGE_SIZE))  # [m, P, tokens]
        wide = self._values[: self._full].double().unflatten(0, (-1, PAGE_SIZE))
        by_page = alike.sum(2).T, torch.einsum("mpt,ptd->pmd", alike, wide)
        of_means = mine.T @ (self._queries @ mean_keys.T - lse[:, None]).exp().double()  # [m, k]
        gone, mean_weight = gone.double(), mean_bias.double().exp()
        wanted = gone @ by_page[0] - mean_weight @ of_means.T
        weights = bounded_fit(products, wanted, REFIT_ITERATIONS)
        parts = []
        for some in torch.arange(len(gone)).split(max(1, FIT_ELEMENTS // products.numel())):
            first = slice(int(some[0]), int(some[-1]) + 1)
            weight = weights[first, :, None]
            output = torch.einsum("cp,pmd->cmd", gone[first], by_page[1])
            output -= torch.einsum(
                "ck,mk,kd->cmd", mean_weight[first], of_means, mean_values.double()
            )
            output -= products @ (weight * own)
            weighted = products * weight * weight.mT
            squares = weighted.diagonal(dim1=1, dim2=2)
            squares += VALUE_RIDGE * squares.mean(1, keepdim=True)
            parts.append(own + torch.linalg.solve(weighted, weight * output))
        return weights.log().float(), torch.cat(parts).float()


def bounded_fit(products: torch.Tensor, wanted: torch.Tensor, iterations: int) -> torch.Tensor:
    """[C, m]: the weights of kernels/matched_tokens.py for C targets of the same columns.

    Args:
        products: [m, m] of the columns.
        wanted: [C, m], products of the columns and each target.
    """
    norm = products.diagonal().sqrt().clamp(min=1e-30)
    scaled, wanted = products / norm / norm[:, None], wanted / norm
    least, most = LEAST_WEIGHT * norm, LARGEST_WEIGHT * norm
    step = 1 / (largest_eigenvalue(scaled[None]) + WEIGHT_RIDGE).expand(len(wanted))
    scaled.diagonal().add_(WEIGHT_RIDGE)
    start = torch.clamp(torch.linalg.solve(scaled, wanted.T).T, least, most)

    def slope(weights: torch.Tensor) -> torch.Tensor:
        return weights @ scaled - wanted

    solution = bounded_descent_ref(slope, start, least, most, step, iterations)
    return solution / norm
