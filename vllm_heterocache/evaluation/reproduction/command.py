"""`heterocache reproduce`: options, and the way from them to one report over all parts."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from vllm_heterocache.evaluation import command as evaluation
from vllm_heterocache.evaluation.reproduction.parts import (
    BUDGETS,
    PARTS,
    SMALL_BUDGETS,
    USUAL,
)
from vllm_heterocache.refusal import in_one_line

EPILOG = """\
Each part is a run of `heterocache eval` in a folder of its own below DIR, stock vLLM included.
DIR gets report.md, with the tables of all parts, and results.jsonl. An interrupted run goes on with
--resume. A part whose data, packages or prompt lengths cannot be had is left out, and the report
says so. docs/evaluation.md says what the parts ask."""


def add_command(commands: Any) -> None:
    """Add `reproduce` to the subcommands of `heterocache`."""
    parser = commands.add_parser(
        "reproduce",
        help="measure all of docs/quality.md with a model of your own",
        description="Run the evaluations of docs/quality.md with any model, and write one report.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="name or path, as for `vllm serve`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument(
        "--small", action="store_true", help="few short prompts: a try of some minutes on a CPU"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=tuple(PARTS), default=USUAL, metavar="NAME",
        help=f"any of {', '.join(PARTS)}; default: {', '.join(USUAL)}",
    )  # fmt: skip
    parser.add_argument(
        "--gpu-budget", type=float, nargs="+", default=[], metavar="X",
        help=f"default: {' '.join(map(str, BUDGETS))}, of ablations and policies their own; "
        f"with --small {SMALL_BUDGETS[0]}",
    )  # fmt: skip
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="head profile; default: calibrate the model"
    )
    parser.add_argument(
        "--llm", type=evaluation.json_object, default={}, metavar="JSON",
        help="arguments of vLLM's LLM()",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=evaluation.positive, default=1, metavar="N", help="as for `heterocache eval`"
    )
    parser.add_argument("--no-plots", action="store_true")
    parser.set_defaults(run=run_command)


def evaluations(args: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """Part -> the options of its `heterocache eval`."""
    parser = argparse.ArgumentParser(prog="heterocache eval", allow_abbrev=False)
    evaluation.add_options(parser)
    found = {}
    for name in dict.fromkeys(args.parts):
        part = PARTS[name]
        words = [args.model, *part.words(args.small), "--out", str(args.out / name)]
        words += ["--jobs", str(args.jobs)]
        if args.profile is not None:
            words += ["--profile", str(args.profile)]
        words += ["--resume"] * args.resume + ["--no-plots"] * args.no_plots
        found[name] = one = parser.parse_args(words)
        budgets = tuple(args.gpu_budget) or (SMALL_BUDGETS if args.small else part.budgets)
        one.config = part.configurations(budgets)
        one.llm = one.llm | args.llm
    return found


def run_command(args: argparse.Namespace) -> int:
    """Returns 0, or 1 where an engine failed; raises ValueError and ImportError for mistakes."""
    from vllm_heterocache.evaluation.run_folder import RunFolder

    todo = evaluations(args)
    for one in todo.values():
        evaluation.check(one)  # no wait for a mistake
        RunFolder(one.out).check_new(args.resume)
    left_out = leave_out(todo, _tokenizer(args), longest_context(args.model, args.llm))
    if not todo:
        raise ValueError("no part can be evaluated: " + "; ".join(left_out))
    failed = _evaluate_parts(args, todo, left_out)
    print((args.out / "report.md").read_text())
    print(f"wrote {args.out / 'report.md'}, {args.out / 'results.jsonl'}")
    for line in left_out + failed:
        print(f"heterocache reproduce: {line}", file=sys.stderr)
    return 1 if failed else 0


def _evaluate_parts(
    args: argparse.Namespace, todo: dict[str, argparse.Namespace], left_out: list[str]
) -> list[str]:
    """Evaluate one part after the other; returns what failed. The report is there after each."""
    from vllm_heterocache.evaluation.reproduction import report

    done: dict[str, evaluation.Evaluated] = {}
    failed: list[str] = []
    options = {name: " ".join(PARTS[name].words(args.small)) for name in todo}
    about = {name: f"{PARTS[name].about} Options: `{options[name]}`." for name in todo}
    for name, one in todo.items():
        print(f"{name}: {options[name]}", flush=True)
        try:
            done[name] = evaluation.evaluate(one)
        except RuntimeError as error:
            failed.append(f"{name} failed: {error}")
        else:
            failures = done[name].failures.items()
            failed += [f"{name}, {which} failed: {why}" for which, why in failures]
        report.write(args.out, args.model, args.profile, about, done, left_out + failed)
    return failed


def _tokenizer(args: argparse.Namespace) -> Any:
    from vllm_heterocache.evaluation.engine.worker import load_tokenizer

    return load_tokenizer(args.model, args.llm)


def longest_context(model: str, llm: dict[str, Any]) -> int:
    """Tokens that vLLM takes of the model.

    Raises ValueError where vLLM cannot read its configuration.
    """
    from vllm_heterocache.compat import EngineArgs

    names = {one.name for one in fields(EngineArgs)}
    given = {name: value for name, value in llm.items() if name in names}
    return EngineArgs(model=model, **given).create_model_config().max_model_len


def leave_out(todo: dict[str, argparse.Namespace], tokenizer: Any, longest: int) -> list[str]:
    """Drop from `todo` the parts and lengths that cannot be evaluated; returns them with reasons.

    Args:
        longest: tokens that the model takes, prompt and output.
    """
    missing = []
    for name, one in list(todo.items()):
        obstacles = {length: _obstacle(one, length, tokenizer, longest) for length in one.lengths}
        one.lengths = [length for length, why in obstacles.items() if why is None]
        missing += [
            f"{name} at {length:,} tokens was left out: {why}"
            for length, why in obstacles.items()
            if why is not None
        ]
        if not one.lengths:
            del todo[name]
    return missing


def _obstacle(one: argparse.Namespace, length: int, tokenizer: Any, longest: int) -> str | None:
    """Why the model cannot be asked at this length; None where it can."""
    from vllm_heterocache.evaluation.suites import make_suite

    settings = replace(evaluation.settings_of(one), lengths=(length,), num_samples=1)
    try:
        samples = list(make_suite(one.suite).samples(tokenizer, settings))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        return in_one_line(error)
    needed = max(len(sample.prompt) + sample.max_tokens for sample in samples)
    if needed > longest:
        return f"it needs {needed:,} tokens with its answers, and the model takes {longest:,}"
    return None
