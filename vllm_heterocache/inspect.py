"""What a head profile means at given options: a table, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vllm_heterocache.budget import compact_blocks, page_budgets, smallest_prompt, spare_pages
from vllm_heterocache.config import PAGE_SIZE, HeteroCacheConfig
from vllm_heterocache.head_assignment import HeadAssignment, HeadRole
from vllm_heterocache.head_profile import HeadProfile
from vllm_heterocache.roles import assign_heads

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

DEFAULT_PROMPT_TOKENS = 32768
# letters of the table; colours (Okabe-Ito, distinct for colour-blind readers) of the picture
_LETTERS = {r: r.name[0] for r in HeadRole}
_COLORS = {
    HeadRole.PIVOT: "#0072B2",
    HeadRole.SATELLITE: "#A6CEE3",
    HeadRole.ANCHOR: "#DDDDDD",
    HeadRole.VOLATILE: "#D55E00",
}
_MEANINGS = {
    HeadRole.PIVOT: "whole, leads",
    HeadRole.SATELLITE: "budget, led",
    HeadRole.ANCHOR: "budget",
    HeadRole.VOLATILE: "whole",
}


class Plan(NamedTuple):
    """Roles and pages of one prompt."""

    assignment: HeadAssignment
    budgets: np.ndarray  # [L, H] int32, pages
    num_pages: int  # full prompt pages of one head
    spare: int  # pages set aside for retrieval, over all heads
    smallest_tokens: int  # shortest prompt that is compacted


def plan(
    profile: HeadProfile,
    config: HeteroCacheConfig,
    num_tokens: int = DEFAULT_PROMPT_TOKENS,
) -> Plan:
    """Roles of `profile` under `config`, and the pages each head keeps of `num_tokens` tokens.

    A prompt too short to be compacted keeps everything. Raises ValueError as `assign_heads`.
    """
    assignment = assign_heads(
        profile,
        recipe=config.recipe,
        gpu_budget=config.gpu_budget,
        full_share=config.full_share,
        stability_threshold=config.stability_threshold,
        similarity_threshold=config.similarity_threshold,
    )
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
    return Plan(assignment, budgets, num_pages, spare, smallest)


def render(
    profile: HeadProfile,
    config: HeteroCacheConfig,
    num_tokens: int = DEFAULT_PROMPT_TOKENS,
) -> str:
    """Text: one line per layer (roles, pages, clusters), then totals."""
    chosen = plan(profile, config, num_tokens)
    lines = _header(profile, config, chosen, num_tokens) + _table(chosen) + _totals(config, chosen)
    return "\n".join(lines)


def _header(
    profile: HeadProfile, config: HeteroCacheConfig, chosen: Plan, num_tokens: int
) -> list[str]:
    model = profile.model
    legend = ", ".join(f"{_LETTERS[r]} {r.name.lower()} ({_MEANINGS[r]})" for r in HeadRole)
    return [
        f"{model.name}: {model.num_layers} layers x {model.num_kv_heads} KV heads",
        f"recipe {config.recipe}, gpu_budget {config.gpu_budget}, prompt of {num_tokens} tokens = "
        f"{chosen.num_pages} pages per head",
        f"roles: {legend}",
        "",
    ]


def _table(chosen: Plan) -> list[str]:
    assignment, budgets, num_pages, *_ = chosen
    num_layers, num_kv_heads = assignment.roles.shape
    width = max(5, num_kv_heads)
    rows = [
        f"layer  {'roles':{width}}  kept  pages of compressed heads  clusters (pivot: satellites)"
    ]
    sizes = assignment.cluster_sizes()
    for layer in range(num_layers):
        letters = "".join(_LETTERS[HeadRole(r)] for r in assignment.roles[layer].tolist())
        share = budgets[layer].sum() / max(1, num_kv_heads * num_pages)
        compressed = budgets[layer][~assignment.full[layer]]
        rows.append(
            f"{layer:5}  {letters:{width}}  {share:4.0%}  {_spread(compressed):25}  "
            f"{_clusters(assignment, sizes, layer)}".rstrip()
        )
    return rows


def _spread(pages: np.ndarray) -> str:
    if pages.size == 0:
        return "-"
    low, high = int(pages.min()), int(pages.max())
    return str(low) if low == high else f"{low}-{high}, mean {pages.mean():.0f}"


def _clusters(assignment: HeadAssignment, sizes: np.ndarray, layer: int) -> str:
    pivots = np.flatnonzero(assignment.roles[layer] == HeadRole.PIVOT).tolist()
    return "  ".join(f"{layer}.{head}: {sizes[layer, head]}" for head in pivots)


def _totals(config: HeteroCacheConfig, chosen: Plan) -> list[str]:
    assignment, budgets, num_pages, spare, smallest = chosen
    whole = assignment.num_heads * num_pages
    kept = int(budgets.sum())
    full_pages = assignment.num_full * num_pages
    satellites = assignment.count(HeadRole.SATELLITE)
    counts = ", ".join(f"{assignment.count(r)} {r.name.lower()}" for r in HeadRole)
    floor = "" if config.keeps_everything else f", floor of gpu_budget {assignment.floor:.4f}"
    return [
        "",
        f"heads: {counts}; {assignment.num_full} of {assignment.num_heads} whole{floor}",
        f"pages: {kept} kept + {spare} spare = {(kept + spare) / max(1, whole):.1%} of {whole} "
        f"({full_pages} in whole heads, {kept - full_pages} in compressed heads)",
        f"blocks: {-(-(kept + spare) // assignment.num_heads)} compact instead of {num_pages}",
        f"host: {satellites * num_pages} pages ({satellites / assignment.num_heads:.1%} of the KV)",
        f"prompts of fewer than {smallest} tokens stay dense",
    ]


def save_picture(
    profile: HeadProfile, assignment: HeadAssignment, budgets: np.ndarray, path: str | Path
) -> None:
    """Draw roles, pages per head and cluster sizes over the layers; the suffix picks the format.

    `budgets` is [L, H] in pages. Raises ImportError when matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"the picture {path} needs matplotlib, which is not installed; run "
            "`pip install matplotlib`, or leave -o out for the table alone"
        ) from error
    num_layers, num_kv_heads = assignment.roles.shape
    map_height = min(6.0, max(1.4, 0.28 * num_kv_heads))
    heights = [map_height, map_height, 1.8]
    figure = Figure(
        figsize=(max(8.0, 0.26 * num_layers + 2.5), sum(heights) + 2.2), layout="constrained"
    )
    axes = figure.subplots(3, 1, sharex=True, height_ratios=heights)
    figure.suptitle(
        f"{profile.model.name}: {num_layers} layers x {num_kv_heads} KV heads, "
        f"{assignment.num_full} of {assignment.num_heads} heads whole"
    )
    draw_roles(axes[0], assignment.roles, "role")
    _draw_budgets(figure, axes[1], budgets)
    _draw_clusters(axes[2], assignment)
    axes[2].set_xlabel("layer")
    axes[2].set_xlim(-0.5, num_layers - 0.5)
    figure.savefig(path, dpi=130)


def draw_roles(axis: Axes, roles: np.ndarray, title: str) -> None:
    """A map of HeadRole values [L, H], with their counts."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colors = ListedColormap([_COLORS[r] for r in HeadRole])
    _draw_map(axis, roles, cmap=colors, vmin=-0.5, vmax=len(HeadRole) - 0.5)
    axis.set_title(title, loc="left")
    patches = [
        Patch(
            facecolor=_COLORS[r],
            label=f"{r.name.lower()} ({_MEANINGS[r]}): {(roles == r).sum()}",
        )
        for r in HeadRole
    ]
    axis.legend(handles=patches, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False)


def _draw_budgets(figure: Figure, axis: Axes, budgets: np.ndarray) -> None:
    image = _draw_map(axis, budgets, cmap="viridis", vmin=0, vmax=max(1, int(budgets.max())))
    axis.set_title(f"pages kept: {int(budgets.sum())} in all", loc="left")
    figure.colorbar(image, ax=axis, label="pages", pad=0.01)


def _draw_clusters(axis: Axes, assignment: HeadAssignment) -> None:
    """One bar per layer, one segment per pivot: the satellites that it leads."""
    sizes = np.where(assignment.roles == HeadRole.PIVOT, assignment.cluster_sizes(), 0)
    layers, bottom = np.arange(len(sizes)), np.zeros(len(sizes))
    for head in range(sizes.shape[1]):
        axis.bar(
            layers,
            sizes[:, head],
            bottom=bottom,
            width=0.8,
            color=_COLORS[HeadRole.PIVOT],
            edgecolor="white",
        )
        bottom = bottom + sizes[:, head]
    axis.set_ylabel("satellites")
    axis.set_ylim(0, 1.1 * max(1.0, bottom.max()))
    num_pivots = assignment.count(HeadRole.PIVOT)
    axis.set_title(f"clusters: {num_pivots} pivots, one segment each", loc="left")
    axis.yaxis.get_major_locator().set_params(integer=True)


def _draw_map(axis: Axes, values: np.ndarray, **style: Any) -> AxesImage:
    """Heads over layers: `values` is [L, H]."""
    num_layers, num_kv_heads = values.shape
    image = axis.imshow(values.T, aspect="auto", origin="lower", interpolation="nearest", **style)
    axis.set_ylabel("KV head")
    axis.set_yticks(range(0, num_kv_heads, max(1, num_kv_heads // 8)))
    axis.set_xticks(range(0, num_layers, max(1, num_layers // 16)))
    axis.set_xticks(np.arange(num_layers + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(num_kv_heads + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=0.8)
    axis.tick_params(which="minor", length=0)
    return image
