"""What heads keep of a prompt under a budget, and what the evicted tokens leave behind."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from simulated_model import HeadCache, PromptReader, SimulatedModel

from vllm_heterocache.config import PAGE_SIZE, HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole
from vllm_heterocache.heads.budget import compact_blocks, page_budgets, spare_pages
from vllm_heterocache.heads.evicted_means import layers_with_means, mean_pages
from vllm_heterocache.heads.matched_tokens import most_pages
from vllm_heterocache.heads.profile import HeadProfile
from vllm_heterocache.heads.recipes import configured_heads
from vllm_heterocache.kernels.matched_tokens import (
    WEIGHT_ITERATIONS,
    find_candidates,
    match_candidates,
)
from vllm_heterocache.kernels.page_select_ref import choose_pages_ref
from vllm_heterocache.kernels.run_means import RunMeans, beside_means, run_means

# The first sixteenth of a prompt has no reference queries: its tokens have seen too little.
UNSEEN_SHARE = 1 / 16
# Multiples of it, modulo 1, are spread evenly whatever their number.
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


Fetch = Literal["none", "pivot", "own", "mean", "offset", "bounds", "halves", "bits"]


# Settings of Method that are of pages which come back.
OF_RETRIEVAL = (
    "fetch",
    "fetched_for",
    "fetchers",
    "key_bits",
    "lag",
    "interval",
    "beside",
    "decay",
    "drift",
    "moves",
    "most",
    "counted",
)


@dataclass(frozen=True)
class Method:
    """What evicted tokens leave behind. Settings after the first are of matched tokens."""

    kind: Literal["pages", "means", "matched"]
    full_share: float | None = None  # of the budget, for heads that are whole; None: the engine's
    share: float = 0.5  # of the pages that are not protected: they hold matched tokens
    # on these tokens of a head, as a share of its reference queries; None: the engine's
    bound: float | None = None
    positions: int = 128  # of the prompt, whose queries are reference queries
    sample: Literal["random", "even", "last", "mixed"] = "last"  # which positions of the prompt
    step: int = 1  # between the last positions
    elsewhere: float = 0.5  # of mixed positions: the share that is even, the others are the last
    # reference queries are spread over so many positions behind the prompt; 0: they stay
    behind: int = 64
    first_layer: float = 0.0  # share of the model's layers that keep pages alone
    # share of these tokens that are means, where the engine has means, whose share is
    # heads/matched_tokens.py's; matched tokens are fitted to what these means do not do
    means: float = 0.0
    iterations: int = WEIGHT_ITERATIONS
    # whose attention chooses pages: that of the last query, of the reference queries, of these by
    # the query head that attends most, the sum of the first two, or of any of them the largest
    pages: Literal["last", "reference", "largest", "both", "any"] = "last"
    chosen_by: int = 0  # reference positions that choose pages, evenly spread; 0: all
    stored: Literal["float32", "bfloat16"] = "float32"  # keys and values; biases are fp16 then
    # Of pages that come back, all below (retrieval.py). By whose scores they are chosen.
    fetch: Fetch = "none"
    fetched_for: Literal["satellites", "compressed"] = "satellites"
    fetchers: int = 0  # of these, those of the largest weights alone; 0: all
    key_bits: int = 1  # of keys whose channels are rounded within their page
    lag: int = 2  # tokens from the check to the first that reads what it chose
    interval: int = 2  # tokens between two checks
    beside: int = 0  # checks by which satellites in their pivot's own layer are later than others
    decay: float = 0.0  # of scores from check to check, which are running means; 0: the last
    drift: float = 0.0  # overlap of the pivot under which it asks for pages; 0: it always does
    moves: Literal["all", "spare"] = "all"  # what comes at a check: spare pages bound it
    # pages that a head gets at a check, at most; 0: `moves` says. Fetchers that have it exchange
    # pages, as the engine's finders do (MAX_EXCHANGED), and no page of the budget is set aside
    most: int = 0
    # what stands for a page that is there: as before, less of it, or fitted anew
    counted: Literal["twice", "means", "own", "shares", "refit"] = "twice"

    def without_retrieval(self) -> Method:
        """The method that keeps the same, and fetches nothing."""
        plain = Method(self.kind)
        return replace(self, **{name: getattr(plain, name) for name in OF_RETRIEVAL})

    @classmethod
    def parse(cls, text: str) -> Method:
        """From "matched,share=0.25,positions=64"; raises ValueError, naming the setting, for what
        it does not know, and for numbers that a setting cannot have."""
        kind, *settings = text.split(",")
        types: dict[str, Any] = get_type_hints(cls)
        values = dict(one.partition("=")[::2] for one in settings) | {"kind": kind}
        unknown = values.keys() - types.keys()
        if unknown:
            raise ValueError(f"--methods {text}: {unknown.pop()!r} is none of {', '.join(types)}")
        parsed: dict[str, Any] = {}
        for name, value in values.items():
            if get_origin(types[name]) is Literal:
                allowed = get_args(types[name])
                if value not in allowed:
                    raise ValueError(f"--methods {text}: {name} is one of {', '.join(allowed)}")
                parsed[name] = value
            else:
                number = (*get_args(types[name]), types[name])[0]  # of `float | None` float
                try:
                    parsed[name] = number(value)
                except ValueError:
                    raise ValueError(
                        f"--methods {text}: {name} is {'an' if number is int else 'a'} "
                        f"{number.__name__}, not {value!r}"
                    ) from None
        without = {
            "fetchers": "all heads",
            "most": "no bound",
            "bound": "no matched tokens",
            "chosen_by": "all reference positions",
        }
        for name, nothing in without.items():
            if parsed.get(name, 0) < 0:
                raise ValueError(
                    f"--methods {text}: {name} is below 0; give a number, or 0 for {nothing}"
                )
        if parsed.get("most") and parsed.get("moves") == "spare":
            raise ValueError(
                f"--methods {text}: most and moves=spare bound the same pages; remove either"
            )
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

    @property
    def num_tokens(self) -> int:
        return len(self.read.keys[0])

    @property
    def num_pages(self) -> int:
        return self.num_tokens // PAGE_SIZE

    @property
    def query_heads(self) -> int:
        """Of a KV head."""
        return self.read.queries[0].shape[1] // self.model.num_kv_heads

    def tokens_of(self, pages: torch.Tensor) -> torch.Tensor:
        """[..., T] bool: tokens of pages [..., P], and those behind all full pages."""
        behind = pages.new_ones(*pages.shape[:-1], self.num_tokens - self.num_pages * PAGE_SIZE)
        return torch.cat([pages.repeat_interleave(PAGE_SIZE, -1), behind], -1)

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
        count = min(method.positions, (end - first) // method.step)
        if method.sample == "last":
            return end - 1 - torch.arange(count).flip(0) * method.step
        if method.sample == "even":
            return _even(first, end, count)
        if method.sample == "mixed":
            num_even = round(method.elsewhere * count)
            last = torch.arange(end - count + num_even, end)
            return torch.cat([_even(first, end - len(last), num_even), last])
        return torch.tensor(sorted(random.Random(self.seed).sample(range(first, end), count)))

    def reference_page_scores(self, layer: int, head: int, method: Method) -> torch.Tensor:
        """[P] share of each page under the reference queries that choose pages: the mean, or the
        largest of any query, or of a query head on average."""
        queries = self.reference_queries(layer, head, method)[0]
        queries = queries.unflatten(0, (-1, self.query_heads))
        if method.chosen_by:
            chosen = _even(0, len(queries), min(method.chosen_by, len(queries)))
            queries = queries[chosen.to(queries.device)]
        shares = (queries @ self.read.keys[layer][:, head].float().T).softmax(-1)  # [N, G, T]
        of_pages = shares[..., : self.num_pages * PAGE_SIZE].unflatten(2, (-1, PAGE_SIZE)).sum(3)
        if method.pages == "any":
            return of_pages.amax((0, 1))
        of_pages = of_pages.mean(0)
        return of_pages.amax(0) if method.pages == "largest" else of_pages.mean(0)

    def choosing_scores(self, layer: int, head: int, method: Method) -> torch.Tensor:
        """[P] what the method ranks pages by."""
        if method.pages == "last":
            return self.page_scores(layer, head)
        scores = self.reference_page_scores(layer, head, method)
        if method.pages == "both":
            return scores + self.page_scores(layer, head)
        return scores.maximum(self.page_scores(layer, head)) if method.pages == "any" else scores


def _even(first: int, end: int, count: int) -> torch.Tensor:
    """`count` positions spread evenly over [first, end)."""
    return first + (torch.arange(count) + 1) * (end - first) // max(count, 1) - 1


@dataclass(frozen=True)
class KeptHead:
    """What a KV head keeps: pages, the tokens behind all full pages, and what stands for others."""

    pages: torch.Tensor  # [P] bool
    stand_ins: HeadCache  # means come first
    num_means: int

    def cache(self, prompt: Prompt, layer: int, head: int) -> HeadCache:
        """All in one, pages first."""
        keep = prompt.tokens_of(self.pages)
        keys, values = (one[0, keep].float() for one in _tokens(prompt, layer, head))
        return HeadCache(
            torch.cat([keys, self.stand_ins.keys]),
            torch.cat([values, self.stand_ins.values]),
            torch.cat([torch.zeros(len(keys), device=keys.device), self.stand_ins.bias]),
        )


@dataclass(frozen=True)
class Compactor:
    """Compacts prompts as the engine does: roles, budgets, protected pages and page scores."""

    config: HeteroCacheConfig
    assignment: HeadAssignment

    @classmethod
    def of(cls, profile: HeadProfile, budget: float, full_share: float | None) -> Compactor:
        """Default options but these, and no finders: methods say which heads fetch. Raises
        ValueError where the budget is too small."""
        config = HeteroCacheConfig(gpu_budget=budget, full_share=full_share, finder_share=0)
        return cls(config, configured_heads(profile, config))

    def compact(self, prompt: Prompt, method: Method) -> list[list[HeadCache]]:
        """[L][H] the tokens that are kept. Raises ValueError as `keep` does."""
        return [
            [kept.cache(prompt, layer, head) for head, kept in enumerate(row)]
            for layer, row in enumerate(self.keep(prompt, method))
        ]

    def keep(self, prompt: Prompt, method: Method) -> list[list[KeptHead]]:
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
        total = compact_blocks(prompt.num_tokens, self.config.gpu_budget)
        total *= self.assignment.num_heads
        least = min(self.config.min_pages, prompt.num_pages)
        total -= self.spares(prompt, method)
        return page_budgets(self.assignment, prompt.num_pages, total, least)

    def spares(self, prompt: Prompt, method: Method) -> int:
        """Pages that no head lists, so that a retrieval can fill them; for fetchers as many as for
        so many satellites, and none where pages change place."""
        if method.fetchers and method.most:
            return 0
        total = compact_blocks(prompt.num_tokens, self.config.gpu_budget)
        total *= self.assignment.num_heads
        assignment = self.assignment
        if method.fetchers:
            roles = np.where(assignment.full, assignment.roles, HeadRole.ANCHOR)
            roles.reshape(-1)[self.fetchers(method)] = HeadRole.SATELLITE
            assignment = replace(assignment, roles=roles)
        return spare_pages(assignment, prompt.num_pages, total)

    def fetchers(self, method: Method) -> np.ndarray:
        """[fetchers] flat indices of the compressed heads of the largest weights."""
        weights = np.where(self.assignment.full, -1, self.assignment.weights).flatten()
        most = self.assignment.num_heads - self.assignment.num_full
        return np.argsort(-weights, kind="stable")[: min(method.fetchers, most)]

    def _pages_left_behind(self, prompt: Prompt, method: Method, budgets: np.ndarray) -> np.ndarray:
        """[L, H] pages of the budgets that hold means or matched tokens."""
        layers = prompt.model.num_layers
        if method.kind == "means":
            return mean_pages(
                budgets, prompt.num_pages, self.config.min_pages, range(layers), layers
            )
        if method.kind == "pages":
            return np.zeros_like(budgets)
        protected = sum(self.config.protected)
        pages = np.floor(method.share * (budgets - protected) + 0.5).astype(int)
        most = most_pages(prompt.query_heads, self.config.gpu_budget)
        if method.bound is not None:
            queries = method.positions * prompt.query_heads
            most = int(method.bound * queries / PAGE_SIZE)
        pages = np.minimum(pages, most)
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
    ) -> KeptHead:
        count = int(left_behind[layer, head])
        pages = self._kept_pages(prompt, method, layer, head, int(budgets[layer, head]) - count)
        if not count:
            nothing = torch.zeros(0, prompt.model.head_dim, device=pages.device)
            return KeptHead(pages, HeadCache(nothing, nothing, nothing[:, 0]), 0)
        is_evicted = ~prompt.tokens_of(pages)
        if method.kind == "means":
            means = means_of_runs(prompt, layer, head, is_evicted, count * PAGE_SIZE)
            return KeptHead(pages, HeadCache(*(one[0] for one in means)), count * PAGE_SIZE)
        more, num_means = matched(prompt, method, layer, head, is_evicted, count * PAGE_SIZE)
        return KeptHead(pages, more, num_means)

    def _kept_pages(
        self, prompt: Prompt, method: Method, layer: int, head: int, num_pages: int
    ) -> torch.Tensor:
        """[P] bool: the pages that a head keeps."""
        scores = prompt.choosing_scores(layer, head, method)
        chosen = choose_pages_ref(scores, num_pages, self.config.protected)
        return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, chosen, True)


def means_of_runs(
    prompt: Prompt, layer: int, head: int, is_evicted: torch.Tensor, count: int
) -> RunMeans:
    """`count` means of runs of a head's evicted pages, of a batch of one head."""
    full = prompt.num_pages * PAGE_SIZE
    kv = torch.cat(_tokens(prompt, layer, head), dim=2)[:, :full].unflatten(1, (-1, PAGE_SIZE))
    gone = is_evicted[:full].view(1, -1, PAGE_SIZE)[..., 0]
    return run_means(kv, gone, torch.tensor([count], device=kv.device), count)


def matched(
    prompt: Prompt, method: Method, layer: int, head: int, is_evicted: torch.Tensor, count: int
) -> tuple[HeadCache, int]:
    """`count` matched tokens of a head's evicted tokens, or some of them means: these come first,
    and are counted."""
    tokens, queries = _tokens(prompt, layer, head), prompt.reference_queries(layer, head, method)
    with_means = layers_with_means([layer], prompt.model.num_layers)[0]
    num_means = math.ceil(method.means * count) if with_means else 0
    num_matched = count - num_means
    found = find_candidates(*tokens, is_evicted[None], queries, max(num_matched, 1))
    parts: list[tuple[torch.Tensor, ...]] = []
    if num_means:
        means = means_of_runs(prompt, layer, head, is_evicted, num_means)
        found = beside_means(found, queries, means)
        parts.append(tuple(one[0] for one in means))
    if num_matched:
        fit = match_candidates(found, queries, num_matched, iterations=method.iterations)
        parts.append(tuple(one[0] for one in fit))
    keys, values, bias = (torch.cat(one) for one in zip(*parts, strict=True))
    if method.stored == "bfloat16":
        keys, values, bias = keys.bfloat16(), values.bfloat16(), bias.half()
    return HeadCache(keys.float(), values.float(), bias.float()), num_means


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
