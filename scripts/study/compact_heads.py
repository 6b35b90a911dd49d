"""What heads keep of a prompt under a budget, and what the evicted tokens leave behind."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import torch
from key_choices import CHOICES, Evicted
from simulated_model import HeadCache, PromptReader, SimulatedModel

from vllm_heterocache.config import PAGE_SIZE, HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadAssignment
from vllm_heterocache.heads.budget import compact_blocks, page_budgets, spare_pages
from vllm_heterocache.heads.evicted_means import mean_pages
from vllm_heterocache.heads.profile import HeadProfile
from vllm_heterocache.heads.recipes import assign_heads
from vllm_heterocache.kernels.matched_tokens import (
    PART_TOKENS,
    WEIGHT_ITERATIONS,
    EvictedAttention,
    attention_lse,
    evicted_attention,
    fit_chosen,
)
from vllm_heterocache.kernels.page_select_ref import choose_pages_ref

# The first sixteenth of a prompt has no reference queries: its tokens have seen too little.
UNSEEN_SHARE = 1 / 16
# Multiples of it, modulo 1, are spread evenly whatever their number.
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Method:
    """What evicted tokens leave behind. Settings after the first are of matched tokens."""

    kind: Literal["pages", "means", "matched"]
    share: float = 0.5  # of the pages that are not protected: they hold matched tokens
    positions: int = 128  # of the prompt, whose queries are reference queries
    sample: Literal["random", "even", "last"] = "random"  # which positions of the prompt
    # reference queries are spread over so many positions behind the prompt; 0: they stay
    behind: int = 64
    keys: Literal["residual", "importance", "mean", "largest", "pursuit", "runs", "clusters"] = (
        "residual"
    )
    first_layer: float = 0.0  # share of the model's layers that keep pages alone
    budgets: Literal["profile", "evicted", "both"] = "profile"  # what a head's budget goes by
    part_tokens: int = PART_TOKENS  # that are compared with one another when keys are chosen
    block: int = 0  # tokens of the prompt that are fitted at once; 0 for all
    iterations: int = WEIGHT_ITERATIONS
    # whose output the values reproduce: the evicted tokens' or, with their share's error, the whole
    target: Literal["evicted", "whole"] = "evicted"
    pages: Literal["last", "reference"] = "last"  # the queries that choose pages
    precision: Literal["float32", "float64"] = "float32"
    stored: Literal["float32", "bfloat16"] = "float32"  # keys and values; biases are fp16 then

    @classmethod
    def parse(cls, text: str) -> Method:
        """From "matched,share=0.25,positions=64"; raises ValueError for what it does not know."""
        kind, *settings = text.split(",")
        types: dict[str, Any] = get_type_hints(cls)
        values = dict(one.partition("=")[::2] for one in settings) | {"kind": kind}
        unknown = values.keys() - types.keys()
        if unknown:
            raise ValueError(f"--methods {text}: {unknown.pop()!r} is none of {', '.join(types)}")
        parsed: dict[str, Any] = {}
        for name, value in values.items():
            allowed = get_args(types[name])
            if allowed and value not in allowed:
                raise ValueError(f"--methods {text}: {name} is one of {', '.join(allowed)}")
            parsed[name] = value if allowed else types[name](value)
        return cls(**parsed)

    def __str__(self) -> str:
        """What `parse` reads, without defaults."""
        changed = [
            f"{one.name}={getattr(self, one.name)}"
            for one in fields(self)
            if one.name != "kind" and getattr(self, one.name) != one.default
        ]
        return ",".join([self.kind, *changed])


@dataclass
class Prompt:
    """A prefilled prompt, and what several methods need of it."""

    model: SimulatedModel
    read: PromptReader
    seed: int
    _lse: dict[tuple, torch.Tensor] = field(default_factory=dict)
    _evicted: dict[tuple, EvictedAttention] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.read.keys[0])

    @property
    def num_pages(self) -> int:
        return self.num_tokens // PAGE_SIZE

    def group(self, layer: int, head: int, tokens: torch.Tensor) -> torch.Tensor:
        """[n, G, D] queries of a KV head's group at `tokens` [n]."""
        queries = self.read.queries[layer][tokens]
        return queries.unflatten(1, (self.model.num_kv_heads, -1))[:, head]

    def page_scores(self, layer: int, head: int) -> torch.Tensor:
        """[P] attention mass of the last query on each page, the largest of the group."""
        last = torch.tensor([self.num_tokens - 1], device=self.model.device)
        query = self.group(layer, head, last)[0].float() * self.model.scale
        keys = self.read.keys[layer][:, head].float()
        weights = (query @ keys.T).softmax(-1)[:, : self.num_pages * PAGE_SIZE]
        return weights.unflatten(-1, (-1, PAGE_SIZE)).sum(-1).amax(0)

    def reference_queries(self, layer: int, head: int, method: Method) -> torch.Tensor:
        """[1, N, D], scaled."""
        tokens = self._sample(method).to(self.model.device)
        queries = self.group(layer, head, tokens)
        if method.behind:
            spread = torch.arange(len(tokens), device=tokens.device) * GOLDEN_RATIO % 1
            place = self.num_tokens + (spread * method.behind).long()
            queries = self.model.rotated(queries, place - tokens)
        return queries.float().reshape(1, -1, self.model.head_dim) * self.model.scale

    def _sample(self, method: Method) -> torch.Tensor:
        """Positions of the prompt, in ascending order."""
        first, end = int(self.num_tokens * UNSEEN_SHARE), self.num_tokens
        count = min(method.positions, end - first)
        if method.sample == "last":
            return torch.arange(end - count, end)
        if method.sample == "even":
            return first + (torch.arange(count) + 1) * (end - first) // count - 1
        return torch.tensor(sorted(random.Random(self.seed).sample(range(first, end), count)))

    def reference_page_scores(self, layer: int, head: int, method: Method) -> torch.Tensor:
        """[P] mean share of each page under the reference queries."""
        queries = self.reference_queries(layer, head, method)
        lse = self.lse(layer, head, method, queries)
        keys, _ = _tokens(self, layer, head)
        shares = (queries @ keys.float().mT).sub_(lse[..., None]).exp_().mean((0, 1))
        return shares[: self.num_pages * PAGE_SIZE].view(-1, PAGE_SIZE).sum(1)

    def evicted_attention(
        self,
        layer: int,
        head: int,
        method: Method,
        start: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        is_evicted: torch.Tensor,
        queries: torch.Tensor,
        lse: torch.Tensor,
    ) -> EvictedAttention:
        """Of the tokens from `start` on; computed once for all methods that evict the same."""
        seen = method.sample, method.behind, method.positions, method.precision
        key = layer, head, seen, method.pages, start, keys.shape, int(is_evicted.sum())
        if key not in self._evicted:
            self._evicted[key] = evicted_attention(keys, values, is_evicted, queries, lse)
        return self._evicted[key]

    def lse(self, layer: int, head: int, method: Method, queries: torch.Tensor) -> torch.Tensor:
        """[1, N] of the reference queries; computed once for all methods that share them."""
        key = layer, head, method.sample, method.behind, method.positions
        if key not in self._lse:
            self._lse[key] = attention_lse(self.read.keys[layer][None, :, head], queries)
        return self._lse[key]


@dataclass(frozen=True)
class Compactor:
    """Compacts prompts as the engine does: roles, budgets, protected pages and page scores."""

    config: HeteroCacheConfig
    assignment: HeadAssignment

    @classmethod
    def of(cls, profile: HeadProfile, budget: float) -> Compactor:
        """Default options with a budget; raises ValueError where it is too small for the roles."""
        config = HeteroCacheConfig(gpu_budget=budget)
        assignment = assign_heads(
            profile,
            recipe=config.recipe,
            gpu_budget=budget,
            full_share=config.full_share,
            stability_threshold=config.stability_threshold,
            similarity_threshold=config.similarity_threshold,
        )
        return cls(config, assignment)

    def compact(self, prompt: Prompt, method: Method) -> list[list[HeadCache]]:
        """[L][H] what is kept. Raises ValueError where the budget is too small for the prompt."""
        budgets = self._budgets(prompt, method)
        left_behind = self._pages_left_behind(prompt, method, budgets)
        return [
            [
                self._head(prompt, method, layer, head, budgets, left_behind)
                for head in range(prompt.model.num_kv_heads)
            ]
            for layer in range(prompt.model.num_layers)
        ]

    def _budgets(self, prompt: Prompt, method: Method) -> np.ndarray:
        """[L, H] pages, those that the evicted tokens leave behind included."""
        if method.budgets == "profile":
            return self._page_budgets(prompt, self.assignment)
        profile = replace(method, budgets="profile")
        budgets = self._budgets(prompt, profile)
        missing = np.zeros(budgets.shape)
        for layer, head in np.argwhere(~self.assignment.full):
            keep = self._kept_tokens(prompt, method, layer, head, int(budgets[layer, head]))
            queries = prompt.reference_queries(layer, head, method)
            lse = prompt.lse(layer, head, method, queries)
            keys, values = _tokens(prompt, layer, head)
            missing[layer, head] = evicted_attention(
                keys, values, ~keep[None], queries, lse
            ).share.mean()
        weights = missing + 0.05
        if method.budgets == "both":
            weights = weights * self.assignment.weights
        weights[self.assignment.full] = 0
        return self._page_budgets(
            prompt, replace(self.assignment, weights=weights.astype(np.float32))
        )

    def _page_budgets(self, prompt: Prompt, assignment: HeadAssignment) -> np.ndarray:
        total = compact_blocks(prompt.num_tokens, self.config.gpu_budget) * assignment.num_heads
        spares = spare_pages(assignment, prompt.num_pages, total)
        least = min(self.config.min_pages, prompt.num_pages)
        return page_budgets(assignment, prompt.num_pages, total - spares, least)

    def _pages_left_behind(self, prompt: Prompt, method: Method, budgets: np.ndarray) -> np.ndarray:
        """[L, H] pages of the budgets that hold means or matched tokens."""
        layers = prompt.model.num_layers
        if method.kind == "means":
            return mean_pages(
                budgets, prompt.num_pages, self.config.min_pages, range(layers), layers
            )
        if method.kind == "pages":
            return np.zeros_like(budgets)
        protected = self.config.sink_pages + self.config.recent_pages
        pages = np.floor(method.share * (budgets - protected) + 0.5).astype(int)
        is_late = np.arange(layers) >= method.first_layer * layers
        return np.where((budgets < prompt.num_pages) & is_late[:, None], pages, 0)

    def _head(
        self,
        prompt: Prompt,
        method: Method,
        layer: int,
        head: int,
        budgets: np.ndarray,
        left_behind: np.ndarray,
    ) -> HeadCache:
        pages = int(left_behind[layer, head])
        keep = self._kept_tokens(prompt, method, layer, head, int(budgets[layer, head]) - pages)
        keys, values = (one[0] for one in _tokens(prompt, layer, head))
        kept = HeadCache(keys[keep], values[keep], torch.zeros(int(keep.sum())).to(keys.device))
        if not pages:
            return kept
        if method.kind == "means":
            more = means_of_runs(keys, values, ~keep, pages * PAGE_SIZE)
        else:
            more = matched(prompt, method, layer, head, ~keep, pages * PAGE_SIZE)
        return HeadCache(
            torch.cat([kept.keys.float(), more.keys]),
            torch.cat([kept.values.float(), more.values]),
            torch.cat([kept.bias, more.bias]),
        )

    def _kept_tokens(
        self, prompt: Prompt, method: Method, layer: int, head: int, num_pages: int
    ) -> torch.Tensor:
        """[T] bool: the tokens of the pages that a head keeps, and those behind all full pages."""
        if method.pages == "last":
            scores = prompt.page_scores(layer, head)
        else:
            scores = prompt.reference_page_scores(layer, head, method)
        chosen = choose_pages_ref(scores, num_pages, self.config.protected)
        keep = torch.ones(prompt.num_tokens, dtype=torch.bool, device=scores.device)
        keep[: prompt.num_pages * PAGE_SIZE] = False
        keep[: prompt.num_pages * PAGE_SIZE].view(-1, PAGE_SIZE)[chosen] = True
        return keep


def means_of_runs(
    keys: torch.Tensor, values: torch.Tensor, is_evicted: torch.Tensor, count: int
) -> HeadCache:
    """`count` means of runs of evicted pages, as kernels/page_means_ref.py makes them."""
    evicted = is_evicted.nonzero().flatten().view(-1, PAGE_SIZE)
    first = torch.arange(count + 1) * len(evicted) // count
    runs = [evicted[first[i] : first[i + 1]].flatten() for i in range(count)]
    bias = torch.full((count,), math.log(is_evicted.sum() / count), device=keys.device)
    return HeadCache(
        torch.stack([keys[run].float().mean(0) for run in runs]),
        torch.stack([values[run].float().mean(0) for run in runs]),
        bias,
    )


def matched(
    prompt: Prompt, method: Method, layer: int, head: int, is_evicted: torch.Tensor, count: int
) -> HeadCache:
    """`count` matched tokens of a head's evicted tokens."""
    keys, values = _tokens(prompt, layer, head)
    queries = prompt.reference_queries(layer, head, method)
    lse = prompt.lse(layer, head, method, queries)
    if method.precision == "float64":
        keys, values, queries, lse = (one.double() for one in (keys, values, queries, lse))
    size = method.block or prompt.num_tokens
    starts = range(0, prompt.num_tokens, size)
    parts = []
    for start, number in zip(starts, _counts(is_evicted, size, count), strict=True):
        if number:
            mine = slice(start, start + size)
            block = keys[:, mine], values[:, mine], is_evicted[None, mine]
            seen = prompt.evicted_attention(layer, head, method, start, *block, queries, lse)
            evicted = Evicted(keys[:, mine], queries, lse, seen, number, method.part_tokens)
            choice = CHOICES[method.keys](evicted)
            whole = _whole_output(method, keys, values, queries, lse)
            parts.append(
                fit_chosen(*block[:2], queries, lse, seen, *choice, method.iterations, whole)
            )
    found = [torch.cat([part[i][0] for part in parts]) for i in range(3)]
    if method.stored == "bfloat16":
        found = [found[0].bfloat16(), found[1].bfloat16(), found[2].half()]
    return HeadCache(*(one.float() for one in found))


def _whole_output(
    method: Method,
    keys: torch.Tensor,
    values: torch.Tensor,
    queries: torch.Tensor,
    lse: torch.Tensor,
) -> torch.Tensor | None:
    if method.target == "evicted":
        return None
    everything = torch.ones_like(keys[..., 0], dtype=torch.bool)
    return evicted_attention(keys, values, everything, queries, lse).output


def _counts(is_evicted: torch.Tensor, size: int, total: int) -> list[int]:
    """Matched tokens of each block of the prompt, in proportion to its evicted tokens."""
    evicted = torch.stack([block.sum() for block in is_evicted.split(size)]).cumsum(0)
    ends = (evicted * total // evicted[-1]).tolist()
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def whole_caches(prompt: Prompt) -> list[list[HeadCache]]:
    """[L][H] everything."""
    nothing = torch.zeros(prompt.num_tokens, device=prompt.model.device)
    return [
        [
            HeadCache(keys[:, head], values[:, head], nothing)
            for head in range(prompt.model.num_kv_heads)
        ]
        for keys, values in zip(prompt.read.keys, prompt.read.values, strict=True)
    ]


def _tokens(prompt: Prompt, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, T, D] keys and values of a head."""
    return prompt.read.keys[layer][None, :, head], prompt.read.values[layer][None, :, head]
