"""What a head profile means at given options, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vllm_heterocache.config import PAGE_SIZE, HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole
from vllm_heterocache.heads.budget import compact_blocks, page_budgets, smallest_prompt, spare_pages
from vllm_heterocache.heads.recipes import configured_heads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_heterocache.heads.profile import HeadProfile

DEFAULT_PROMPT_TOKENS = 32768
_LETTERS = {r: r.name[0] for r in HeadRole}


class PromptBudget(NamedTuple):
    """Roles and pages of one prompt."""

    assignment: HeadAssignment
    budgets: np.ndarray  # [L, H] int32, pages
    num_pages: int  # full prompt pages of one head
    spare: int  # pages set aside for retrieval, over all heads
    smallest_tokens: int  # shortest prompt that is compacted


def prompt_budget(
    profile: HeadProfile,
    config: HeteroCacheConfig,
    num_tokens: int = DEFAULT_PROMPT_TOKENS,
) -> PromptBudget:
    """Roles of `profile` under `config`, and the pages each head keeps of `num_tokens` tokens.

    A prompt too short to be compacted keeps everything. Raises ValueError as `configured_heads`.
    """
    assignment = configured_heads(profile, config)
    num_pages = num_tokens // PAGE_SIZE
    smallest = max(
        smallest_prompt([assignment], config.gpu_budget, config.min_pages),
        config.min_prompt_tokens,
    )
    total, spare = assignment.num_heads * num_pages, 0
    if num_tokens >= smallest:
        total = compact_blocks(num_tokens, config.gpu_budget) * assignment.num_heads
        spare = spare_pages(assignment, num_pages, total)
    budgets = page_budgets(assignment, num_pages, total - spare, config.min_pages)
    return PromptBudget(assignment, budgets, num_pages, spare, smallest)


def render(
    profile: HeadProfile,
    config: HeteroCacheConfig,
    num_tokens: int = DEFAULT_PROMPT_TOKENS,
) -> str:
    """Text: one line per layer (roles, pages, clusters), then totals."""
    chosen = prompt_budget(profile, config, num_tokens)
    lines = [
        *_header(profile, config, chosen, num_tokens),
        *_table(chosen, profile.model.layer_ids),
        *_totals(config, chosen),
    ]
    return "\n".join(lines)


def settings_line(config: HeteroCacheConfig, chosen: PromptBudget, num_tokens: int) -> str:
    """The options and the prompt that roles and budgets belong to."""
    return (
        f"recipe {config.recipe}, gpu_budget {config.gpu_budget}, prompt of {num_tokens} tokens = "
        f"{chosen.num_pages} pages per head"
    )


def _header(
    profile: HeadProfile, config: HeteroCacheConfig, chosen: PromptBudget, num_tokens: int
) -> list[str]:
    model = profile.model
    legend = ", ".join(f"{_LETTERS[r]} {r.name.lower()} ({r.meaning})" for r in HeadRole)
    return [
        f"{model.name}: {model.layers_in_words} x {model.num_kv_heads} KV heads",
        settings_line(config, chosen, num_tokens),
        f"roles: {legend}",
        *absences(profile),
        "",
    ]


def absences(profile: HeadProfile) -> list[str]:
    """Lines: what the profile does not hold, and what follows for the recipes."""
    lines = []
    if profile.retrieval is None:
        lines.append('absent: retrieval scores; recipe "retrieval" refuses this profile')
    elif profile.similarity is None:
        lines.append(
            'absent: similarity; with recipe "retrieval" no head follows another, so finders alone '
            "keep their prompts on the host and fetch pages; with finder_share 0 no head does"
        )
    missing = [name for name in ("stability", "similarity") if getattr(profile, name) is None]
    if missing and profile.assignment is None:
        lines.append(f'absent: {" and ".join(missing)}; recipe "paper" refuses this profile')
    elif missing:
        lines.append(
            f'absent: {" and ".join(missing)}; recipe "paper" takes the roles that are stored, '
            "whatever its thresholds"
        )
    return lines


def _table(chosen: PromptBudget, layer_ids: Sequence[int]) -> list[str]:
    assignment, budgets, num_pages, *_ = chosen
    num_kv_heads = assignment.roles.shape[1]
    width = max(5, num_kv_heads)
    clusters = "  clusters (pivot: satellites)" if assignment.count(HeadRole.PIVOT) else ""
    rows = [f"layer  {'roles':{width}}  kept  pages of compressed heads{clusters}"]
    sizes = assignment.cluster_sizes()
    for layer, layer_id in enumerate(layer_ids):
        letters = "".join(_LETTERS[HeadRole(r)] for r in assignment.roles[layer].tolist())
        share = budgets[layer].sum() / max(1, num_kv_heads * num_pages)
        compressed = budgets[layer][~assignment.full[layer]]
        rows.append(
            f"{layer_id:5}  {letters:{width}}  {share:4.0%}  {_spread(compressed):25}  "
            f"{_clusters(assignment, sizes[layer], layer, layer_id)}".rstrip()
        )
    return rows


def _spread(pages: np.ndarray) -> str:
    if pages.size == 0:
        return "-"
    low, high = int(pages.min()), int(pages.max())
    return str(low) if low == high else f"{low}-{high}, mean {pages.mean():.0f}"


def _clusters(assignment: HeadAssignment, sizes: np.ndarray, layer: int, layer_id: int) -> str:
    """`sizes` [H] of the layer, whose index in the model is `layer_id`."""
    pivots = np.flatnonzero(assignment.roles[layer] == HeadRole.PIVOT).tolist()
    return "  ".join(f"{layer_id}.{head}: {sizes[head]}" for head in pivots)


def _totals(config: HeteroCacheConfig, chosen: PromptBudget) -> list[str]:
    assignment, budgets, num_pages, spare, smallest = chosen
    whole = assignment.num_heads * num_pages
    kept = int(budgets.sum())
    full_pages = assignment.num_full * num_pages
    # what stays dense sends nothing
    host_pages = assignment.num_led * num_pages if kept < whole else 0
    counts = ", ".join(f"{assignment.count(r)} {r.name.lower()}" for r in HeadRole)
    least = f"; these roles take {assignment.floor:.4f} of the pages at least"
    if config.keeps_everything:
        least = ""
    return [
        "",
        f"heads: {counts}; {assignment.num_full} of {assignment.num_heads} whole{least}",
        f"pages: {kept} kept + {spare} spare = {(kept + spare) / max(1, whole):.1%} of {whole} "
        f"({full_pages} in whole heads, {kept - full_pages} in compressed heads)",
        f"blocks: {-(-(kept + spare) // assignment.num_heads)} compact instead of {num_pages}",
        f"host: {host_pages} pages ({host_pages / max(1, whole):.1%} of the KV)",
        f"prompts of fewer than {smallest} tokens stay dense",
    ]
