"""Pictures of roles, pages and clusters over layers and KV heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from vllm_heterocache.heads.profile import HeadProfile

# Okabe-Ito, distinct for colour-blind readers
_COLORS = {
    HeadRole.PIVOT: "#0072B2",
    HeadRole.SATELLITE: "#A6CEE3",
    HeadRole.ANCHOR: "#DDDDDD",
    HeadRole.VOLATILE: "#D55E00",
    HeadRole.FINDER: "#009E73",
}


FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Raise ValueError, in one sentence, for a kind of file that `save_picture` does not write."""
    if path.suffix not in FORMATS:
        raise ValueError(
            f"-o {path} is no picture that can be drawn; end its name in {' or '.join(FORMATS)}"
        )


def save_picture(
    profile: HeadProfile,
    assignment: HeadAssignment,
    budgets: np.ndarray,
    path: str | Path,
    settings: str,
) -> None:
    """Draw roles, pages per head and cluster sizes over the layers; the suffix picks the format.

    `budgets` is [L, H] in pages; the title tells the `settings` that they come from. Raises
    ImportError when matplotlib is missing.
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
        f"{profile.model.name}: {profile.model.layers_in_words} x {num_kv_heads} KV heads, "
        f"{assignment.num_full} of {assignment.num_heads} heads whole\n{settings}"
    )
    draw_roles(axes[0], assignment.roles, "role")
    _draw_budgets(figure, axes[1], budgets)
    _draw_clusters(axes[2], assignment)
    axes[2].set_xlabel("layer")
    if profile.model.layers is not None:
        axes[2].set_xticks(range(num_layers), labels=map(str, profile.model.layers))
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
            label=f"{r.name.lower()} ({r.meaning}): {(roles == r).sum()}",
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
    axis.locator_params(axis="y", integer=True)


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
