"""`heterocache compare`: one table and one plot over several runs of suite `quick`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EPILOG = """\
PATH is a folder of `heterocache eval`, also of a run that was killed, or a file of result rows.
All must have asked the same prompts. Where two have the same configuration, the one with more
answers counts, of as many the later. DIR gets comparison.md and a plot."""


def add_command(commands: Any) -> None:
    """Add `compare` to the subcommands of `heterocache`."""
    parser = commands.add_parser(
        "compare",
        help="one table of several runs of `heterocache eval`",
        description="Put the configurations of several runs of suite quick into one table.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--no-plots", action="store_true")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Returns 0; raises as `joined_cells`, and ImportError where plots need matplotlib."""
    from vllm_heterocache.evaluation.report import comparison, plots
    from vllm_heterocache.evaluation.report.joined_runs import joined_cells

    if not args.no_plots:
        plots.check_matplotlib()
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is no folder; name another")
    cells = joined_cells(args.paths)
    text = "\n".join([*comparison.comparison_table(cells), "", comparison.COMPARISON_NOTE, ""])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "comparison.md").write_text(text)
    print(text)
    written = [args.out / "comparison.md"]
    if not args.no_plots:
        drawn = plots.save_comparison_plot(cells, args.out / "kl_and_answers_by_resident_kv.png")
        written += [] if drawn is None else [drawn]
    print("wrote " + ", ".join(map(str, written)))
    return 0
