"""Plots of a run: scores over length and over what they cost, heads' roles, needles' depths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_heterocache.evaluation.report.comparison import over_wordings, stayed_dense
from vllm_heterocache.evaluation.report.report import ScoreCell
from vllm_heterocache.evaluation.run_folder import STOCK, Configuration, RunFolder, stock, variant
from vllm_heterocache.evaluation.suites.quick import FIDELITY
from vllm_heterocache.heads.assignment import HeadRole

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "os^v"  # each for ten lines
COLUMNS = 4  # of panels, then they go on in the next row
Point = tuple[float, ScoreCell]  # place on the x axis, and what is drawn there
SHARE_NAMES = {
    "resident_share": "GPU-resident KV with tables, measured share",
    "read_share": "KV read by a decode step, measured share",
}


def check_matplotlib() -> None:
    """Raise ImportError, in words, where it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the plots need matplotlib, which is not installed; run `pip install matplotlib`, or "
            "add --no-plots for tables alone"
        ) from error


def save_plots(
    folder: RunFolder, cells: Sequence[ScoreCell], configurations: Sequence[Configuration]
) -> list[Path]:
    """Write the plots that the cells allow into the folder; returns their paths."""
    path = folder.path
    written = [
        save_length_plot(cells, path / "score_by_length.png"),
        save_share_plot(cells, "resident_share", path / "score_by_resident_kv.png"),
        save_share_plot(cells, "read_share", path / "score_by_kv_read.png"),
        save_comparison_plot(cells, path / "kl_and_answers_by_resident_kv.png"),
        save_role_maps(_roles_of(folder, configurations), path / "head_roles.png"),
    ]
    rows = {c.name: list(folder.rows(c).values()) for c in [stock(), *configurations]}
    if all("depth" in row for of_one in rows.values() for row in of_one):
        written.append(save_depth_maps(rows, path / "depth_by_length.png"))
    return [path for path in written if path is not None]


def save_length_plot(cells: Sequence[ScoreCell], path: Path) -> Path | None:
    """Score over prompt length: a panel a task, a line a configuration, error bars of 95 %.

    Returns:
        `path`, or None where there is one length only.
    """
    lengths = sorted({cell.length for cell in cells})
    if len(lengths) < 2:
        return None
    tasks: dict[str, dict[str, list[Point]]] = {}
    for cell in cells:
        lines = tasks.setdefault(cell.task, {})
        lines.setdefault(cell.configuration.name, []).append((cell.length, cell))
    figure, axes = _panels(len(tasks), COLUMNS)
    styles = _styles(tasks.values())
    for axis, (task, lines) in zip(axes.flat, tasks.items(), strict=False):
        for name, points in lines.items():
            _draw_line(axis, name, points, styles[name])
        axis.set_title(task or "score", loc="left")
        axis.set_xlabel("prompt tokens")
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    return _save(figure, axes, path)


def save_share_plot(cells: Sequence[ScoreCell], share: str, path: Path) -> Path | None:
    """Score over a measured share of the KV: a panel a task and length, each length a column where
    there are several, a line a policy (`variant`) with error bars of 95 %, stock as a level.

    Args:
        share: "resident_share" or "read_share" of a cell.

    Returns:
        `path`, or None where nothing was measured but stock.
    """
    panels: dict[tuple[str, int], dict[str, list[Point]]] = {}
    for cell in cells:
        x = getattr(cell, share)
        if cell.configuration.options is not None and x is not None:
            lines = panels.setdefault((cell.task, cell.length), {})
            lines.setdefault(variant(cell.configuration.options), []).append((x, cell))
    if not panels:
        return None
    tasks = list(dict.fromkeys(task for task, _ in panels))
    lengths = sorted({length for _, length in panels})
    columns = len(lengths) if len(lengths) > 1 else COLUMNS
    figure, axes = _panels(len(tasks) * len(lengths), columns)
    widest = max(x for lines in panels.values() for points in lines.values() for x, _ in points)
    styles = _styles(panels.values())
    for (task, length), lines in panels.items():
        axis = axes.flat[tasks.index(task) * len(lengths) + lengths.index(length)]
        for name, points in lines.items():
            _draw_line(axis, name, points, styles[name])
        level = next(iter(lines.values()))[0][1].stock_score
        axis.axhline(level, color="black", linestyle="--", linewidth=1, label="stock")
        axis.set_title(", ".join(filter(None, (task, f"{length:,} tokens"))), loc="left")
        axis.set_xlabel(SHARE_NAMES[share])
        axis.set_xlim(0, 1.05 * widest)
    return _save(figure, axes, path)


def save_comparison_plot(cells: Sequence[ScoreCell], path: Path) -> Path | None:
    """KL of prose and right answers over what is on the GPU: a column a length, a line a policy
    (`variant`) with error bars of 95 % of answers, stock's answers as a level.

    Args:
        cells: of suite `quick`.

    Returns:
        `path`, or None where there are no texts, or nothing was measured but stock.
    """
    from matplotlib.figure import Figure

    texts = [cell for cell in cells if cell.task == FIDELITY]
    if not texts:
        return None
    drawn = [one for one in (*texts, *over_wordings(cells)) if one.against_stock is not None]
    drawn = [one for one in drawn if one.resident_share is not None and not stayed_dense(one)]
    if not drawn:
        return None
    lengths = sorted({cell.length for cell in drawn})
    figure = Figure(figsize=(4.6 * len(lengths) + 3, 8), layout="constrained")
    axes = figure.subplots(2, len(lengths), squeeze=False, sharex=True, sharey="row")
    panels: dict[tuple[bool, int], dict[str, list[Point]]] = {}
    for cell in drawn:
        assert cell.configuration.options is not None and cell.resident_share is not None
        lines = panels.setdefault((cell.task == FIDELITY, cell.length), {})
        of_one = lines.setdefault(variant(cell.configuration.options), [])
        of_one.append((cell.resident_share, cell))
    styles = _styles(panels.values())
    for (is_kl, length), lines in panels.items():
        axis = axes[0 if is_kl else 1, lengths.index(length)]
        for name, points in lines.items():
            if is_kl:
                points = sorted(points, key=lambda point: point[0])
                places = [place for place, _ in points]
                kl = [cell.metrics["kl"] for _, cell in points]
                axis.plot(places, kl, label=name, **styles[name])
            else:
                _draw_line(axis, name, points, styles[name])
        axis.set_title(f"{length:,} tokens", loc="left")
        if not is_kl:
            level = next(iter(lines.values()))[0][1].stock_score
            axis.axhline(level, color="black", linestyle="--", linewidth=1, label="stock")
            axis.set_xlabel(SHARE_NAMES["resident_share"])
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_xlim(left=0)
    return _save(figure, axes, path, ("KL of prose, nats a token", "right answers, share"))


def _panels(count: int, columns: int, width: float = 5.5) -> tuple[Figure, np.ndarray]:
    """A figure of `count` panels, and its axes [rows, columns], of which the last may be empty."""
    from matplotlib.figure import Figure

    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns + 2.5, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, axes


def _styles(panels: Iterable[dict[str, list[Point]]]) -> dict[str, dict[str, str]]:
    """How each name is drawn, the same in all panels."""
    names = list(dict.fromkeys(name for lines in panels for name in lines))
    others = [name for name in names if name != STOCK]
    styles = {
        name: {"color": f"C{i % 10}", "marker": MARKERS[i // 10 % len(MARKERS)]}
        for i, name in enumerate(others)
    }
    return styles | {STOCK: {"color": "black", "linestyle": "--", "marker": "o"}}


def _draw_line(axis: Axes, name: str, points: list[Point], style: dict[str, Any]) -> None:
    points = sorted(points, key=lambda point: point[0])
    x, scores = [place for place, _ in points], [cell.score for _, cell in points]
    errors = [
        [max(cell.score - cell.low, 0) for _, cell in points],
        [max(cell.high - cell.score, 0) for _, cell in points],
    ]
    axis.errorbar(x, scores, yerr=errors, capsize=3, label=name, **style)


def _save(figure: Figure, axes: np.ndarray, path: Path, names: Sequence[str] | None = None) -> Path:
    """Args: names: of the y axes, row by row; None: all are scores."""
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for row, name in zip(axes, names or ["score"] * len(axes), strict=True):
        row[0].set_ylabel(name)
    labels: dict[str, Artist] = {}  # of all panels, each once
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    figure.legend(list(labels.values()), list(labels), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=130)
    return path


def _roles_of(folder: RunFolder, configurations: Sequence[Configuration]) -> dict[str, list[str]]:
    """Configuration -> roles, a string a layer, where not all heads have the same role."""
    found: dict[str, list[str]] = {}
    for one in configurations:
        roles = (folder.engine(one) or {}).get("roles")
        if roles is not None and len(set("".join(roles))) > 1:
            found[one.name] = roles
    return found


def save_role_maps(roles: dict[str, list[str]], path: Path) -> Path | None:
    """A map per configuration: the role of each KV head over the layers.

    Args:
        roles: configuration -> for each layer a string with a letter (HeadRole's first) a head.

    Returns:
        `path`, or None where no configuration's heads have different roles.
    """
    if not roles:
        return None
    from matplotlib.figure import Figure

    from vllm_heterocache.heads.pictures import draw_roles

    maps = {name: role_map(lines) for name, lines in roles.items()}
    num_layers, num_heads = next(iter(maps.values())).shape
    width, height = max(11.0, 0.26 * num_layers + 2.5), min(6.0, 1.4 + 0.28 * num_heads)
    figure = Figure(figsize=(width, height * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    for axis, (name, values) in zip(axes, maps.items(), strict=True):
        draw_roles(axis, values, name)
    axes[-1].set_xlabel("layer")
    figure.savefig(path, dpi=130)
    return path


def role_map(lines: list[str]) -> np.ndarray:
    """[L, H] HeadRole values of the letters that `plugin_facts` writes."""
    of_letter = {role.name[0]: role for role in HeadRole}
    return np.array([[of_letter[letter] for letter in line] for line in lines])


def save_depth_maps(rows: dict[str, list[dict[str, Any]]], path: Path) -> Path | None:
    """A heat map per configuration: mean score by needle depth and prompt length."""
    everyone = [row for of_one in rows.values() for row in of_one]
    if not everyone:
        return None
    depths, lengths = (sorted({row[name] for row in everyone}) for name in ("depth", "length"))
    maps = {name: depth_map(of_one, depths, lengths) for name, of_one in rows.items() if of_one}
    figure, axes = _panels(len(maps), COLUMNS, width=4.2)
    for axis, (name, scores) in zip(axes.flat, maps.items(), strict=False):
        image = axis.pcolormesh(scores, vmin=0, vmax=1, cmap="RdYlGn", edgecolors="white")
        for (i, j), score in np.ndenumerate(scores):
            text = "" if np.isnan(score) else f"{score:.2g}"
            style = {"fontsize": "x-small", "color": "black" if 0.1 < score < 0.9 else "white"}
            axis.text(j + 0.5, i + 0.5, text, ha="center", va="center", **style)
        axis.set_title(name, loc="left", fontsize="small")
        axis.set_xticks(np.arange(len(lengths)) + 0.5, [f"{length:,}" for length in lengths])
        axis.set_yticks(np.arange(len(depths)) + 0.5, [f"{depth:g}" for depth in depths])
        axis.set_xlabel("prompt tokens")
    axes[0, 0].invert_yaxis()  # of all, the beginning of the prompt on top
    for row in axes:
        row[0].set_ylabel("needle's depth, %")
    most = max(map(len, rows.values())) / (len(depths) * len(lengths))
    label = "score" if most <= 1 else f"score, mean of {most:g} samples a cell"
    figure.colorbar(image, ax=figure.axes, label=label)
    figure.savefig(path, dpi=130)
    return path


def depth_map(
    rows: list[dict[str, Any]], depths: Sequence[float], lengths: Sequence[int]
) -> np.ndarray:
    """Mean scores [depths, lengths]; NaN where there is no sample."""
    cells: dict[tuple[float, int], list[float]] = {}
    for row in rows:
        cells.setdefault((row["depth"], row["length"]), []).append(row["scores"]["score"])
    found = [[cells.get((depth, length), [np.nan]) for length in lengths] for depth in depths]
    return np.array([[np.mean(scores) for scores in row] for row in found])
