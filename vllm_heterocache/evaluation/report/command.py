"""`heterocache compare`: one table and one plot over several runs of suite `quick`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

EPILOG = """\
PATH is a folder of `heterocache eval`, also of a run that was killed, or a file of result rows.
All must have asked the same prompts. Where two have the same configuration, the one with more
answers counts, of as many the later. DIR gets comparison.md, results.jsonl and a plot."""


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
    """Returns 0; raises as `joined_rows`, and ImportError where plots need matplotlib."""
    from vllm_heterocache.evaluation.report import comparison, plots
    from vllm_heterocache.evaluation.report.joined_runs import cell_of, joined_rows

    if not args.no_plots:
        plots.check_matplotlib()
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is no folder; name another")
    rows = joined_rows(args.paths)
    cells = [cell_of(row) for row in rows]
    text = "\n".join([*comparison.comparison_table(cells), "", comparison.COMPARISON_NOTE, ""])
    args.out.mkdir(parents=True, exist_ok=True)
    written = [args.out / "comparison.md", args.out / "results.jsonl"]
    written[0].write_text(text)
    written[1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(text)
    if not args.no_plots:
        drawn = plots.save_comparison_plot(cells, args.out / "kl_and_answers_by_resident_kv.png")
        written += [] if drawn is None else [drawn]
    print("wrote " + ", ".join(map(str, written)))
    return 0
