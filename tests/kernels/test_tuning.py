"""The launch settings against the rows from which they were chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_heterocache.kernels.tuning import (
    FP8_PAGED_DECODE,
    FP8_VECTORS,
    PAGED_DECODE,
    paged_decode_launch,
)

ROWS = Path(__file__).resolve().parents[2] / "docs" / "results" / "kernels_h200.jsonl"
KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128
NOISE = 1.01  # times that differ by less are equal


def timed_both_ways() -> list[dict]:
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    return [row for row in rows if "other_merge" in row]


def test_the_merge_is_fused_only_where_it_was_faster():
    rows = timed_both_ways()
    chosen = []
    for row in rows:
        num_rows, is_fp8 = int(row["cell"].split("x")[0]), row["config"].get("fp8", False)
        num_segments = num_rows * KV_HEADS
        fused_merge = paged_decode_launch(HEAD_DIM, num_segments, GROUP, is_fp8=is_fp8).fused_merge
        ways = {row["config"]["fused_merge"]: row}
        ways[row["other_merge"]["fused_merge"]] = row["other_merge"]
        # pages of rows that are dense have no scores
        for time in ("median_us", *["scored_us"] * ("dense" not in row["cell"])):
            assert ways[fused_merge][time] <= NOISE * ways[not fused_merge][time], row["cell"]
        chosen.append(fused_merge)
    assert set(chosen) == {True, False}


@pytest.mark.parametrize("head_dim", PAGED_DECODE)
def test_the_rule_changes_nothing_else(head_dim):
    for num_segments in (1, 8, 255, 256, 4096):
        launch = paged_decode_launch(head_dim, num_segments, GROUP)
        assert launch.fused_merge == (num_segments >= 256)
        assert launch._replace(fused_merge=False) == PAGED_DECODE[head_dim]


@pytest.mark.parametrize(("group", "max_queries"), [(1, 1), (16, 1), (17, 1), (4, 4), (4, 5)])
@pytest.mark.parametrize("head_dim", PAGED_DECODE)
def test_fp8_pages_have_a_launch_of_their_own_where_it_was_timed(head_dim, group, max_queries):
    launch = paged_decode_launch(head_dim, 8, group, max_queries, is_fp8=True)
    of_16_bits = paged_decode_launch(head_dim, 8, group, max_queries)
    is_timed = head_dim in FP8_PAGED_DECODE and group * max_queries <= FP8_VECTORS
    assert (launch != of_16_bits) == is_timed


@pytest.mark.parametrize("head_dim", PAGED_DECODE)
@pytest.mark.parametrize("group", [1, 16, 17, 32, 33, 64])
def test_wide_groups_get_the_warps_that_hold_their_outputs(group, head_dim):
    """A thread holds at most 128 sums, or 64 where heads are large, and 64 numbers of a partial."""
    vectors = next(n for n in (8, 16, 32, 64) if n >= group)
    launch = paged_decode_launch(head_dim, 4096, group)
    most = 64 if head_dim == 256 else 128
    assert vectors * head_dim <= most * 32 * launch.num_warps
    assert not launch.fused_merge or vectors * head_dim <= 64 * 32 * launch.num_warps
    assert launch.tile_tokens == PAGED_DECODE[head_dim].tile_tokens
