"""What evicted pages leave behind: how many pages it takes, and what decode makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from world import PAGE, World, assert_outputs, attention_over, mixed_assignment, resident_pages

from vllm_heterocache.heads.evicted_means import RUN_PAGES, mean_pages
from vllm_heterocache.policies import make_policy

MEANS = {"evicted_means": True}
MIN_PAGES = 5


def means_of(budget: int, num_pages: int) -> int:
    return int(mean_pages(np.array([[budget]]), num_pages, MIN_PAGES, [31], 32)[0, 0])


@pytest.mark.parametrize("num_pages", [16, 31, 64, 255, 256, 257, 300, 1000, 8192, 131072])
def test_runs_are_short_lists_long_enough_and_pages_few(num_pages):
    for share in (0.03, 0.05, 0.1, 0.3, 0.7, 0.95, 1.0):
        budget = max(MIN_PAGES, int(share * num_pages))
        means = means_of(budget, num_pages)
        evicted = num_pages - budget + means
        assert budget - means >= MIN_PAGES or means == 0
        assert means == 0 or evicted >= PAGE * means  # no run is empty
        if evicted >= PAGE and budget >= MIN_PAGES + num_pages // 200 + 1:
            assert PAGE * means * RUN_PAGES >= evicted
            fewer = means - 1
            assert PAGE * fewer * RUN_PAGES < num_pages - budget + fewer


@pytest.mark.parametrize(
    ("budget", "num_pages", "expected"),
    [
        (250, 250, 0),  # nothing is evicted
        (240, 250, 0),  # fewer evicted pages than a page has tokens
        (13, 250, 1),
        (13, 268, 1),  # 268 - 12 = 256 evicted pages in 16 runs of 16
        (13, 269, 2),
        (5, 250, 0),  # the list may not become shorter
        (6, 5000, 1),  # runs of 312 or 313 pages
    ],
)
def test_examples(budget, num_pages, expected):
    assert means_of(budget, num_pages) == expected


@pytest.mark.parametrize(("model_layers", "without"), [(30, 8), (32, 8), (2, 1), (1, 1)])
def test_the_first_quarter_of_the_models_layers_has_none(model_layers, without):
    """Of the model's, also where a worker has the later layers only."""
    for first in {0, without - 1, without, model_layers - 1} - {model_layers}:
        layers = range(first, model_layers)
        budgets = np.full((len(layers), 2), 13)
        means = mean_pages(budgets, 250, MIN_PAGES, layers, model_layers)
        assert means.tolist() == [[int(layer >= without)] * 2 for layer in layers]


# --- on the made-up worker ---


def make_world(**settings) -> World:
    sizes = {"gpu_budget": 0.6, "num_blocks": 200}
    options = {**MEANS, **settings.pop("options", {})}
    return World(mixed_assignment(), options=options, **{**sizes, **settings})


def run_means(kv: torch.Tensor, resident: list[int], num_pages: int, num_runs: int):
    """Of one head: means [num_runs, 2 * D] of the runs of its evicted pages, and the tokens that
    each stands for; float64."""
    evicted = [page for page in range(num_pages) if page not in resident]
    means = []
    for run in range(num_runs):
        begin, end = (len(evicted) * i // num_runs for i in (run, run + 1))
        tokens = [page * PAGE + i for page in evicted[begin:end] for i in range(PAGE)]
        means.append(kv[tokens].double().mean(dim=0))
    tokens_of_mean = len(evicted) * PAGE / num_runs if num_runs else 1.0
    return torch.stack(means) if means else kv.new_zeros(0, kv.shape[1]).double(), tokens_of_mean


def attention_with_means(world: World, request_id: str, at_compaction) -> torch.Tensor:
    """[L, Hq, D]: each head over its resident pages, the tail, and the means of what it evicted
    when the prompt was compacted, whatever was fetched since."""
    books = world.books[request_id]
    slot = world.compacted(request_id).table_slot

    def means_of_head(layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        num_runs = PAGE * int(world.table.tensors.stand_in_pages[slot, layer, head])
        resident, num_pages = at_compaction[layer, head], books.prompt_tokens // PAGE
        means, weight = run_means(books.kv[layer, head], resident, num_pages, num_runs)
        return means, torch.full((num_runs,), weight).log()

    return attention_over(world, request_id, resident_pages(world, request_id), means_of_head)


@pytest.mark.parametrize("num_tokens", [800, 815])
def test_decode_weighs_each_mean_as_the_tokens_that_it_stands_for(num_tokens):
    world = make_world(seed=num_tokens)
    world.step(prefill={"a": num_tokens})
    at_compaction = resident_pages(world, "a")
    slot = world.compacted("a").table_slot
    means = world.table.tensors.stand_in_pages[slot]
    assert means.sum() > 0 and not means[0].any()  # layer 0 here is one of the model's first
    for _ in range(18):
        world.step(decode=["a"])
        assert_outputs(world, "a", attention_with_means(world, "a", at_compaction))
    assert world.counted("pages_fetched") > 0
    assert resident_pages(world, "a") != at_compaction


@pytest.mark.parametrize("policy", ["streaming", "snapkv", "h2o"])
def test_every_policy_that_evicts_may_leave_means(policy):
    world = make_world(options={"policy": policy, "drift_threshold": 0.0})
    world.step(prefill={"a": 800})
    at_compaction = resident_pages(world, "a")
    world.step(decode=["a"])
    assert world.table.tensors.stand_in_pages.any()
    assert_outputs(world, "a", attention_with_means(world, "a", at_compaction))


@pytest.mark.parametrize("stand_ins", [MEANS, {"matched_share": 0.5}], ids=["means", "matched"])
def test_stand_ins_are_taken_out_of_the_budget(stand_ins):
    """As many blocks, as many pages read and as many held as without them."""
    counted = []
    for options in (stand_ins, {}):
        world = make_world(options={"evicted_means": False, **options})
        world.step(prefill={"a": 800})
        world.step(decode=["a"])
        snapshot = world.runtime.snapshot()
        names = ("decode_pages_read", "decode_pages_dense")
        held = list(snapshot["requests"].values())
        counted.append((held, [snapshot[name] for name in names], len(world.free)))
    assert counted[0] == counted[1]


def test_means_come_and_go_with_their_requests():
    world = make_world(seed=3, num_blocks=300, max_num_seqs=3)
    world.step(prefill={"a": 800, "b": 640})
    residents = {r: resident_pages(world, r) for r in ("a", "b")}
    world.step(decode=["a", "b"])
    world.step(decode=["b"], gone=["a"], prefill={"c": 900})  # takes the slot that a had
    residents["c"] = resident_pages(world, "c")
    for _ in range(4):
        world.step(decode=["b", "c"])
        for request_id in ("b", "c"):
            expected = attention_with_means(world, request_id, residents[request_id])
            assert_outputs(world, request_id, expected)
    world.step(gone=["b", "c"])
    assert not world.table.tensors.stand_in_pages.any()
    assert len(world.free) == world.num_blocks


@pytest.mark.parametrize("policy", ["quest", "fier", "oracle"])
def test_policies_that_evict_nothing_refuse_the_option(policy):
    config = make_world().config
    config = type(config)(policy=policy, evicted_means=True)
    with pytest.raises(ValueError, match=f"evicted_means=True.*{policy}.*remove it"):
        make_policy(config)
