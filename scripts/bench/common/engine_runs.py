"""Engines in processes of their own, whose results are kept and checked.

An engine is named `stock`, `paper` or `retrieval`, and the model is a Llama-3.1-8B unless
`--model-shape` names another (model_shapes.py). Raw results are kept as JSON in a folder, so
that a benchmark can be continued with further engines (`--raw FOLDER`): what is there for the same
engine, cells and settings is used again instead of being measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import model_shapes, profiles
from common.rows import row_parser

ENGINES = ("stock", "paper", "retrieval")
STOCK_BACKEND = "FLASH_ATTN"  # on a GPU; the tiny model takes what the platform has


def engine_parser(description: str | None) -> argparse.ArgumentParser:
    parser = row_parser(description)
    parser.add_argument(
        "--model-shape",
        choices=model_shapes.SHAPES,
        help="a model with sliding or recurrent layers instead of a Llama-3.1-8B",
    )
    parser.add_argument(
        "--num-layers", type=int, metavar="N", help="the first N layers of --model-shape alone"
    )
    parser.add_argument(
        "--engine", nargs="+", choices=ENGINES, help="default: all that the shape has"
    )
    parser.add_argument(
        "--raw", type=Path, help="--out of an earlier call; its raw results are used"
    )
    parser.add_argument("--gpu-budget", type=float, help="default: the shape's")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    parser.add_argument("--cpu-pool-gib", type=float, help="host pool; default: sized by itself")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--kv-cache-dtype", default="auto", help="of all engines")
    parser.add_argument(
        "--drafts", type=int, default=0, metavar="K", help="n-gram drafts a step, of all engines"
    )
    parser.add_argument("--option", type=json.loads, default={}, help="more options, JSON")
    parser.add_argument("--timeout", type=float, default=580, help="seconds for one engine")
    return parser


def parse_args(
    parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> argparse.Namespace:
    """What `engine_parser` asks for, with the engines of the shape; raises SystemExit where options
    do not go together."""
    args = parser.parse_args(argv)
    engines = [name for name in ENGINES if name != "paper" or shape_of(args).paper_layers]
    args.engine = args.engine or engines
    if not set(args.engine) <= set(engines):
        raise SystemExit("--engine paper: the published roles are a Llama's; drop --model-shape")
    return args


def shape_of(args: argparse.Namespace) -> profiles.Shape:
    """Raises SystemExit where --num-layers is not of the shape."""
    if args.model_shape is None:
        if args.num_layers is not None:
            raise SystemExit("--num-layers is of a --model-shape; name one")
        return profiles.TINY if args.tiny else profiles.LLAMA
    shapes = model_shapes.TINY_SHAPES if args.tiny else model_shapes.SHAPES
    shape = shapes[args.model_shape]
    if args.num_layers is None:
        return shape
    try:
        return shape.first_layers(args.num_layers)
    except ValueError as error:
        raise SystemExit(f"--num-layers of --model-shape {args.model_shape}: {error}") from None


def ranks_of(args: argparse.Namespace) -> int:
    """--tensor-parallel-size; raises SystemExit where the shape's KV heads do not share out."""
    ranks, heads = args.tensor_parallel_size, shape_of(args).num_kv_heads
    if ranks < 1 or heads % ranks:
        raise SystemExit(f"--tensor-parallel-size {ranks} does not divide {heads} KV heads")
    return ranks


@contextlib.contextmanager
def model_folder(args: argparse.Namespace) -> Iterator[Path]:
    """config.json, profiles and, for the tiny shape, weights."""
    shape = shape_of(args)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = Path(folder) / shape.name
        profiles.write_model(shape, path, ranks_of(args))
        if shape is profiles.TINY:  # of the others the dummy weights do
            profiles.write_weights(shape, path)
        yield path


def drift_options(*levels: str) -> dict[str, Any]:
    """Options of an engine for levels of drift: "off", "real" or the share of the checks that shall
    trigger; the share itself is `drift` of a session's spec. Only pivots are checked, so with a
    share no head is a finder."""
    if set(levels) <= {"off"}:
        return {"drift_threshold": 0.0}
    return {} if set(levels) <= {"off", "real"} else {"finder_share": 0}


def engine_spec(
    args: argparse.Namespace, name: str, folder: Path, max_model_len: int, **options: Any
) -> dict[str, Any]:
    """What `Session` needs for the engine called `name`."""
    shape = shape_of(args)
    llm: dict[str, Any] = {"max_model_len": max_model_len, "seed": 0}
    llm["tensor_parallel_size"] = ranks_of(args)
    llm["kv_cache_dtype"] = args.kv_cache_dtype
    if args.drafts:
        llm["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": args.drafts,
            "prompt_lookup_max": 4,
        }
    llm |= shape.settings
    if shape is not profiles.TINY:
        llm["load_format"] = "dummy"
    if args.tiny:
        llm |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28, "dtype": shape.dtype}
    else:
        llm |= {
            "gpu_memory_utilization": args.gpu_memory_utilization,
            "attention_backend": STOCK_BACKEND,
        }
    spec: dict[str, Any] = {
        "engine": name,
        "model": str(folder),
        "config": shape.config(),
        "llm": llm,
        "options": None,
    }
    if name != "stock":
        budget = args.gpu_budget or shape.gpu_budget
        spec["options"] = {
            "gpu_budget": budget,
            "recipe": name,
            "profile": str(folder / f"{name}.json"),
            **({"cpu_pool_gib": args.cpu_pool_gib} if args.cpu_pool_gib else {}),
            **options,
            **args.option,
        }
    return spec


def options_in_rows(spec: dict[str, Any]) -> dict[str, Any] | None:
    """An engine's options but for the profile's path, which is of one run; None for stock."""
    options = spec["options"]
    return options and {name: value for name, value in options.items() if name != "profile"}


def checked_results(
    args: argparse.Namespace,
    script: str,
    spec_of: Callable[[argparse.Namespace, str, Path], dict[str, Any]],
    problem: Callable[[dict[str, Any]], str | None],
) -> list[dict[str, Any]]:
    """Results of `run_engine` for each engine of `args`, with its options as rows have them.

    Raises SystemExit where `problem` finds one in a result, or engines cannot be compared.
    """
    results = []
    with model_folder(args) as folder:
        for name in args.engine:
            spec = spec_of(args, name, folder)
            result = run_engine(args, script, spec)
            results.append(result | {"options": options_in_rows(spec)})
    check_same_machine(results)
    for result in results:
        check_default_engine(result)
        if found := problem(result):
            raise SystemExit(f"{result['engine_name']}: {found}; nothing is reported")
    return results


def run_engine(args: argparse.Namespace, script: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The result of `script` for `spec`: kept from an earlier call, or measured in a subprocess.

    Raises SystemExit when the subprocess fails; its log is in --out.
    """
    label = f"{Path(script).stem}-{spec['engine']}-{fingerprint(spec)}"
    for folder in (args.raw, args.out):
        kept = folder / "raw" / f"{label}.json" if folder else None
        if kept and kept.is_file():
            print(f"{spec['engine']}: measured earlier, {kept.name}", flush=True)
            return json.loads(kept.read_text())
    with contextlib.ExitStack() as stack:
        if args.out:
            folder = args.out / "raw"
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = {name: folder / f"{label}.{name}" for name in ("spec", "log", "partial")}
        paths["spec"].write_text(json.dumps(spec))
        started = datetime.datetime.now(datetime.UTC)
        print(f"{spec['engine']}: running", flush=True)
        _run(script, paths, args.timeout)
        result = json.loads(paths["partial"].read_text())
        result |= {
            "engine_name": spec["engine"],
            "commit": args.commit,
            "started": started.isoformat("T", "seconds"),
            "wall_s": round((datetime.datetime.now(datetime.UTC) - started).total_seconds(), 1),
        }
        paths["partial"].write_text(json.dumps(result) + "\n")
        paths["partial"].rename(folder / f"{label}.json")
    print(f"{spec['engine']}: {result['wall_s']} s", flush=True)
    return result


def fingerprint(spec: dict[str, Any]) -> str:
    """Equal for equal work, wherever the model folder lies."""
    text = json.dumps(spec, sort_keys=True).replace(spec["model"], "")
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _run(script: str, paths: dict[str, Path], timeout: float) -> None:
    command = [sys.executable, script, "--in-engine", str(paths["spec"]), str(paths["partial"])]
    with paths["log"].open("w") as log:
        try:
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=timeout
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"no end after {timeout} s"
    if code:
        tail = "".join(paths["log"].read_text(errors="replace").splitlines(keepends=True)[-40:])
        raise SystemExit(f"{tail}\nthe engine failed ({code}); nothing is reported")


def check_default_engine(result: dict[str, Any]) -> None:
    """Raise SystemExit unless a GPU engine ran as vLLM runs it by default."""
    if result["device"].startswith("cpu"):
        return
    wanted = {
        "v2_model_runner": True,
        "cudagraph_mode": "FULL_AND_PIECEWISE",
        "async_scheduling": True,
        "prefix_caching": True,
    }
    got = {name: result["engine"][name] for name in wanted}
    if got != wanted:
        raise SystemExit(f"{result['engine_name']} is not vLLM's default engine: {got}")


def check_same_machine(results: list[dict[str, Any]]) -> None:
    """Raise SystemExit unless all results are of one device type and one set of versions."""
    seen = {(r["device"], json.dumps(r["versions"], sort_keys=True)) for r in results}
    if len(seen) > 1:
        raise SystemExit(f"engines ran on different machines: {sorted(seen)}")


def engine_row(benchmark: str, args: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """The beginning of a row: what it is of, and how somebody else can repeat it."""
    made = {name: result[name] for name in ("date", "commit", "device", "versions")}
    return {
        "benchmark": benchmark,
        **made,
        "run": args.run,
        "started": result["started"],
        "model": shape_of(args).name,
        "num_layers": shape_of(args).config()["num_hidden_layers"],
        "engine": result["engine_name"],
    }
