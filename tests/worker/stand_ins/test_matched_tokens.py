"""Matched tokens in the worker: pages, the queries they are fitted to, and decode over them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from rotation import ANGLES, ROTATION, turned
from world import PAGE, World, assert_outputs, attention_over, mixed_assignment, resident_pages

from vllm_heterocache.compat.engine import Rotation
from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.heads.matched_tokens import matched_pages, means_among, most_pages
from vllm_heterocache.kernels.kv_scales import FP8_DTYPES
from vllm_heterocache.kernels.matched_tokens import find_candidates, match_candidates
from vllm_heterocache.kernels.run_means import beside_means, run_means
from vllm_heterocache.policies import make_policy
from vllm_heterocache.worker.observe import reference_queries
from vllm_heterocache.worker.observe.moved_queries import rotate

MATCHED = {"matched_share": 0.5}
PROTECTED = 4
HAS_MEANS = [False, True, True]  # layers of the world


def make_world(**settings) -> World:
    sizes = {"gpu_budget": 0.6, "num_blocks": 200, "rotation": ROTATION}
    options = {**MATCHED, **settings.pop("options", {})}
    return World(mixed_assignment(), options=options, **{**sizes, **settings})


def tables_of(world: World, request_id: str):
    return world.table.tensors, world.compacted(request_id).table_slot


def matched_of(world: World, request_id: str, layer: int, head: int):
    """(K and V [m, 2 * D], bias [m], natural), as the pages and tables of a head have them."""
    tensors, slot = tables_of(world, request_id)
    num_pages = int(tensors.stand_in_pages[slot, layer, head])
    first = int(tensors.start[slot, layer, head] + tensors.count[slot, layer, head])
    ids = tensors.entries[first : first + num_pages].long()
    place = int(tensors.bias_start[slot, layer, head])
    bias = tensors.token_bias[place : place + num_pages].flatten() * np.log(2)
    kv = world.pages[ids].float().flatten(0, 1)
    if world.kv_scales is not None:
        scales = [one[layer, head].expand(world.head_dim) for one in world.kv_scales[:2]]
        kv = kv * torch.cat(scales)
    return kv, bias


def attention_with_matched(world: World, request_id: str) -> torch.Tensor:
    """[L, Hq, D] float64: each head over its resident pages, its matched tokens and the tail."""
    return attention_over(
        world,
        request_id,
        resident_pages(world, request_id),
        lambda layer, head: matched_of(world, request_id, layer, head),
    )


def check_match(world: World, request_id: str, positions: dict[int, int]) -> None:
    """The matched tokens of some heads do what those of one fit of the whole prompt do.

    Args:
        positions: tokens whose queries they are fitted to, and how many tokens behind the prompt
            these are asked; a query stays as it is where the world knows no rotation.
    """
    for layer, head in ((0, 1), (2, 0), (2, 2)):
        kv, bias = matched_of(world, request_id, layer, head)
        expected, queries = expected_match(world, request_id, layer, head, positions)
        assert len(kv) > 0 and kv.isfinite().all() and bias.isfinite().all()
        # keys that the queries do not tell apart may be others
        is_same = (kv[:, : world.head_dim] == expected[0]).all(dim=1).float()
        assert is_same.mean() > 0.95
        actual = of_matched(queries, kv, bias)
        whole = of_matched(queries, torch.cat(expected[:2], dim=-1), expected[2])
        error = (actual - whole).norm() / whole.norm()
        assert error < 5e-3, error


def last_tokens(num_tokens: int, behind: int, count: int | None = None) -> dict[int, int]:
    """The first `count` of a prompt's last `behind` tokens, and where their queries are asked."""
    golden = (math.sqrt(5) - 1) / 2
    return {
        num_tokens - behind + i: math.floor(i * golden % 1 * 64) for i in range(count or behind)
    }


def of_matched(queries: torch.Tensor, kv: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """[N, 1 + D] float64: what matched tokens add to the sum of weights, and to that of values."""
    keys, values = kv.double().chunk(2, dim=-1)
    weights = (queries.double() @ keys.T + bias.double()).exp()
    return torch.cat((weights.sum(1, keepdim=True), weights @ values), dim=1)


def expected_match(world: World, request_id: str, layer: int, head: int, positions: dict[int, int]):
    """Means and then the fit beside them, and the queries [N, D] that it is made to."""
    books, resident = world.books[request_id], resident_pages(world, request_id)
    num_tokens, num_heads = books.prompt_tokens // PAGE * PAGE, world.num_kv_heads
    keys, values = books.kv[layer, :, :num_tokens].chunk(2, dim=-1)
    is_evicted = torch.ones(num_heads, num_tokens // PAGE, dtype=torch.bool)
    for h in range(num_heads):
        is_evicted[h, resident[layer, h]] = False
    queries = books.prompt_queries[list(positions), layer]  # [n, Hq, D]
    if world.rotation is not None:
        moved = [
            turned(query, books.prompt_tokens + behind - position)
            for query, (position, behind) in zip(queries, positions.items(), strict=True)
        ]
        queries = torch.stack(moved)
    queries = queries.unflatten(1, (num_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2) * world.scale
    tensors, slot = tables_of(world, request_id)
    has_means = np.array(HAS_MEANS) & (world.config.evicted_means is not False)
    means = means_among(tensors.stand_in_pages[slot].numpy(), has_means)
    counts = tensors.stand_in_pages[slot] * PAGE - torch.from_numpy(means)  # [L, H], matched tokens
    assert means[1:].any() == has_means.any()
    some = counts[layer].nonzero().flatten()
    index, num_means = some.tolist().index(head), torch.from_numpy(means[layer])[some]
    pages = books.kv[layer, :, :num_tokens].unflatten(1, (-1, PAGE))[some]
    of_runs = run_means(pages, is_evicted[some], num_means, max(int(num_means.max()), 1))
    gone = is_evicted.repeat_interleave(PAGE, dim=1)
    most = int(counts.max())  # all heads are fitted at a time
    found = find_candidates(*(one[some] for one in (keys, values, gone, queries)), most)
    found = beside_means(found, queries[some], of_runs)
    fit = match_candidates(found, queries[some], most, counts[layer, some])
    parts = [
        [one[index, :count] for one in stand_ins]
        for stand_ins, count in ((of_runs, num_means[index]), (fit, counts[layer, head]))
    ]
    return [torch.cat(one) for one in zip(*parts, strict=True)], queries[head]


@pytest.mark.parametrize(
    ("budget", "expected"), [(4, 0), (5, 1), (6, 1), (7, 2), (24, 10), (250, 0)]
)
def test_half_of_the_unprotected_pages_are_matched(budget, expected):
    """Of 250: a whole head has none, and a list keeps its protected pages."""
    assert matched_pages(np.array([[budget]]), 250, PROTECTED, 0.5, 256).tolist() == [[expected]]


def test_a_fifth_of_the_matched_tokens_are_means_where_the_layer_has_any():
    pages = np.array([[0, 1, 2, 10], [0, 1, 2, 10]])
    assert means_among(pages, np.array([False, True])).tolist() == [[0] * 4, [0, 4, 7, 32]]


@pytest.mark.parametrize(
    ("group", "budget", "most"), [(1, 0.1, 2), (3, 0.05, 6), (4, 0.1, 8), (4, 0.11, 256)]
)
def test_a_small_budget_has_four_reference_queries_for_each_matched_token(group, budget, most):
    assert most_pages(group, budget) == most


def test_a_head_has_only_so_many_matched_pages():
    budgets = np.array([[500, 516, 518, 7000]])
    assert matched_pages(budgets, 8000, PROTECTED, 0.5, 256).tolist() == [[248, 256, 256, 256]]


@pytest.mark.parametrize("protected", [0, 1, 4])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9, 0.999])
def test_lists_keep_protected_pages_and_matched_pages_are_the_share_at_most(share, protected):
    budgets = np.arange(1, 400)[None]
    matched = matched_pages(budgets, 400, protected, share, 150)
    assert (budgets - matched >= np.minimum(budgets, max(protected, 1))).all()
    assert (matched <= share * budgets).all() and (matched >= 0).all() and matched.any()
    wanted = np.minimum(share * (budgets - protected), 150)
    assert (np.abs(matched - wanted)[budgets > 10] < 1 + share).all()


@pytest.mark.parametrize("num_tokens", [800, 815])
@pytest.mark.parametrize("page_dtype", [torch.float32, *FP8_DTYPES], ids=str)
def test_decode_adds_the_bias_of_each_matched_token(num_tokens, page_dtype):
    world = make_world(seed=num_tokens, page_dtype=page_dtype)
    world.step(prefill={"a": num_tokens})
    at_compaction = resident_pages(world, "a")
    for _ in range(6):
        world.step(decode=["a"])
        assert_outputs(world, "a", attention_with_matched(world, "a"))
    assert world.counted("pages_fetched") > 0
    assert resident_pages(world, "a") != at_compaction


@pytest.mark.parametrize("chunks", [[800], [17, 400, 383], [797, 1, 1, 1]], ids=str)
def test_matched_tokens_are_the_fit_to_the_last_queries(chunks):
    """Also where the prompt comes in chunks, the last of them as decode rows."""
    world = make_world(seed=len(chunks), options={"drift_threshold": 0.0})
    world.step(prefill={"a": 800}, chunk={"a": chunks[0]})
    for chunk in chunks[1:]:
        world.step(chunk={"a": chunk})
    count = 128 if chunks[-1] > 1 else 125
    check_match(world, "a", last_tokens(800, 128, count))


def test_without_means_all_of_these_tokens_are_matched():
    world = make_world(seed=3, options={"drift_threshold": 0.0, "evicted_means": False})
    world.step(prefill={"a": 800})
    check_match(world, "a", last_tokens(800, 128))


SHORT = "requests_short_of_reference_queries"


@pytest.fixture
def little_room(monkeypatch):
    """For the reference queries of 200 tokens."""
    monkeypatch.setattr(reference_queries, "reference_positions", lambda geometry: 200)


@pytest.mark.usefixtures("little_room")
def test_prompts_share_the_room_for_queries_and_those_with_too_little_are_counted(logged):
    """The second one gets what the first one leaves, and the third one its last query alone."""
    world = make_world(options={"drift_threshold": 0.0}, num_blocks=400)
    world.step(prefill={"a": 640, "b": 720, "c": 800})
    check_match(world, "a", last_tokens(640, 128))
    check_match(world, "b", last_tokens(720, 72))
    check_match(world, "c", {799: 0})
    assert world.counted(SHORT) == 2 and world.counted("requests_compacted") == 3
    (line,) = logged()
    assert "request b does without 56 of the reference queries that matched_share" in line
    assert "--max-num-batched-tokens or --max-num-seqs" in line and f"heterocache_{SHORT}" in line
    world.step(gone=["a", "b", "c"], prefill={"d": 800})
    check_match(world, "d", last_tokens(800, 128))
    assert world.counted(SHORT) == 2 and len(logged()) == 1


@pytest.mark.usefixtures("little_room")
def test_a_prompt_without_room_whose_last_token_is_a_decode_row_is_fitted_to_that_query():
    world = make_world(options={"drift_threshold": 0.0}, num_blocks=400)
    world.step(prefill={"a": 640, "b": 640, "c": 800}, chunk={"a": 639, "b": 639, "c": 799})
    world.step(chunk={"c": 1})
    check_match(world, "c", {799: 0})
    assert world.counted(SHORT) == 1


@pytest.mark.usefixtures("little_room")
def test_prompts_that_leave_or_stay_dense_are_not_counted_and_their_room_is_free(logged):
    """Prompt b has no query window; prompt c is preempted before its end, and comes back."""
    world = make_world(options={"drift_threshold": 0.0}, num_blocks=400, num_query_windows=1)
    world.step(prefill={"a": 640, "b": 640, "c": 800}, chunk={"c": 750})
    assert (world.done, world.refused) == (["a"], ["b"])
    world.step(gone=["c"], prefill={"c": 800})
    check_match(world, "c", last_tokens(800, 128))
    assert world.counted(SHORT) == 0
    assert not [line for line in logged() if "reference queries" in line]


@pytest.mark.usefixtures("little_room")
def test_a_prompt_takes_room_that_is_free_when_its_next_chunk_comes():
    world = make_world(options={"drift_threshold": 0.0}, num_blocks=400)
    world.step(prefill={"a": 640, "b": 640, "c": 800}, chunk={"c": 690})
    world.step(chunk={"c": 110})
    check_match(world, "b", last_tokens(640, 72))
    check_match(world, "c", last_tokens(800, 110))
    assert world.counted(SHORT) == 2, "18 queries of c were gone by then"


def test_a_row_of_the_decode_kernel_among_the_last_tokens_leaves_no_hole_in_the_queries():
    world = make_world(options={"drift_threshold": 0.0})
    world.step(prefill={"a": 800}, chunk={"a": 690})
    world.step(chunk={"a": 1})
    world.step(chunk={"a": 109})
    check_match(world, "a", last_tokens(800, 109))
    assert world.counted(SHORT) == 0


def test_queries_that_cannot_be_moved_are_those_of_the_last_tokens():
    world = make_world(rotation=None, options={"drift_threshold": 0.0})
    world.step(prefill={"a": 800}, chunk={"a": 770})
    world.step(chunk={"a": 30})
    check_match(world, "a", {736 + i: 0 for i in range(64)})


@pytest.mark.parametrize("is_neox", [True, False])
def test_a_query_is_moved_by_the_rotation_of_its_layer(is_neox):
    """Against vLLM's own RoPE: a query at p, moved by n, is the query at p + n."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    cache = torch.cat((ANGLES.cos(), ANGLES.sin()), dim=1)
    query, positions = torch.randn(5, 2, 8), torch.tensor([0, 3, 100, 640, 700])

    def at(positions):
        shape = query.flatten(1)
        return RotaryEmbedding.forward_static(positions, shape, None, 8, 6, cache, is_neox)[0]

    distances = torch.tensor([7, 0, 1, 300, 1200])
    rotation = Rotation(2 * cache, 6, is_neox)
    moved = rotate(rotation, 2 * at(positions).view(5, 2, 8), distances)
    torch.testing.assert_close(
        moved.flatten(1), 2 * at(positions + distances), rtol=1e-4, atol=1e-4
    )


def test_a_prompt_from_the_prefix_cache_is_matched_by_the_queries_that_are_computed():
    world = make_world(options={"drift_threshold": 0.0})
    world.step(prefill={"a": 800}, compact=False)
    world.step(prefill={"b": 800}, chunk={"b": 16})
    books = world.books["b"]
    books.kv[:, :, 16:] = world.books["a"].kv[:, :, 16:]
    world._write_kv(books, 784)  # as if it had been there
    world.runtime.observer.forget("b")  # so that its first row is the one that follows
    world.runtime.observer.start("b", 800)
    world.step(chunk={"b": 16})
    check_match(world, "b", last_tokens(800, 16))
    assert world.counted(SHORT) == 0


def test_where_only_the_last_query_is_computed_it_is_what_tokens_are_matched_to():
    world = make_world(options={"drift_threshold": 0.0})
    world.step(prefill={"a": 800}, chunk={"a": 799}, compact=True)
    world.runtime.observer.forget("a")
    world.runtime.observer.start("a", 800)
    world.step(chunk={"a": 1})
    check_match(world, "a", {799: 0})


def test_matched_tokens_come_and_go_with_their_requests():
    """Gaps of the tables are closed meanwhile, so that biases move."""
    world = make_world(seed=3, num_blocks=300, max_num_seqs=3)
    world.step(prefill={"a": 800, "b": 640})
    world.step(decode=["a", "b"])
    world.step(decode=["b"], gone=["a"], prefill={"c": 900})
    for _ in range(4):
        world.step(decode=["b", "c"])
        for request_id in ("b", "c"):
            assert_outputs(world, request_id, attention_with_matched(world, request_id))
    world.step(gone=["b", "c"])
    assert not world.table.tensors.stand_in_pages.any()
    assert len(world.free) == world.num_blocks
    assert not world.runtime.observer._references._prompts


@pytest.mark.parametrize("policy", ["streaming", "snapkv", "h2o"])
def test_every_policy_that_evicts_may_leave_matched_tokens(policy):
    world = make_world(options={"policy": policy, "drift_threshold": 0.0})
    world.step(prefill={"a": 800})
    world.step(decode=["a"])
    assert world.table.tensors.stand_in_pages.any()
    assert_outputs(world, "a", attention_with_matched(world, "a"))


@pytest.mark.parametrize("policy", ["quest", "fier", "oracle"])
def test_policies_that_evict_nothing_refuse_the_option(policy):
    config = HeteroCacheConfig(policy=policy, matched_share=0.5)
    with pytest.raises(ValueError, match=f"matched_share=0.5.*{policy}.*remove it"):
        make_policy(config)


def test_means_and_matched_tokens_together_are_refused():
    config = HeteroCacheConfig(evicted_means=True, matched_share=0.5)
    with pytest.raises(ValueError, match=r"evicted_means=True.*matched tokens.*remove it"):
        make_policy(config)
