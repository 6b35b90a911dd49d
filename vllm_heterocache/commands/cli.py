"""`heterocache calibrate | import-heads | inspect | doctor | eval | compare | reproduce`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_heterocache.policies import RECIPES

if TYPE_CHECKING:
    from collections.abc import Sequence

# Options of `calibrate` that go to vLLM's LLM() as they are.
LLM_OPTIONS: dict[str, type] = {
    "tokenizer": str,
    "revision": str,
    "dtype": str,
    "quantization": str,
    "load_format": str,
    "max_model_len": int,
    "tensor_parallel_size": int,
    "pipeline_parallel_size": int,
    "distributed_executor_backend": str,
    "gpu_memory_utilization": float,
    "kv_cache_memory_bytes": int,
}
# Options of the plugin that change what `inspect` shows.
INSPECT_OPTIONS: dict[str, type] = {
    "gpu_budget": float,
    "full_share": float,
    "finder_share": float,
    "stability_threshold": float,
    "similarity_threshold": float,
    "sink_pages": int,
    "recent_pages": int,
    "min_prompt_tokens": int,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; mistakes of the user end in one line, not a traceback."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "doctor":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.command_line = rest
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        from vllm_heterocache.refusal import in_one_line

        print(f"heterocache {args.command}: error: {in_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"heterocache {args.command}: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    from vllm_heterocache import __version__
    from vllm_heterocache.evaluation.command import add_command as add_eval
    from vllm_heterocache.evaluation.report.command import add_command as add_compare
    from vllm_heterocache.evaluation.reproduction.command import add_command as add_reproduce

    parser = argparse.ArgumentParser(
        prog="heterocache", description="HeteroCache for vLLM.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_calibrate(commands)
    _add_import_heads(commands)
    _add_inspect(commands)
    _add_doctor(commands)
    add_eval(commands)
    add_compare(commands)
    add_reproduce(commands)
    return parser


def _add_calibrate(commands: Any) -> None:
    from vllm_heterocache.evaluation.command import json_object, positive

    parser = commands.add_parser(
        "calibrate",
        help="measure a model's KV heads on vLLM and write its head profile",
        description="Measure a model's KV heads on vLLM and write its head profile.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="name or path, as for `vllm serve`")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: where `profile: auto` looks"
    )
    parser.add_argument("--text", metavar="FILE", help="prose to measure on; default: bundled")
    parser.add_argument("--samples", type=positive, default=3, metavar="N", help="default: 3")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    group = parser.add_argument_group("options passed on to vLLM")
    for name, kind in LLM_OPTIONS.items():
        group.add_argument(_flag(name), type=kind, metavar=kind.__name__.upper())
    group.add_argument("--trust-remote-code", action="store_true", default=None)
    group.add_argument(
        "--llm", type=json_object, default={}, metavar="JSON", help="arguments of vLLM's LLM()"
    )
    parser.add_argument("--end-with-stdin", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=_calibrate)


def _add_import_heads(commands: Any) -> None:
    parser = commands.add_parser(
        "import-heads",
        help="write a head profile from head data that others have published",
        description="Write a head profile from published head data: the full_attention_heads.tsv "
        "of DuoAttention, the config.json of an RTPurbo checkpoint, or a cluster file of "
        "HeteroCache's reference code.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="name or path, as for `vllm serve`")
    parser.add_argument("file", type=Path, metavar="FILE", help="the published head data")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="PROFILE", help="head profile to write"
    )
    parser.add_argument("--revision", metavar="STR", help="of MODEL on the hub")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.set_defaults(run=_import_heads)


def _add_inspect(commands: Any) -> None:
    from vllm_heterocache.evaluation.command import positive

    parser = commands.add_parser(
        "inspect",
        help="show what a head profile means at given options",
        description="Print roles, budgets and clusters of a head profile, and draw them.",
        allow_abbrev=False,
    )
    parser.add_argument("profile", metavar="FILE", help="head profile JSON")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PICTURE",
        help="also draw a picture (.png, .svg, .pdf)",
    )
    parser.add_argument(
        "--prompt-tokens", type=positive, default=32768, metavar="N", help="default: 32768"
    )
    group = parser.add_argument_group(
        "options of the plugin", "Their defaults are in docs/options.md."
    )
    group.add_argument("--recipe", choices=RECIPES)
    for name, kind in INSPECT_OPTIONS.items():
        group.add_argument(_flag(name), type=kind, metavar="X")
    parser.set_defaults(run=_inspect)


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="say what is wrong with the installation or a model's set-up, and what to do",
        usage="heterocache doctor [-h] [MODEL] [OPTION ...]",
        description="Check the installation, and with MODEL whether it can be served here. MODEL "
        "and options are those of `vllm serve`: take its command line as it is.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_doctor)


def _calibrate(args: argparse.Namespace) -> int:
    output: Path | None = args.output
    if output is not None:
        _check_output(output)
    if args.end_with_stdin:
        from vllm_heterocache.calibration.child import end_with_stdin

        end_with_stdin()
    from vllm_heterocache.calibration.calibrate import calibrate
    from vllm_heterocache.calibration.model_identity import check_folder
    from vllm_heterocache.calibration.profile_cache import make_cache_dir, save_cached

    options = (*LLM_OPTIONS, "trust_remote_code")
    given = args.llm | {n: getattr(args, n) for n in options if getattr(args, n) is not None}
    if output is None and given.get("load_format") == "dummy":
        raise ValueError(
            "load_format='dummy' gives random roles, which are not cached; name a file with -o"
        )
    check_folder(args.model)
    if output is None:
        make_cache_dir()  # not after minutes of work
    profile = calibrate(
        args.model, text=args.text, samples=args.samples, seed=args.seed, llm_kwargs=given
    )
    if output is None:
        output = save_cached(profile)
    else:
        profile.save(output)
    print(f"wrote {output}")
    return 0


def _import_heads(args: argparse.Namespace) -> int:
    _check_output(args.output)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the report is the message
    from vllm_heterocache.commands import import_heads

    profile = import_heads.profile_of(args.model, args.file, args.revision, args.trust_remote_code)
    profile.save(args.output)
    print(f"wrote {args.output}")
    print(import_heads.render(profile))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from vllm_heterocache.commands import profile_report
    from vllm_heterocache.config import HeteroCacheConfig
    from vllm_heterocache.heads.pictures import check_picture, save_picture
    from vllm_heterocache.heads.profile import HeadProfile

    if args.output is not None:
        check_picture(args.output)
        _check_output(args.output)
    profile = HeadProfile.load(args.profile)
    names = ("recipe", *INSPECT_OPTIONS)
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = HeteroCacheConfig(**given)
    print(profile_report.render(profile, config, args.prompt_tokens))
    if args.output is not None:
        chosen = profile_report.prompt_budget(profile, config, args.prompt_tokens)
        title = profile_report.settings_line(config, chosen, args.prompt_tokens)
        save_picture(profile, chosen.assignment, chosen.budgets, args.output, title)
        print(f"wrote {args.output}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the report is the message
    from vllm_heterocache.commands import doctor

    return doctor.run(args.command_line)


def _check_output(output: Path) -> None:
    """Raise ValueError where no file can be written, before minutes of work are lost."""
    if not output.absolute().parent.is_dir():
        raise ValueError(f"-o {output} cannot be written: its folder does not exist; make it first")
    if output.is_dir():
        raise ValueError(f"-o {output} cannot be written: it is a folder; name a file")
    if not os.access(output if output.exists() else output.absolute().parent, os.W_OK):
        raise ValueError(f"-o {output} cannot be written: this user may not; name another file")


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


if __name__ == "__main__":
    sys.exit(main())
