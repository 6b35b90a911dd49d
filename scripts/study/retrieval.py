"""Pages of a prompt that come back while its continuation is read: who asks, by whose scores.

The continuation is known, and a layer sees all its tokens at once. So what a head holds at a token
follows from the queries of the same layer at earlier tokens, as in the engine: after every check
the head's list has the best pages by the scores of that check, and keeps its size.

n tokens of the continuation, C checks, P full pages, N reference queries, G query heads of a group.
State 0 of C + 1 is what compaction left; state c is what check c - 1 asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from compact_heads import Compactor, KeptHead, Method, Prompt
from counting import Counting

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.heads.assignment import HeadRole
from vllm_heterocache.kernels.drift_check_ref import has_drifted_ref
from vllm_heterocache.kernels.reference_set import num_top_pages
from vllm_heterocache.kernels.values import DriftRule
from vllm_heterocache.worker.retrieval import WAVES


@dataclass
class RetrievingReader:
    """Attention of tokens behind a prompt over pages that change, stand-ins, and these tokens."""

    prompt: Prompt
    compactor: Compactor
    method: Method
    kept: list[list[KeptHead]]  # [L][H]
    fetched: int = 0  # pages, of all heads and checks
    _leading: dict[int, torch.Tensor] = field(default_factory=dict)  # scores [C, P] of pivots

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        num_kv_heads = key.shape[1]
        by_head = (query.float() * scale).unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
        # a pivot comes before the satellites of its own layer
        order = np.argsort(self.compactor.assignment.roles[layer], kind="stable")
        outputs = {
            head: self._attend_head(layer, head, by_head[head], key[:, head], value[:, head])
            for head in order.tolist()
        }
        stacked = torch.stack([outputs[head] for head in range(num_kv_heads)])  # [H, G, n, D]
        return stacked.permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)

    def _attend_head(
        self, layer: int, head: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """[G, n, D] of queries [G, n, D]; key and value [n, D] of the continuation."""
        keys = self.prompt.read.keys[layer][:, head].float()
        values = self.prompt.read.values[layer][:, head].float()
        num_tokens = len(key)
        hidden = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=key.device).triu(1)
        of_prompt = query @ keys.T
        of_tokens = (query @ key.float().T).masked_fill(hidden, -torch.inf)
        held = self._held(layer, head, query, of_prompt, of_tokens)  # [C + 1, P]
        state = self._state_of(num_tokens).to(key.device).clamp(max=len(held) - 1)
        seen = self.prompt.tokens_of(held)[state]  # [n, T]
        stand_ins = self.kept[layer][head].stand_ins
        bias, stand_in_values = stand_ins.bias[None], stand_ins.values[None]
        if len(stand_ins.bias) and len(held) > 1:
            counting = Counting(self.prompt, self.method, layer, head, self.kept[layer][head])
            bias, stand_in_values = counting.of(held)
        of_stand_ins = query @ stand_ins.keys.T + bias[state.clamp(max=len(bias) - 1)]
        parts = [of_prompt.masked_fill(~seen, -torch.inf), of_stand_ins, of_tokens]
        weights = torch.cat(parts, -1).softmax(-1)
        sizes = [part.shape[-1] for part in parts]
        on_prompt, on_stand_ins, on_tokens = weights.split(sizes, -1)
        output = on_prompt @ values + on_tokens @ value.float()
        if len(stand_in_values) == 1:
            return output + on_stand_ins @ stand_in_values[0]
        return output + torch.einsum("gnm,nmd->gnd", on_stand_ins, stand_in_values[state])

    def _checks(self, num_tokens: int) -> torch.Tensor:
        """[C] tokens after which is checked, those whose choice a token may read."""
        return torch.arange(0, max(num_tokens - self.method.lag, 0), self.method.interval)

    def _state_of(self, num_tokens: int) -> torch.Tensor:
        """[n] what each token reads."""
        behind = torch.arange(num_tokens) - self.method.lag
        return torch.where(behind < 0, 0, behind // self.method.interval + 1)

    def _held(
        self,
        layer: int,
        head: int,
        query: torch.Tensor,
        of_prompt: torch.Tensor,
        of_tokens: torch.Tensor,
    ) -> torch.Tensor:
        """[C + 1, P] bool: pages in a head's list; one state where nothing changes."""
        pages, method = self.kept[layer][head].pages, self.method
        checks = self._checks(of_tokens.shape[1])
        flat = layer * self.prompt.model.num_kv_heads + head
        role = HeadRole(self.compactor.assignment.roles[layer, head])
        is_exact = method.fetch in ("own", "pivot")
        if method.fetch == "pivot" and role is HeadRole.PIVOT:
            self._leading[flat] = page_masses(of_prompt[:, checks], of_tokens[:, checks])
        follows = role is HeadRole.SATELLITE
        if method.fetched_for == "compressed":
            follows |= role is HeadRole.ANCHOR
        if method.fetchers:
            follows &= flat in self.compactor.fetchers(method)
        if not follows or method.fetch == "none" or not len(checks):
            return pages[None]
        leader = int(self.compactor.assignment.leaders[layer, head])
        asks = None
        prompt_scores = self.prompt.reference_page_scores(layer, head, method)
        if method.fetch == "pivot" and leader >= 0:
            scores = self._leading[leader]
            if method.drift:
                asks = self._drifted(leader, scores)
        elif is_exact:
            scores = page_masses(of_prompt[:, checks], of_tokens[:, checks])
        else:
            keys = self.prompt.read.keys[layer][:, head].float()
            reference = self.prompt.reference_queries(layer, head, method)[0]
            scores = summary_scores(
                method.fetch, keys, query[:, checks], reference, method.key_bits
            )
        if method.decay:
            scores = averaged(scores, prompt_scores, method.decay)
        held = self._follow(pages, scores, asks)
        if method.fetch == "pivot" and leader // self.prompt.model.num_kv_heads == layer:
            held = torch.cat([pages.expand(method.beside, -1), held])[: len(held)]
        self.fetched += int((held[1:] & ~held[:-1]).sum())
        return held

    def _drifted(self, leader: int, scores: torch.Tensor) -> np.ndarray:
        """[C] bool: the checks at which a pivot's satellites ask for pages."""
        layer, head = divmod(leader, self.prompt.model.num_kv_heads)
        rule = DriftRule(self.method.drift, WAVES)
        at_first = self.prompt.page_scores(layer, head)
        num_pages, top = self.prompt.num_pages, num_top_pages(self.prompt.num_pages)
        best = torch.cat([at_first[None], scores]).topk(top, dim=1).indices.tolist()
        reference, waves, asks = set(best[0]), 0, []
        for current in map(set, best[1:]):
            if has_drifted_ref(len(current & reference), num_pages, rule):
                reference, waves = current, rule.waves
            else:
                waves = max(waves - 1, 0)
            asks.append(waves > 0)
        return np.array(asks)

    def _follow(
        self, pages: torch.Tensor, scores: torch.Tensor, asks: np.ndarray | None
    ) -> torch.Tensor:
        """[C + 1, P] bool: the list from check to check. The protected pages never leave."""
        protected, size = self.compactor.config.protected, int(pages.sum())
        scores = scores.clone()
        scores[:, : protected.sinks] = torch.inf
        scores[:, scores.shape[1] - protected.recent :] = torch.inf
        wanted = torch.zeros_like(scores, dtype=torch.bool)
        wanted.scatter_(1, scores.topk(size, dim=1).indices, True)
        most = self._most_moves()
        if asks is None and most is None:
            return torch.cat([pages[None], wanted])
        held = exchanged(
            pages.cpu().numpy(), scores.cpu().numpy(), wanted.cpu().numpy(), asks, most
        )
        return torch.from_numpy(held).to(pages.device)

    def _most_moves(self) -> int | None:
        """Pages that one head gets at a check: so many, or an even share of the spares, as if all
        heads wanted some; None: no bound."""
        if self.method.most or self.method.moves == "all":
            return self.method.most or None
        assignment = self.compactor.assignment
        heads = assignment.count(HeadRole.SATELLITE)
        if self.method.fetched_for == "compressed":
            heads += assignment.count(HeadRole.ANCHOR)
        heads = self.method.fetchers or heads
        return max(1, self.compactor.spares(self.prompt, self.method) // max(heads, 1))


def exchanged(
    pages: np.ndarray,
    scores: np.ndarray,
    wanted: np.ndarray,
    asks: np.ndarray | None,
    most: int | None,
) -> np.ndarray:
    """[C + 1, P] bool: at each check that asks, the best missing pages come and as many of the
    worst others go, `most` at a time, or all. scores and wanted are [C, P], pages [P]."""
    held = [pages]
    for check in range(len(scores)):
        after = held[-1].copy()
        if asks is None or asks[check]:
            missing = np.flatnonzero(wanted[check] & ~after)
            others = np.flatnonzero(after & ~wanted[check])
            best = missing[np.argsort(-scores[check, missing], kind="stable")][:most]
            worst = others[np.argsort(scores[check, others], kind="stable")][: len(best)]
            after[best], after[worst] = True, False
        held.append(after)
    return np.stack(held)


def averaged(scores: torch.Tensor, first: torch.Tensor, decay: float) -> torch.Tensor:
    """[C, P]: running means of [C, P], in which the last of them weighs 1 - decay, from [P] on."""
    number = torch.arange(len(scores), device=scores.device)
    age = number[:, None] - number
    weights = ((1 - decay) * decay ** age.clamp(min=0)).where(age >= 0, 0)
    return weights @ scores + decay ** (number[:, None] + 1) * first


def page_masses(of_prompt: torch.Tensor, of_tokens: torch.Tensor) -> torch.Tensor:
    """[C, P] attention mass on each page, the largest of the group, from logits [G, C, T] of the
    prompt and [G, C, n] of what follows it."""
    lse = torch.logaddexp(of_prompt.logsumexp(-1), of_tokens.logsumexp(-1))
    full = of_prompt.shape[-1] // PAGE_SIZE * PAGE_SIZE
    pages = of_prompt[..., :full].unflatten(-1, (-1, PAGE_SIZE)).logsumexp(-1)
    return (pages - lse[..., None]).exp().amax(0)


def summary_scores(
    kind: str,
    keys: torch.Tensor,
    query: torch.Tensor,
    reference: torch.Tensor,
    key_bits: int = 1,
) -> torch.Tensor:
    """[C, P] by what is known of a page's keys, the largest of the group.

    mean: the mean key. bounds: Quest's, which no logit exceeds. offset: the mean key, and a number
    that makes the page's log-sum-exp right on average over the reference queries. halves: the same
    of half pages. bits: keys of `key_bits` a channel.

    Args:
        keys: [T, D].
        query: [G, C, D], scaled.
        reference: [N, D], scaled.
    """
    pages = keys[: len(keys) // PAGE_SIZE * PAGE_SIZE].unflatten(0, (-1, PAGE_SIZE))
    if kind == "bounds":
        above = query.clamp(min=0) @ pages.amax(1).T
        return (above + query.clamp(max=0) @ pages.amin(1).T).amax(0)
    if kind == "mean":
        return (query @ pages.mean(1).T).softmax(-1).amax(0)
    if kind == "bits":
        logits = query @ rounded_keys(pages, key_bits).flatten(0, 1).T
        return logits.softmax(-1).unflatten(-1, (-1, PAGE_SIZE)).sum(-1).amax(0)
    size = PAGE_SIZE // 2 if kind == "halves" else PAGE_SIZE
    parts = pages.flatten(0, 1).unflatten(0, (-1, size))
    means = parts.mean(1)
    exact = (reference @ parts.flatten(0, 1).T).unflatten(1, (-1, size)).logsumexp(2)
    offset = (exact - reference @ means.T).mean(0)
    shares = (query @ means.T + offset).softmax(-1)
    return shares.unflatten(-1, (len(pages), -1)).sum(-1).amax(0)


def rounded_keys(pages: torch.Tensor, key_bits: int) -> torch.Tensor:
    """[P, PAGE_SIZE, D] keys of pages, each channel rounded to the nearest of 2 ** key_bits numbers
    that are spread evenly over the page's."""
    least, largest = pages.amin(1, keepdim=True), pages.amax(1, keepdim=True)
    steps = 2**key_bits - 1
    size = ((largest - least) / steps).clamp(min=torch.finfo(pages.dtype).tiny)
    return least + ((pages - least) / size).round() * size
