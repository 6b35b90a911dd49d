"""`heterocache eval`: options, and the way from them to a run folder with a report."""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_heterocache.policies import POLICIES, RECIPES

if TYPE_CHECKING:
    from vllm_heterocache.evaluation.report.report import ScoreCell
    from vllm_heterocache.evaluation.run_folder import Configuration, RunFolder
    from vllm_heterocache.evaluation.sample import SuiteSettings
    from vllm_heterocache.policies.policy import Policy

DEFAULT_BUDGETS = (0.3, 0.2)
HETEROCACHE = "heterocache"  # the policy that has recipes
FULL = "full"  # the one that has no budgets
MOST = 10**9  # of anything that is counted; more is a slip
EPILOG = """\
Stock vLLM with full attention is always evaluated in the same run. Every configuration gets an
engine of its own: each --policy with each --gpu-budget (policy heterocache also with each --recipe,
policy full with budget 1 alone), and each --config. An interrupted run goes on with --resume;
further configurations can be added to it. DIR gets results.jsonl, report.md and plots.
docs/evaluation.md describes the suites."""


def add_command(commands: Any) -> None:
    """Add `eval` to the subcommands of `heterocache`."""
    parser = commands.add_parser(
        "eval",
        help="measure answers inside vLLM, against stock full attention",
        description="Measure answers inside vLLM, against stock full attention in the same run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    parser.set_defaults(run=run_command)


def add_options(parser: argparse.ArgumentParser) -> None:
    """MODEL and all options of `eval`."""
    parser.add_argument("model", metavar="MODEL", help="name or path, as for `vllm serve`")
    parser.add_argument("--suite", required=True, metavar="NAME", help="chain, fidelity, ruler ...")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="default: the suite's")
    parser.add_argument("--gpu-budget", type=float, nargs="+", default=[], metavar="X")
    parser.add_argument(
        "--policy", nargs="+", choices=tuple(POLICIES), default=[], metavar="NAME",
        help=f"{', '.join(POLICIES)}; default: {HETEROCACHE}",
    )  # fmt: skip
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=[])
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="head profile, for policies that need one"
    )
    parser.add_argument(
        "--config", type=json_object, action="append", default=[], metavar="JSON",
        help="further heterocache options, one engine each; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", type=positive, nargs="+", default=[4000], metavar="N", help="prompt tokens"
    )
    parser.add_argument(
        "--samples", type=positive, default=4, metavar="N", help="per task and length; default: 4"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--data", type=Path, metavar="PATH", help="local data set of the suite")
    parser.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="NAME=VALUE", dest="extra",
        help="a setting of the suite; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--llm", type=json_object, default={}, metavar="JSON", help="arguments of vLLM's LLM()"
    )
    parser.add_argument(
        "--batch", type=positive, default=8, metavar="N", help="samples at once; default: 8"
    )
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="engines at a time; default: 1"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: eval-SUITE-TIME here")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--no-plots", action="store_true")


class Evaluated(NamedTuple):
    """What an evaluation left in its folder."""

    folder: RunFolder
    configurations: list[Configuration]  # without stock
    cells: list[ScoreCell]
    failures: dict[str, str]  # configuration name -> why its engine failed
    plots: list[Path]


def configurations_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Options of each engine but stock: policies x recipes x budgets, then every --config.

    Raises:
        ValueError: a policy refuses its options, or --recipe has no policy to go with.
    """
    crossed = args.gpu_budget or args.recipe or args.policy or not args.config
    options = (_crossed(args) if crossed else []) + args.config
    if args.profile is None:
        return options
    profile = {"profile": str(args.profile.absolute())}
    return [(profile if _needs_profile(one) else {}) | one for one in options]


def _crossed(args: argparse.Namespace) -> list[dict[str, Any]]:
    if args.recipe and HETEROCACHE not in (args.policy or [HETEROCACHE]):
        raise ValueError(
            f"--recipe is refused: only policy {HETEROCACHE} has recipes and it is not among "
            f"--policy {' '.join(args.policy)}; add it, or leave --recipe out"
        )
    crossed: list[dict[str, Any]] = []
    for policy in args.policy or [None]:
        named = {} if policy is None else {"policy": policy}
        recipes = args.recipe if policy in (None, HETEROCACHE) else []
        budgets = [1.0] if policy == FULL else args.gpu_budget or DEFAULT_BUDGETS
        for recipe, budget in itertools.product(recipes or [None], budgets):
            of_recipe = {} if recipe is None else {"recipe": recipe}
            crossed.append(named | {"gpu_budget": budget} | of_recipe)
    return crossed


def _needs_profile(options: dict[str, Any]) -> bool:
    return _policy_of(options).needs_profile


def _check_profile(options: dict[str, Any]) -> None:
    """Raise ValueError where the plugin would refuse the options, or the profile that they name."""
    from vllm_heterocache.heads.profile import HeadProfile

    if _needs_profile(options) and options.get("profile", "auto") != "auto":
        HeadProfile.load(options["profile"])


def _policy_of(options: dict[str, Any]) -> Policy:
    """Raises ValueError where the plugin would refuse the options at start-up."""
    from vllm_heterocache.config import HeteroCacheConfig
    from vllm_heterocache.policies import make_policy

    return make_policy(HeteroCacheConfig.from_additional_config({"heterocache": options}))


def run_command(args: argparse.Namespace) -> int:
    """Returns 0, or 1 where an engine failed; raises as `evaluate`."""
    done = evaluate(args)
    path = done.folder.path
    print((path / "report.md").read_text())
    print("wrote " + ", ".join(map(str, [path / "report.md", path / "results.jsonl", *done.plots])))
    for name, why in done.failures.items():
        print(f"heterocache eval: {name} failed: {why}", file=sys.stderr)
    return 1 if done.failures else 0


def evaluate(args: argparse.Namespace) -> Evaluated:
    """Answers of stock vLLM and of all configurations, their rows, report and plots.

    Raises as `check`, and RuntimeError where stock vLLM failed.
    """
    from vllm_heterocache.evaluation.engine import runner
    from vllm_heterocache.evaluation.report import plots, report
    from vllm_heterocache.evaluation.run_folder import Run, RunFolder, configuration

    check(args)  # no engine for a mistake
    path = args.out or Path(f"eval-{args.suite}-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    folder = RunFolder(path)
    run = Run(args.model, args.suite, settings_of(args), args.llm, args.batch)
    configurations = [configuration(one) for one in configurations_of(args)]
    failures = runner.evaluate(folder, run, configurations, args.resume, jobs=args.jobs)
    cells = report.write(folder, configurations, failures)
    drawn = [] if args.no_plots else plots.save_plots(folder, cells, configurations)
    return Evaluated(folder, configurations, cells, failures, drawn)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for what cannot be evaluated, ImportError where plots need matplotlib."""
    from vllm_heterocache.calibration.model_identity import check_folder
    from vllm_heterocache.compat.engine_args import check_llm_arguments
    from vllm_heterocache.evaluation.report import plots
    from vllm_heterocache.evaluation.suites import make_suite

    make_suite(args.suite)  # its name is right
    check_folder(args.model)
    if not args.no_plots:
        plots.check_matplotlib()
    if args.data is not None and not args.data.exists():
        raise ValueError(f"--data {args.data} does not exist; name a file or folder that does")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is no folder; name another")
    for one in configurations_of(args):
        _check_profile(one)
    check_llm_arguments(args.llm)


def settings_of(args: argparse.Namespace) -> SuiteSettings:
    """What the options say about the suite's samples."""
    from vllm_heterocache.evaluation.sample import SuiteSettings

    return SuiteSettings(
        lengths=tuple(args.lengths),
        num_samples=args.samples,
        seed=args.seed,
        tasks=tuple(args.tasks) if args.tasks else None,
        data=None if args.data is None else args.data.absolute(),
        extra=dict(args.extra),
    )


def json_object(text: str) -> dict[str, Any]:
    """Type of an option that takes a JSON object; raises argparse.ArgumentTypeError."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object")
    return value


def _setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value is JSON where it can be read as such, else text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def positive(text: str) -> int:
    """Type of an option that counts; raises argparse.ArgumentTypeError."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 0 < value <= MOST:
        raise argparse.ArgumentTypeError(f"{text:.40} is not a positive number up to {MOST:,}")
    return value
