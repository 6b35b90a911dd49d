"""scripts/bench/offloading.py: what it asks an engine, refuses and computes."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import offloading
import pytest
from bench_scripts import ROW_KEYS

from common import profiles

NUM_TOKENS, OUTPUT, LOADS = 4100, 4, 2
SPEC = {
    "num_tokens": NUM_TOKENS,
    "num_output": OUTPUT,
    "vocab_size": 99,
    "prefills": 2,
    "loads": LOADS,
}


class FakeSession:
    """An engine that answers with a prompt's first tokens, and keeps all blocks of 16 of it but
    the last: on the GPU until it shall forget, and for ever on the host."""

    def __init__(self, spec: dict[str, Any]):
        self.on_gpu: set[tuple[int, ...]] = set()
        self.on_host: set[tuple[int, ...]] = set()
        self.requests: dict[str, Any] = {}
        self.is_running = False

    def start(self, prompts: list[list[int]], num_tokens: int) -> list[str]:
        (prompt,) = map(tuple, prompts)
        seconds = 0.1 if prompt in self.on_gpu else 0.5 if prompt in self.on_host else 10.0
        self.requests[name := str(len(self.requests))] = SimpleNamespace(
            first_token_s=seconds,
            submitted=100.0,
            times=[100.0 + seconds, 100.01 + seconds],
            cached_tokens=0 if seconds == 10.0 else len(prompt) - 16,
            tokens=list(prompt[:num_tokens]),
        )
        self.on_gpu.add(prompt)
        self.on_host.add(prompt)
        self.is_running = True
        return [name]

    def finish(self) -> None:
        self.is_running = False

    def forget_prompts(self) -> None:
        assert not self.is_running
        self.on_gpu.clear()

    def metrics(self) -> dict[str, float]:
        return {"requests_compacted": len(self.requests), "kv_offload_load_bytes": 7.0, "x": 1.0}

    def describe(self) -> dict[str, Any]:
        return {"start_s": 50.0}

    def close(self) -> None:
        pass


@pytest.fixture
def result(monkeypatch) -> dict[str, Any]:
    monkeypatch.setattr(offloading.engine, "Session", FakeSession)
    return offloading.measure(SPEC) | {
        "engine_name": "retrieval",
        "device": "NVIDIA H200",
        "versions": {},
        "commit": "abc",
        "date": "2026-01-02",
        "started": "2026-01-02T03:04:05+00:00",
        "options": {"gpu_budget": 0.1},
    }


def times(result: dict[str, Any], kind: str) -> list[float]:
    return [sample["first_token_s"] for sample in result["asked"][kind]]


def test_prompts_are_prefilled_then_cached_then_loaded(result):
    assert times(result, "prefilled") == [10.0, 10.0]
    assert times(result, "cached") == [0.1]
    assert times(result, "loaded") == [0.5] * LOADS
    assert result["transfers"] == {"kv_offload_load_bytes": 7.0}
    assert offloading.problem(result, NUM_TOKENS) is None


@pytest.mark.parametrize(
    ("kind", "index", "name", "value", "said"),
    [
        ("prefilled", 1, "cached_tokens", 16, "was cached"),
        ("cached", 0, "cached_tokens", 0, "prefilled behind the first 0"),
        ("loaded", 1, "cached_tokens", NUM_TOKENS - 160, "prefilled behind the first 3940"),
        ("loaded", 1, "tokens", [1, 2, 3, 99], "gave [1, 2, 3, 99]"),
    ],
)
def test_wrong_results_are_refused(result, kind, index, name, value, said):
    result = copy.deepcopy(result)
    result["asked"][kind][index][name] = value
    assert said in offloading.problem(result, NUM_TOKENS)


def test_prompts_that_stayed_dense_are_refused_but_for_stock(result):
    result = result | {"requests_compacted": 4}
    assert offloading.problem(result, NUM_TOKENS) == "4 of 5 prompts were compacted"
    assert offloading.problem(result | {"options": None}, NUM_TOKENS) is None


def test_a_row_compares_medians_and_counts_tokens_as_prefilled(result, capsys):
    arguments = ["--tokens", str(NUM_TOKENS), "--output", str(OUTPUT)]
    args = offloading.parse_args(arguments)
    result = copy.deepcopy(result)
    result["asked"]["loaded"][1]["first_token_s"] = 0.7
    result["asked"]["prefilled"][1]["tokens"][2] = 99
    row = offloading.row_of(args, result)
    assert row.keys() >= ROW_KEYS
    assert row["prefilled_s"] == 10.0 and row["cached_s"] == 0.1
    assert row["loaded_s"] == pytest.approx(0.6)
    assert row["loaded_to_prefilled"] == pytest.approx(0.06)
    assert row["tokens_as_prefilled"] == 2
    offloading.print_rows([row])
    assert "2 of 4" in capsys.readouterr().out


def test_the_host_keeps_a_prompt_and_a_quarter_by_default():
    assert offloading.parse_args([]).offloading_gib == 21
    assert offloading.parse_args(["--kv-cache-dtype", "fp8"]).offloading_gib == 11
    assert offloading.parse_args(["--offloading-gib", "33"]).offloading_gib == 33
    assert offloading.prompt_gib(profiles.LLAMA, 128 * 1024, "auto") == 16


def test_cases_that_cannot_be_measured_are_refused():
    with pytest.raises(SystemExit, match="from a GPU alone"):
        offloading.parse_args(["--tiny"])
    with pytest.raises(SystemExit, match="add a few tokens"):
        offloading.parse_args(["--tokens", "4096"])
    with pytest.raises(SystemExit, match="1 or more"):
        offloading.parse_args(["--loads", "0"])


def test_prompts_are_forgotten_as_soon_as_nothing_holds_their_blocks(monkeypatch):
    monkeypatch.setattr(offloading.engine, "POLL_SECONDS", 0.0)
    session = offloading.engine.Session.__new__(offloading.engine.Session)
    answers = iter([False, False, True])
    session.llm = SimpleNamespace(reset_prefix_cache=lambda: next(answers))
    session.forget_prompts()
    assert next(answers, None) is None
    monkeypatch.setattr(offloading.engine, "SETTLE_SECONDS", -1.0)
    session.llm = SimpleNamespace(reset_prefix_cache=lambda: False)
    session.used_blocks = lambda: 5
    with pytest.raises(offloading.engine.BadResult, match="still hold 5 blocks"):
        session.forget_prompts()


def test_all_engines_offload_and_differ_in_nothing_else_of_vllm(tmp_path):
    args = offloading.parse_args(["--gpu-budget", "0.1", "--drift", "real"])
    stock, ours = (offloading.spec_of(args, name, tmp_path) for name in ("stock", "retrieval"))
    assert stock["llm"] == ours["llm"]
    assert stock["llm"]["kv_offloading_size"] == 21
    assert stock["options"] is None and ours["options"]["gpu_budget"] == 0.1
