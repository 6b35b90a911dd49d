"""scripts/bench/decode.py refuses wrong results, and its rows say what was measured."""

from __future__ import annotations

import copy
import json
from typing import Any

import decode as bench_decode
import pytest
from bench_scripts import ROW_KEYS

from common import engine, engine_runs

COMPACT = {
    "cell": "3x224K",
    "is_compact": True,
    "random_attention": False,
    "first_token_s": 28.3,
    "cached_tokens": 0,
    "requests_that_fit": 9,
    "first_tokens": list(range(32)),
    "kv": {"used": 10760, "limit": 11100, "prompts_dense": 43008, "prompt_share": 0.25},
    "windows": {
        "0.01": {
            "num_steps": 100,
            "tokens_per_step": 1.0,
            "token_ms": 8.0,
            "mean_ms": 8.0,
            "median_ms": 7.9,
            "p99_ms": 9.0,
            "max_ms": 9.5,
            "decode_rows": {"compact": 300, "dense": 0},
            "counters": {"drift_checks": 10000, "drift_triggers": 104, "pages_fetched": 9},
            "num_preemptions": 0,
        }
    },
}
SHORT = {
    "cell": "1x1K",
    "is_compact": False,
    "random_attention": False,
    "first_token_s": 0.1,
    "cached_tokens": 0,
    "requests_that_fit": 900,
    "first_tokens": list(range(32)),
    "windows": {
        "off": {
            "num_steps": 100,
            "tokens_per_step": 1.0,
            "token_ms": 5.0,
            "mean_ms": 5.0,
            "median_ms": 5.0,
            "p99_ms": 6.0,
            "max_ms": 6.5,
            "decode_rows": {"compact": 0, "dense": 100},
            "counters": {},
            "num_preemptions": 0,
        }
    },
}


def changed(cell: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    cell = copy.deepcopy(cell)
    *parents, last = path.split("/")
    place = cell
    for name in parents:
        place = place[name]
    place[last] = value
    return cell


def test_cells_are_ordered_so_that_prompts_grow():
    cells = ["3x224K", "1x1K", "8x32K", "1x224K", "1x32K", "2x700"]
    assert bench_decode.in_order(cells) == ["2x700", "1x1K", "1x32K", "8x32K", "1x224K", "3x224K"]
    assert bench_decode.parse_cell("8x32K") == (8, 32768)
    with pytest.raises(ValueError, match="invalid literal"):
        bench_decode.parse_args(["--cells", "32K"])


def test_longer_prompts_begin_with_shorter_ones():
    short, long = (engine.random_prompt(n, 128256, 3) for n in (100, 1000))
    assert long[:100] == short
    assert engine.random_prompt(100, 128256, 4) != short


def test_right_cells_pass():
    assert bench_decode.cell_problem(COMPACT, None) is None
    assert bench_decode.cell_problem(SHORT, list(range(32))) is None


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("windows/0.01/decode_rows", {"compact": 200, "dense": 100}, "decode rows"),
        ("windows/0.01/decode_rows", {"compact": 0, "dense": 0}, "decode rows"),
        ("windows/0.01/num_preemptions", 1, "preemptions"),
        ("windows/0.01/counters/drift_triggers", 0, "triggered"),
        ("windows/0.01/counters/drift_checks", 0, "triggered"),
        ("windows/0.01/counters/drift_triggers", 1000, "triggered"),
        ("kv/used", 43008, "blocks held"),
        ("first_tokens", [1, 2], "tokens"),
    ],
)
def test_wrong_compact_cells_are_refused(path, value, named):
    assert named in bench_decode.cell_problem(changed(COMPACT, path, value), None)


def test_short_prompts_must_give_the_tokens_of_stock():
    assert "differ from stock" in bench_decode.cell_problem(SHORT, list(range(1, 33)))
    last = [*range(31), 99]
    assert "differ from stock" in bench_decode.cell_problem(SHORT, last)
    assert "differ from stock" in bench_decode.cell_problem(SHORT, last, num_equal=32)
    assert bench_decode.cell_problem(SHORT, last, num_equal=31) is None


def result_of(name: str, *cells: dict[str, Any]) -> dict[str, Any]:
    kind = dict.fromkeys(("v2_model_runner", "async_scheduling", "prefix_caching"), True)
    return {
        "engine_name": name,
        "engine": kind | {"cudagraph_mode": "FULL_AND_PIECEWISE"},
        "device": "NVIDIA H200",
        "date": "2026-01-02",
        "versions": {"vllm": "0.33.0"},
        "commit": "abc",
        "started": "2026-01-02T03:04:05+00:00",
        "options": None if name == "stock" else {"gpu_budget": 0.25},
        "cells": list(cells),
    }


def stock_cell() -> dict[str, Any]:
    window = COMPACT["windows"]["0.01"] | {"token_ms": 20.0, "median_ms": 20.0}
    return COMPACT | {"is_compact": False, "random_attention": False, "windows": {"off": window}}


def test_rows_hold_ratios_and_provenance():
    off = COMPACT["windows"]["0.01"] | {"token_ms": 7.0}
    ours = COMPACT | {"windows": {"off": off, **COMPACT["windows"]}}
    results = {"stock": result_of("stock", stock_cell()), "paper": result_of("paper", ours)}
    bench_decode.check({"stock": results["stock"]})
    args = bench_decode.parse_args(["--run", "7", "--cells", "3x224K"])
    rows = bench_decode.rows_of(args, results)
    assert [(r["engine"], r["drift"]) for r in rows] == [
        ("stock", None),
        ("paper", "off"),
        ("paper", "0.01"),
    ]
    assert rows[2]["to_stock"] == pytest.approx(0.4)
    assert rows[2]["to_no_drift"] == pytest.approx(8 / 7)
    assert all(row.keys() >= ROW_KEYS for row in rows)
    bench_decode.print_rows(rows)


def test_rows_hold_what_context_adds_and_how_many_requests_fit():
    """Stock: 20 ms with context and 4 without; ours: 8 and 5."""
    dense = changed(SHORT, "windows/off/token_ms", 4.0) | {"first_tokens": [0, 1, *range(30)]}
    stock = result_of("stock", dense, stock_cell() | {"requests_that_fit": 3})
    results = {"stock": stock, "retrieval": result_of("retrieval", SHORT, COMPACT)}
    rows = bench_decode.rows_of(bench_decode.parse_args([]), results)
    added = [(row["added_ms"], row["added_to_stock"]) for row in rows]
    assert added == [(None, None), (16.0, 1.0), (None, None), (3.0, pytest.approx(3 / 16))]
    assert [row["requests_to_stock"] for row in rows] == [1.0, 1.0, 1.0, 3.0]
    assert [row["equal_tokens"] for row in rows] == [32, 32, 2, None]
    alone = bench_decode.rows_of(bench_decode.parse_args([]), {"retrieval": results["retrieval"]})
    assert (alone[1]["added_ms"], alone[1]["added_to_stock"]) == (3.0, None)
    assert alone[1]["requests_to_stock"] is None


def test_engines_with_long_cells_alone_add_to_nothing():
    rows = bench_decode.rows_of(bench_decode.parse_args([]), {"paper": result_of("paper", COMPACT)})
    assert rows[0]["added_ms"] is None


@pytest.mark.parametrize(
    "change", [{"device": "NVIDIA H100"}, {"versions": {"vllm": "0.27.0"}}], ids=str
)
def test_engines_of_different_machines_are_not_compared(change):
    results = [result_of("stock", SHORT), result_of("paper", SHORT) | change]
    with pytest.raises(SystemExit, match="different machines"):
        engine_runs.check_same_machine(results)


def test_other_engines_than_the_default_one_are_refused():
    result = result_of("stock", SHORT)
    result["engine"]["async_scheduling"] = False
    with pytest.raises(SystemExit, match="default engine"):
        engine_runs.check_default_engine(result)


def test_levels_of_drift_share_an_engine_or_have_their_own(tmp_path):
    levels = ["--drift-force", "off", "0", "0.1"]
    args = bench_decode.parse_args(["--engine", "stock", "retrieval", *levels])
    specs = bench_decode.specs_of(args, tmp_path)
    assert [(s["levels"], s["switch_levels"]) for s in specs] == [
        (["off"], False),
        (["off", "0", "0.1"], True),
    ]
    args.engine_per_level = True
    specs = bench_decode.specs_of(args, tmp_path)[1:]
    assert [s["levels"] for s in specs] == [["off"], ["0"], ["0.1"]]
    assert specs[0]["options"]["drift_threshold"] == 0
    assert [s["drift"] for s in specs] == ["off", "0", "0.1"]


@pytest.mark.parametrize(
    ("levels", "changed"),
    [
        (["off"], {"drift_threshold": 0.0}),
        (["real"], {}),
        (["off", "real"], {}),
        (["0.1"], {"finder_share": 0}),
        (["off", "real", "0.1"], {"finder_share": 0}),
    ],
    ids=str,
)
def test_triggers_are_forced_where_no_head_is_a_finder(levels, changed, tmp_path):
    args = bench_decode.parse_args(["--engine", "retrieval", "--drift-force", *levels])
    (spec,) = bench_decode.specs_of(args, tmp_path)
    names = ("drift_threshold", "finder_share")
    assert {name: v for name, v in spec["options"].items() if name in names} == changed


def test_the_same_work_in_another_folder_is_recognised(tmp_path):
    args = bench_decode.parse_args(["--engine", "retrieval"])
    (one,) = bench_decode.specs_of(args, tmp_path / "a")
    (other,) = bench_decode.specs_of(args, tmp_path / "b")
    assert engine_runs.fingerprint(one) == engine_runs.fingerprint(other)
    args.steps += 1
    (longer,) = bench_decode.specs_of(args, tmp_path / "a")
    assert engine_runs.fingerprint(one) != engine_runs.fingerprint(longer)


def test_ranks_reach_the_engine_or_are_refused(tmp_path):
    args = bench_decode.parse_args(["--engine", "stock", "retrieval"])
    assert [s["llm"]["tensor_parallel_size"] for s in bench_decode.specs_of(args, tmp_path)] == [
        1,
        1,
    ]
    args.tensor_parallel_size = 4
    specs = bench_decode.specs_of(args, tmp_path)
    assert [s["llm"]["tensor_parallel_size"] for s in specs] == [4, 4]
    for nonsense in (0, -2, 3, 16):
        args.tensor_parallel_size = nonsense
        with pytest.raises(SystemExit, match="does not divide 8 KV heads"):
            bench_decode.specs_of(args, tmp_path)


def test_a_model_shape_brings_its_cells_engines_and_settings(tmp_path):
    args = bench_decode.parse_args(["--model-shape", "qwen3.5-27b"])
    assert (args.cells, args.engine) == (["1x1K", "1x128K", "1x224K"], ["stock", "retrieval"])
    stock, ours = bench_decode.specs_of(args, tmp_path)
    assert stock["llm"]["gdn_prefill_backend"] == ours["llm"]["gdn_prefill_backend"] == "triton"
    assert stock["llm"]["load_format"] == "dummy" and stock["llm"]["max_num_seqs"] == 8
    assert ours["options"]["gpu_budget"] == 0.1
    rows = bench_decode.rows_of(args, {"retrieval": result_of("retrieval", SHORT)})
    assert (rows[0]["model"], rows[0]["num_layers"]) == ("qwen3.5-27b-shape", 64)


def test_rows_and_kept_results_tell_shapes_and_layers_apart(tmp_path):
    """Tiny shapes differ in their config.json alone."""
    prints, layers = set(), []
    for more in (["gemma-3-27b"], ["gpt-oss-20b"], ["gemma-3-27b", "--num-layers", "8"]):
        args = bench_decode.parse_args(["--tiny", "--engine", "stock", "--model-shape", *more])
        (spec,) = bench_decode.specs_of(args, tmp_path)
        prints.add(engine_runs.fingerprint(spec))
        layers.append(engine_runs.engine_row("decode", args, result_of("stock"))["num_layers"])
    assert len(prints) == 3 and layers == [9, 4, 8]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--num-layers", "12"], "--num-layers is of a --model-shape"),
        (["--model-shape", "gemma-3-27b", "--num-layers", "11"], "11 is not from 12 to 62"),
        (["--model-shape", "gpt-oss-20b", "--num-layers", "25"], "25 is not from 4 to 24"),
        (["--model-shape", "gpt-oss-20b", "--engine", "paper"], "--engine paper"),
    ],
)
def test_options_that_a_shape_does_not_go_with_are_refused(argv, named):
    with pytest.raises(SystemExit, match=named):
        bench_decode.parse_args(argv)


@pytest.fixture
def tiny_rows(tmp_path):
    """`tiny_rows(words)`: rows of a tiny run, whose engines have processes of their own."""

    def run(words: str) -> list[dict[str, Any]]:
        bench_decode.main(["--tiny", "--steps", "16", "--out", str(tmp_path), *words.split()])
        return [json.loads(line) for line in (tmp_path / "decode.jsonl").read_text().splitlines()]

    return run


@pytest.mark.e2e
@pytest.mark.slow
def test_tiny_run_of_stock_and_heterocache(tiny_rows):
    rows = tiny_rows("--engine stock retrieval --cells 1x200 2x1K")
    assert [(r["engine"], r["cell"]) for r in rows] == [
        (name, cell) for name in ("stock", "retrieval") for cell in ("1x200", "2x1K")
    ]
    assert all(row["to_stock"] > 0 for row in rows)
    assert rows[-1]["kv"]["prompt_share"] <= 0.515
    assert rows[-1]["decode_rows"]["dense"] == 0
    assert rows[-1]["requests_to_stock"] > 1.5 and rows[-1]["added_ms"] is not None


@pytest.mark.e2e
@pytest.mark.slow
def test_tiny_run_beside_recurrent_layers(tiny_rows):
    """Blocks of 144 tokens, of which a prompt of 1,024 keeps 4 of 7, and a state in each of three
    groups."""
    short, long = tiny_rows("--model-shape qwen3.5-27b --engine retrieval --cells 1x200 2x1K")
    assert (long["model"], long["num_layers"]) == ("tiny-delta-nets-shape", 8)
    assert long["config"]["engine"]["block_size"] == 144
    assert long["kv"]["prompts_dense"] == 2 * 7 and long["kv"]["other_groups"] == 2 * 3
    assert long["kv"]["used"] == 2 * (4 + 1 + 3)
    assert long["decode_rows"]["dense"] == 0 and short["decode_rows"]["compact"] == 0
    added = long["token_ms"] - short["token_ms"]  # rows are rounded to five digits
    assert long["added_ms"] == pytest.approx(added, abs=0.02)
    # 909 blocks: 112 of 4 + 1 + 3 beside one of 8 + 4 + 3 * 2 in prefill
    assert long["requests_that_fit"] == 112
