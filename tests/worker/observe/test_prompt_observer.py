"""Windows of last queries and sums over all queries, under the traffic of world.py."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from world import PAGE, World

from vllm_heterocache.policies.policy import anchors
from vllm_heterocache.worker.fallbacks import CAPTURE_LIMIT
from vllm_heterocache.worker.observe.observed_prompt import Observation
from vllm_heterocache.worker.requests import FinishedPrefill

WINDOW = 37  # spans three pages, and ends within one
SNAPKV = {"policy": "snapkv", "policy_options": {"window": WINDOW}}
H2O = {"policy": "h2o"}


class Watched(World):
    """Notes what each compaction saw; a page that nobody has written holds NaN."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.windows: dict[str, torch.Tensor] = {}  # [W, L, Hq, D]
        self.masses: dict[str, torch.Tensor] = {}  # [L, H, P]
        compact = self.runtime.compact

        def watched(finished: FinishedPrefill) -> None:
            queries, order = self.runtime.ops.memory.last_queries, finished.order
            end = finished.query_place + 1
            first = end - min(self.window, order.num_tokens)
            self.windows[order.request_id] = queries[first:end].clone()
            if finished.masses is not None:
                self.masses[order.request_id] = finished.masses.clone()
            compact(finished)

        self.runtime.compact = watched

    @property
    def window(self) -> int:
        return self.runtime.rank.geometry.window

    def assert_window(self, request_id: str) -> None:
        expected = self.books[request_id].prompt_queries[-self.window :]
        assert torch.equal(self.windows[request_id], expected), request_id

    def assert_masses(self, request_id: str) -> None:
        """Against one softmax over the whole prompt, float64."""
        books = self.books[request_id]
        keys = books.kv[:, :, : books.prompt_tokens, : self.head_dim].double()
        keys = keys.repeat_interleave(self.group, dim=1)  # [L, Hq, T, D]
        logits = books.prompt_queries.double().permute(1, 2, 0, 3) @ keys.transpose(2, 3)
        future = torch.ones(books.prompt_tokens, books.prompt_tokens).triu(1).bool()
        mass = (logits * self.scale).masked_fill(future, -torch.inf).softmax(-1).sum(2)
        full = books.prompt_tokens // PAGE * PAGE
        expected = mass[..., :full].unflatten(-1, (-1, PAGE)).sum(-1)
        expected = expected.unflatten(1, (-1, self.group)).sum(2).float()
        torch.testing.assert_close(self.masses[request_id], expected, rtol=1e-4, atol=1e-4)


def watched(options=SNAPKV, **kwargs) -> Watched:
    return Watched(anchors((2, 2)), options=options, **kwargs)


# boundaries before, at, within and behind the beginning of the window (token 163)
@pytest.mark.parametrize(
    "chunks",
    [
        (200,),
        (163, 37),
        (162, 38),
        (164, 36),
        (150, 20, 10, 20),
        (199, 1),
        (160, *[1] * 40),
        (159, 4, 5, 3, 20, 5, 1, 3),
    ],
    ids=lambda chunks: "-".join(map(str, chunks[:5])),
)
@pytest.mark.parametrize("max_queries", [1, 5])
def test_a_window_is_whole_wherever_the_chunks_end(chunks, max_queries):
    world = watched(max_queries=max_queries)
    world.step(prefill={"other": 120})
    world.step(prefill={"a": 200}, chunk={"a": chunks[0]}, decode=["other"])
    for size in chunks[1:]:
        world.step(chunk={"a": size}, decode=["other"])
    assert world.done == ["other", "a"]
    world.assert_window("a")
    world.assert_window("other")
    assert world.num_free_windows == world.num_query_windows


def test_a_prompt_shorter_than_the_window_is_observed_as_a_whole():
    options = {"policy": "snapkv", "policy_options": {"window": 300}}
    world = watched(options, num_query_windows=2)
    world.step(prefill={"a": 200, "b": 131}, chunk={"a": 50})
    world.step(chunk={"a": 150})
    for request_id in "ab":
        world.assert_window(request_id)
        assert len(world.windows[request_id]) == world.books[request_id].prompt_tokens


def test_several_prompts_in_one_step_do_not_mix_their_windows():
    world = watched(num_blocks=200)
    sizes = {"a": 190, "b": 140, "c": 165, "d": 150}
    world.step(prefill=sizes, chunk={"a": 160, "b": 139, "c": 1, "d": 60})
    world.step(chunk={"a": 29, "b": 1, "c": 135})
    world.step(chunk={"a": 1, "c": 29, "d": 90})
    for request_id in sizes:
        world.assert_window(request_id)
    assert sorted(world.done) == list("abcd")


def test_prefixes_from_the_cache_do_not_shorten_a_window_that_is_computed():
    """vLLM leaves the last W tokens to be computed; the first chunk begins there."""
    world = watched()
    world.step(prefill={"a": 200}, chunk={"a": 1})
    world._write_kv(world.books["a"], 160)
    world.step(chunk={"a": 40})
    world.assert_window("a")


def test_a_prompt_that_finds_no_window_stays_dense_and_is_counted():
    world = watched(num_query_windows=2, num_blocks=200)
    sizes = {"a": 200, "b": 200, "c": 200}
    world.step(prefill=sizes, chunk=dict.fromkeys(sizes, 170))
    world.step(chunk={"c": 30})
    assert (world.done, world.refused) == ([], ["c"])
    world.step(chunk={"a": 30, "b": 30}, decode=["c"])
    assert world.done == ["a", "b"] and world.num_free_windows == 2
    rows = world.runtime.counters.decode_rows
    assert rows == {("dense", CAPTURE_LIMIT): 1}
    world.assert_window("a")
    world.assert_window("b")


def test_a_window_that_becomes_free_too_late_is_not_half_filled():
    world = watched(num_query_windows=1, num_blocks=200)
    world.step(prefill={"a": 200, "b": 200}, chunk={"a": 180, "b": 170})
    world.step(chunk={"a": 20})
    world.step(chunk={"b": 30})
    assert (world.done, world.refused) == (["a"], ["b"])


@pytest.mark.parametrize("restart", [False, True])
def test_a_prompt_that_leaves_gives_its_window_back(restart):
    world = watched(num_query_windows=1)
    world.step(prefill={"a": 200}, chunk={"a": 180})
    assert world.num_free_windows == 0
    if restart:
        world.step(gone=["a"], prefill={"a": 230}, chunk={"a": 200})
        world.step(chunk={"a": 30})
    else:
        world.step(gone=["a"])
        assert world.num_free_windows == 1
        world.step(prefill={"a": 210})
    world.assert_window("a")
    assert world.num_free_windows == 1 and world.done == ["a"]


@pytest.mark.parametrize("num_tokens", [192, 193, 207])
def test_masses_of_a_window_are_those_of_its_queries(num_tokens):
    world = watched()
    seen = []
    scores = type(world.runtime.rank.plan.policy).scores

    class Policy(type(world.runtime.rank.plan.policy)):
        def scores(self, prompt: Observation) -> torch.Tensor:
            seen.append([prompt.window_mass(layer) for layer in range(2)])
            assert prompt.kept_pages == -(-7 * (num_tokens // PAGE) // 10)
            return scores(self, prompt)

    compactor = world.runtime.compactor
    world.runtime.compactor = replace(compactor, policy=Policy(window=WINDOW))
    world.step(prefill={"a": num_tokens}, chunk={"a": 170})
    world.step(chunk={"a": num_tokens - 170})
    books = world.books["a"]
    for layer in range(2):
        mass = seen[0][layer]
        assert mass.shape == (2, 2, WINDOW, num_tokens // PAGE)
        for i in (0, 11, WINDOW - 1):
            last = num_tokens - WINDOW + i
            query = books.prompt_queries[last, layer].double().view(2, 2, -1)
            keys = books.kv[layer, :, : last + 1, :8].double()
            weights = (query @ keys.transpose(1, 2) * world.scale).softmax(-1)
            padded = torch.zeros(2, 2, num_tokens + PAGE, dtype=torch.float64)
            padded[..., : last + 1] = weights
            full = padded[..., : num_tokens // PAGE * PAGE].unflatten(-1, (-1, PAGE)).sum(-1)
            torch.testing.assert_close(mass[:, :, i].double(), full, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "chunks",
    [(183,), (100, 83), (182, 1), (1, 90, 1, 1, 89, 1), (5, 2, 90, 4, 1, 79, 2)],
    ids=lambda c: str(len(c)),
)
@pytest.mark.parametrize("max_queries", [1, 5])
def test_all_queries_are_summed_up_whatever_the_chunks(chunks, max_queries):
    """The shortest chunks are decode rows, whose queries the decode kernel stores."""
    world = watched(H2O, num_query_windows=3, max_queries=max_queries)
    world.step(prefill={"other": 120})
    world.step(prefill={"a": 183}, chunk={"a": chunks[0]}, decode=["other"])
    for size in chunks[1:]:
        world.step(chunk={"a": size}, decode=["other"])
    assert world.done == ["other", "a"]
    world.assert_masses("a")
    world.assert_masses("other")
    assert world.num_free_windows == 3


@pytest.mark.parametrize("options", [SNAPKV, H2O], ids=["windows", "sums"])
def test_random_traffic_is_observed_rightly_and_gives_every_window_back(options):
    rng = random.Random(3)
    world = watched(options, num_query_windows=3, num_blocks=120, max_num_seqs=5)
    names = iter(range(10**6))
    for _ in range(70):
        leaving = [r for r in world.books if rng.random() < 0.12]
        staying = [r for r in world.books if r not in leaving]
        chunk = {}
        for request_id in staying:
            books = world.books[request_id]
            if (rest := books.prompt_tokens - books.num_computed) > 0:
                chunk[request_id] = rng.choice([1, rest, rng.randint(1, rest)])
        prefill = {}
        if len(staying) < 5 and rng.random() < 0.7 and len(world.free) > 60:
            new, num_tokens = f"request-{next(names)}", rng.randint(100, 200)
            prefill[new] = num_tokens
            chunk[new] = rng.randint(1, num_tokens)
        decode = [r for r in staying if r not in chunk]
        before = len(world.done)
        world.step(prefill, decode, leaving, chunk, compact=rng.random() < 0.9)
        for request_id in world.done[before:]:
            if options is SNAPKV:
                world.assert_window(request_id)
            else:
                world.assert_masses(request_id)
    assert len(world.done) > 10
    world.step(gone=list(world.books))
    assert world.num_free_windows == 3
