"""scripts/bench/serving.py, swap.py and the plots: what they refuse, compute and draw."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import plot
import pytest
import serving
import swap
from bench_scripts import ROW_KEYS

from common import engine
from vllm_heterocache.compat.other_groups import OtherGroup

RESULT: dict[str, Any] = {
    "engine_name": "retrieval",
    "engine": {},
    "device": "NVIDIA H200",
    "versions": {},
    "commit": "abc",
    "date": "2026-01-02",
    "started": "2026-01-02T03:04:05+00:00",
    "options": {"gpu_budget": 0.25},
    "num_tokens": 131072,
    "requests": 4,
    "prefill": [
        {"first_token_s": s, "second_token_s": s + 0.01, "released_s": 12.0, "cached_tokens": 0}
        for s in (10.0, 11.0, 10.5)
    ],
    "decode": {
        "tokens": [512] * 4,
        "cached_tokens": [131056] * 4,
        "tokens_per_s": 400.0,
        "elapsed_s": 6.0,
        "num_preemptions": 0,
        "requests_without_retrieval": 3,
        "kv": {"used": 8300, "limit": 8500},
        "window": {
            "num_steps": 400,
            "mean_ms": 10.0,
            "decode_rows": {"compact": 1600, "dense": 0},
        },
    },
}


def test_right_result_passes():
    assert serving.problem(RESULT, 512) is None


@pytest.mark.parametrize(
    ("place", "name", "value", "named"),
    [
        ("decode", "tokens", [512, 512, 511, 512], "generated"),
        ("decode", "num_preemptions", 2, "preemptions"),
        ("decode", "cached_tokens", [131056, 131056, 0, 131056], "prefilled again"),
        ("decode", "kv", {"used": 9000, "limit": 8500}, "blocks held"),
    ],
)
def test_wrong_results_are_refused(place, name, value, named):
    result = copy.deepcopy(RESULT)
    result[place][name] = value
    assert named in serving.problem(result, 512)


def test_dense_rows_and_cached_prefills_are_refused():
    result = copy.deepcopy(RESULT)
    result["decode"]["window"]["decode_rows"] = {"compact": 1200, "dense": 400}
    assert "decode rows" in serving.problem(result, 512)
    result = copy.deepcopy(RESULT)
    result["prefill"][1]["cached_tokens"] = 4096
    assert "prefix cache" in serving.problem(result, 512)


def test_large_blocks_leave_their_last_tokens_to_be_prefilled():
    result = copy.deepcopy(RESULT) | {"engine": {"block_size": 256}, "num_tokens": 1000}
    result["decode"]["cached_tokens"] = [768] * 4
    assert serving.problem(result, 512) is None
    result["engine"] = {"block_size": 16}
    assert "prefilled again" in serving.problem(result, 512)


def test_row_tells_the_phase_from_the_whole_run():
    args = serving.parse_args(["--run", "1"])
    stock = copy.deepcopy(RESULT) | {"engine_name": "stock", "options": None, "requests": 2}
    stock["decode"]["tokens_per_s"] = 100.0
    rows = serving.rows_of(args, [stock, RESULT])
    ours = rows[1]
    assert ours.keys() >= ROW_KEYS
    assert ours["prefill_s"] == pytest.approx(10.51)
    assert ours["to_stock"]["decode_phase_tokens_per_s"] == pytest.approx(4.0)
    whole = 4 * 512 / (4 * 10.51 + 6.0)
    assert ours["whole_run_tokens_per_s_computed"] == pytest.approx(whole)
    assert ours["requests_without_retrieval"] == 3
    serving.print_rows(rows)


def session(
    num_blocks: int, gpu_budget: float | None, block_size: int = 16, others: tuple[Any, ...] = ()
) -> SimpleNamespace:
    """What is read of an engine's session; stock vLLM has no budget."""
    options = None if gpu_budget is None else {"gpu_budget": gpu_budget}
    return SimpleNamespace(
        num_blocks=num_blocks, options=options, block_size=block_size, other_groups=others
    )


def test_capacity_counts_the_last_prompt_dense():
    spec = {"num_tokens": 131072, "num_output": 512}
    assert serving.capacity(session(57109, None), spec) == 6
    # 22 compacted requests of 2048 + 34 blocks beside one of 8192 + 2048 + 34
    assert serving.capacity(session(57109, 0.25), spec) == 23


def test_capacity_counts_windows_and_states():
    spec = {"num_tokens": 131072, "num_output": 512}
    windows = [OtherGroup(16, window=1024, most_blocks=577)] * 6
    # stock: 8192 + 34 + 6 * 65 blocks, in prefill 8192 + 34 + 6 * 577
    assert serving.capacity(session(8192 + 34 + 6 * 577 + 64, None, others=windows), spec) == 1
    assert serving.capacity(session(8192 + 34 + 6 * 577 + 63, None, others=windows), spec) == 0
    # ours: 35 of 820 + 34 + 390 blocks beside one of 8192 + 820 + 34 + 6 * 577
    assert serving.capacity(session(57109, 0.1, 16, windows), spec) == 36
    states = [OtherGroup(784, num_states=2)] * 3
    # blocks of 784 tokens: 168 + 3 + 6 of stock's, 17 + 3 + 6 of ours
    assert serving.capacity(session(1462, None, 784, states), spec) == 8
    assert serving.capacity(session(1462, 0.1, 784, states), spec) == 49


def test_requests_hold_blocks_of_all_groups():
    """Two prompts of 131,072 tokens with 100 generated ones, in blocks of 784 tokens."""
    held = SimpleNamespace(
        **vars(session(1462, 0.1, 784, (OtherGroup(784, num_states=2),) * 3)),
        num_drafts=0,
        requests={
            name: engine.Running(131072, 0.0, [7] * 100, []) for name in ("warm", "one", "two")
        },
        used_blocks=lambda: 42,
    )
    found = engine.kv_blocks(held, ["one", "two"])
    assert {name: found[name] for name in ("prompts_dense", "generated", "other_groups")} == {
        "prompts_dense": 2 * 167,
        "generated": 2,
        "other_groups": 2 * 3,
    }
    assert found["prompt_share"] == pytest.approx((42 - 2 - 6) / 334)
    assert found["limit"] == pytest.approx(1.03 * 34 + 2 + 2 * 6)


def test_states_are_held_for_each_draft_and_one_more_usually():
    assert engine.blocks_of_groups([OtherGroup(784, num_states=2)], 9000) == (1, 2)
    assert engine.blocks_of_groups([OtherGroup(784, num_states=2 + 4)], 9000) == (5, 6)


def test_windows_hold_what_they_have_not_left():
    window = OtherGroup(16, window=50, most_blocks=9)
    assert engine.blocks_of_groups([window], 40) == (3, 3)
    assert engine.blocks_of_groups([window], 1000) == (63 - 59, 5)


def test_transfers_of_the_cpu_pass_their_own_checks():
    rows = swap.measure(is_tiny=True)
    kinds = [row["cell"].split()[0] for row in rows]
    assert kinds == ["offload"] + ["flip"] * 2
    assert all(min(row.get("gb_per_s") or row["us"]) > 0 for row in rows)
    assert rows[-1]["config"]["moves"] > 0


def decode_row(engine: str, cell: str, mean_ms: float, drift: str | None = "off") -> dict[str, Any]:
    row = {"benchmark": "decode", "engine": engine, "cell": cell, "mean_ms": mean_ms}
    return row | {"drift": drift, "device": "NVIDIA H200", "run": "1"}


def test_plots_take_batch_one_and_every_concurrency(tmp_path):
    rows = [
        decode_row("stock", "1x32K", 6.0, None),
        decode_row("stock", "1x224K", 12.0, None),
        decode_row("stock", "3x224K", 24.0, None),
        decode_row("retrieval", "1x224K", 7.0),
        decode_row("retrieval", "1x224K", 9.0, "0.1"),
        decode_row("retrieval", "3x224K", 10.0),
        decode_row("retrieval", "1x224K", 8.0) | {"random_attention": True, "run": "2"},
        decode_row("retrieval", "1x224K", 4.0) | {"model": "gemma-3-27b-shape"},
        decode_row("retrieval", "1x224K", 6.0)
        | {"config": {"options": {"evicted_means": True}, "engine": {"tensor_parallel_size": 1}}},
        decode_row("stock", "1x224K", 7.0)
        | {"config": {"options": None, "engine": {"tensor_parallel_size": 2}}},
        *(
            decode_row("retrieval", "1x32K", 99.0)
            | {"config": {"options": options, "engine": engine}}
            for options, engine in (
                ({"gpu_budget": 0.1}, {}),
                (None, {"kv_cache_dtype": "fp8"}),
                (None, {"num_drafts": 4}),
            )
        ),
        {"benchmark": "forced_chain"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = plot.read_rows([path])
    assert len(found) == 6
    times = plot.times_by_engine(found)
    assert times == {
        "stock": [(32768, 6.0), (229376, 12.0)],
        "retrieval": [(229376, 7.0)],
    }
    throughput = plot.throughput_by_engine(found)
    assert throughput["retrieval", 229376] == [(1, pytest.approx(1e3 / 7)), (3, 300.0)]
    assert ("stock", 32768) not in throughput
    pytest.importorskip("matplotlib")
    pictures = plot.plot(found, tmp_path)
    assert all(picture.read_text().startswith("<?xml") for picture in pictures)
