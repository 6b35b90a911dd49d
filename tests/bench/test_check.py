"""scripts/bench/check.py where there is no GPU: the interpreter, and sanitizers made of shell."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vllm_heterocache.kernels import page_scores, step_select, tuning

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "check.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_sanitizer(tmp_path, monkeypatch):
    """`make(body)` puts a compute-sanitizer of these shell commands first in PATH."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def make(body: str) -> None:
        program = tmp_path / "compute-sanitizer"
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return make


@pytest.mark.slow
def test_every_kernel_is_right_in_the_interpreter(tmp_path):
    """One check a kernel: tests/kernels tries every variant in the interpreter."""
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--first", "--seed", str(torch.seed() % 2**31)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()[1:]
    kernels = {line.split()[0].strip(",") for line in lines}
    assert kernels == {
        "split_decode", "paged_decode", "page_scores", "page_select", "page_gather", "drift_check",
        "retrieval_moves", "flip_pages", "page_summaries", "step_select", "one_bit_step_select",
        "hybrid_step_select", "page_means", "kept_launch", "quantized_keys", "exchange_pages",
        "evicted_attention", "bounded_least_squares",
    }  # fmt: skip
    assert all(line.endswith("equal") or " max error " in line for line in lines)


@pytest.fixture(scope="module", params=["90"])
def compiled(request, tmp_path_factory) -> list[tuple[str, str, int]]:
    """Kernel, variant and wide copies of all kernels, compiled for a compute capability."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--compile", request.param],
        env=environment, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    return [(name, " ".join(variant), int(copies)) for name, *variant, copies in lines]


@pytest.mark.slow
def test_every_kernel_compiles_to_machine_code_where_there_is_no_gpu(compiled):
    """The interpreter takes code that the compiler refuses."""
    assert {name for name, _, _ in compiled} == {
        "split_kernel", "decode_kernel", "merge_kernel", "page_lse_kernel", "share_kernel",
        "page_select_kernel", "page_means_kernel", "page_gather_kernel", "drift_check_kernel",
        "count_kernel", "choose_kernel", "flip_pages_kernel", "page_summaries_kernel",
        "keys_kernel", "one_bit_keys_kernel", "approximate_attention_kernel", "permute_kernel",
        "quantized_keys_kernel", "find_pages_kernel", "exchange_pages_kernel",
        "attention_kernel", "importance_kernel", "bounded_least_squares_kernel",
    }  # fmt: skip


def wide_copies(num_tiles: int, num_tokens: int, num_warps: int, num_stages: int) -> int:
    """Of a loop over tiles of bf16 [num_tokens, 128]: copies before it, and those within.

    Half of `num_stages - 1` is how many tiles are on their way while one is computed with. The
    other half is for the ids that the addresses come from.
    """
    copies_of_a_tile = num_tokens * 128 * 2 // (16 * 32 * num_warps)
    return num_tiles * copies_of_a_tile * ((num_stages - 1) // 2 + 1)


@pytest.mark.slow
def test_every_loop_over_pages_of_decode_attention_loads_16_bytes_a_thread_in_advance(compiled):
    """With scores there are two loops, of which one keeps no scores."""
    launch = tuning.PAGED_DECODE[128]
    one_loop = wide_copies(2, launch.tile_tokens, launch.num_warps, launch.num_stages)
    found = {variant: copies for name, variant, copies in compiled if name == "decode_kernel"}
    kinds = [
        f"{kind}, {{}}{means}"
        for kind in ("two launches", "fused merge")
        for means in ("", ", means", ", matched", ", matched, late heads")
    ]
    kinds += [f"{num_queries} queries, {{}}, means" for num_queries in (2, 5, 8)]
    expected = {
        kind.format(scores): num_loops * one_loop
        for kind in kinds
        for scores, num_loops in (("no scores", 1), ("scores", 2))
    }
    expected["two launches, scores, matched, sinks, cap"] = 2 * one_loop
    assert expected.items() <= found.items()
    # fp8: half of the bytes a token, and part of them is copied in parts of 8; group: other tiles
    others = {variant: copies for variant, copies in found.items() if variant not in expected}
    assert all(re.search("fp8|group 64", one) and n > 0 for one, n in others.items()), others


@pytest.mark.slow
def test_prompt_scores_and_step_selection_load_16_bytes_a_thread_in_advance(compiled):
    scores = page_scores.PageScoresLaunch()
    default_stages = 3  # Triton's own
    copies = {name: copies for name, variant, copies in compiled if not variant}
    assert copies["page_lse_kernel"] == wide_copies(
        1, scores.tile_tokens, scores.num_warps, scores.num_stages
    )
    assert copies["keys_kernel"] == wide_copies(
        2, step_select.TILE_PAGES, step_select.KEY_WARPS, default_stages
    )


def test_a_wrong_result_is_reported_and_the_others_still_run(script, monkeypatch, capsys):
    import kernel_checks

    def wrong() -> float:
        kernel_checks.assert_equal("a page", torch.zeros(2), torch.ones(2))
        return 0.0

    checks = [("bad", wrong), ("exact", lambda: 0.0), ("close", lambda: 0.25)]
    monkeypatch.setattr(kernel_checks, "all_checks", lambda: iter(checks))
    assert script.check(5) == script.WRONG_RESULT
    words = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "seed 5" in words[0]
    assert words[1:] == [
        "bad WRONG: a page is not the reference's", "exact equal", "close max error 2.5e-01",
    ]  # fmt: skip


def test_each_tool_gets_the_cases_and_its_summary_is_shown(script, make_sanitizer, capsys):
    make_sanitizer('echo "========= ERROR SUMMARY: 0 errors for $2"')
    assert script.sanitize(["memcheck", "racecheck"], 3) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, tool in zip(lines, ["memcheck", "racecheck"], strict=True):
        assert line.startswith(f"{tool}: ERROR SUMMARY: 0 errors for {tool} (")


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("echo '========= Invalid write'; exit 9", 9, "memcheck: errors found"),
        ("echo split_decode WRONG; exit 1", 1, "memcheck: exit code 1"),
        ("echo nothing was looked at", 1, "memcheck: exit code 0"),
        ("echo 'Error: Device not supported.'; exit 1", 3, "refuses this GPU"),
    ],
)
def test_what_a_tool_finds_decides_the_exit_code(body, code, words, script, make_sanitizer, capsys):
    make_sanitizer(body)
    assert script.sanitize(["memcheck"], 0) == code
    assert words in "".join(capsys.readouterr())


def test_the_cases_run_without_the_caching_allocator(script, make_sanitizer, capsys):
    make_sanitizer('echo "$@"; env | grep NO_CUDA_MEMORY; exit 9')
    script.sanitize(["initcheck"], 8)
    output = capsys.readouterr().out
    assert "--tool initcheck" in output and "check.py --seed 8" in output
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING=1" in output


def test_no_sanitizer_and_no_gpu_are_clear_errors(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(script, "find_sanitizer", lambda: None)
    assert script.sanitize(["memcheck"], 0) == script.UNUSABLE
    assert "install the CUDA toolkit" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.sanitize(["memcheck"], 0) == script.profile() == script.UNUSABLE
    assert "no CUDA GPU" in capsys.readouterr().err


def test_the_sanitizer_is_looked_for_in_cuda_folders(script, tmp_path, monkeypatch):
    folder = tmp_path / "compute-sanitizer"
    folder.mkdir()
    program = folder / "compute-sanitizer"
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert script.find_sanitizer() == str(program)
