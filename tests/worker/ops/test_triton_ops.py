"""The CUDA engine's operations against the CPU engine's, on the same requests, step by step.

Two worlds of world.py get the same steps: in one the Triton kernels run, in Triton's
interpreter, in the other their references. FlashAttention and the cache write are left out; a
World does what they do by itself.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable

import pytest
import torch
import triton_mode
from later_swap import LaterSwap
from world import CPU, Books, World, assignment_of

from common.forced_triggers import force_triggers
from vllm_heterocache.heads import budget
from vllm_heterocache.heads.assignment import HeadAssignment
from vllm_heterocache.kernels import paged_decode
from vllm_heterocache.kernels.paged_decode import DecodeWorkspace
from vllm_heterocache.kernels.tables import Moves, PageTables
from vllm_heterocache.worker import retrieval
from vllm_heterocache.worker.host.swap import SynchronousSwap
from vllm_heterocache.worker.ops.interface import Geometry, Memory
from vllm_heterocache.worker.ops.torch_ops import TorchOps
from vllm_heterocache.worker.ops.triton_ops import TritonOps
from vllm_heterocache.worker.requests import CompactRequest

pytestmark = pytest.mark.skipif(triton_mode.ON_GPU, reason="a World lives on the CPU")

HEAD_DIM = 64
NUM_PROGRAMS = 5  # so that shares begin and end within segments
EXACT = [name for name in PageTables._fields if name not in ("page_lse", "scores")]


class KernelOps(TritonOps):
    """Notes the floating-point results on which later decisions rest."""

    def __init__(self, geometry: Geometry, memory: Memory, results: deque) -> None:
        g, self.results = geometry, results
        sizes = g.max_rows, g.num_layers, g.num_kv_heads, g.group, g.head_dim
        workspace = DecodeWorkspace.allocate(*sizes, CPU, NUM_PROGRAMS)
        super().__init__(geometry, memory, workspace)

    def decode(self, *args) -> None:
        super().decode(*args)
        lse = self.memory.tables.page_lse, self._workspace.head_lse
        self.results.append([tensor.clone() for tensor in lse])

    def score_prompt(self, *args) -> torch.Tensor:
        self.results.append(super().score_prompt(*args))
        return self.results[-1]

    def fill_means(self, table_slot, dense_blocks) -> None:
        super().fill_means(table_slot, dense_blocks)
        self.results.append(self.memory.pool[mean_ids(self.memory.tables, table_slot)])


class ReferenceOps(TorchOps):
    """Goes on with the kernels' results where its own are close, so that pages whose scores are
    almost equal are ranked alike and everything that is decided can be compared exactly."""

    def __init__(self, geometry: Geometry, memory: Memory, results: deque) -> None:
        super().__init__(geometry, memory)
        self.results = results

    def decode(self, *args) -> None:
        super().decode(*args)
        page_lse, head_lse = self.results.popleft()
        torch.testing.assert_close(
            page_lse, self.memory.tables.page_lse, rtol=1e-5, atol=triton_mode.BF16_LOG2_ERROR
        )
        torch.testing.assert_close(head_lse, self._head_lse, rtol=1e-5, atol=1e-5)
        self.memory.tables.page_lse.copy_(page_lse)
        self._head_lse.copy_(head_lse)

    def score_prompt(self, *args) -> torch.Tensor:
        scores = self.results.popleft()
        torch.testing.assert_close(scores, super().score_prompt(*args), rtol=1e-4, atol=1e-7)
        return scores

    def fill_means(self, table_slot, dense_blocks) -> None:
        super().fill_means(table_slot, dense_blocks)
        ids, means = mean_ids(self.memory.tables, table_slot), self.results.popleft()
        assert len(means)
        own = self.memory.pool[ids].float()
        # sums run in another order, so that an fp8 mean may be rounded to its neighbour
        near = torch.finfo(means.dtype).eps if self.memory.kv_scales else 1e-5
        torch.testing.assert_close(means.float(), own, rtol=near, atol=1e-6)
        self.memory.pool[ids] = means


def mean_ids(tables: PageTables, slot: int) -> torch.Tensor:
    """Mean pages of all heads of a slot."""
    starts = (tables.start[slot] + tables.count[slot]).flatten().tolist()
    numbers = tables.stand_in_pages[slot].flatten().tolist()
    spans = zip(starts, numbers, strict=True)
    return torch.cat([tables.entries[start : start + n] for start, n in spans]).long()


class PoisoningWorld(World):
    """Freed blocks hold what was there until the scheduler orders them to be poisoned."""

    def __post_init__(self) -> None:
        self.dying: list[int] = []
        super().__post_init__()
        begin_step = self.runtime.begin_step

        def begin_step_with_poison(*args) -> None:
            dying, self.dying = self.dying, []
            begin_step(*args, poison=dying)

        self.runtime.begin_step = begin_step_with_poison

    def _give_back(self, blocks: Iterable[int]) -> None:
        blocks = list(blocks)
        self.dying += blocks
        self.free += blocks


class Twins:
    """The same requests in both worlds, compared after every step."""

    def __init__(self, assignment: HeadAssignment, **settings) -> None:
        results: deque = deque()

        def world(ops: type) -> World:
            def make_ops(geometry: Geometry, memory: Memory):
                return ops(geometry, memory, results)

            return PoisoningWorld(assignment, make_ops=make_ops, head_dim=HEAD_DIM, **settings)

        self.kernels, self.references = world(KernelOps), world(ReferenceOps)
        self.worlds = (self.kernels, self.references)
        self.generator = torch.Generator().manual_seed(7)
        self.results = results

    def force_triggers(self, share: float | None) -> None:
        for world in self.worlds:
            force_triggers(world.runtime, share)

    @property
    def books(self) -> dict[str, Books]:
        return self.kernels.books

    def random_queries(self, scale: float) -> torch.Tensor:
        world = self.kernels
        shape = world.num_layers, world.num_kv_heads * world.group, HEAD_DIM
        return scale * torch.randn(shape, generator=self.generator)

    def step(self, prefill=None, decode: Iterable[str] = (), gone: Iterable[str] = (), **more):
        for world in self.worlds:
            world.step(prefill, list(decode), list(gone), **more)
        assert not self.results
        self.compare()

    def compare(self) -> None:
        kernels, references = self.worlds
        assert (kernels.done, kernels.refused) == (references.done, references.refused)
        for request_id, books in references.books.items():
            outputs = kernels.books[request_id].outputs
            torch.testing.assert_close(outputs, books.outputs, rtol=1e-4, atol=1e-5)
        of_kernels, of_references = (state_of(world) for world in self.worlds)
        for name, expected in of_references.items():
            assert_same(of_kernels[name], expected, name)
        scores = [world.table.tensors.scores for world in self.worlds]
        torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-30)
        assert kernels.runtime.snapshot() == references.runtime.snapshot()


def state_of(world: World) -> dict[str, object]:
    """All that must be equal in both worlds, bit by bit."""
    runtime, tables = world.runtime, world.table.tensors
    retrievals = runtime.retriever._retrievals
    return {
        **{name: getattr(tables, name) for name in EXACT},
        "pool": world.pool,
        "host pool": runtime.host_pool.pages,
        "last queries": runtime.ops.memory.last_queries,
        "counters": runtime.ops.memory.counters,
        "waves_left": runtime.retriever._waves_left,
        "moves": [sorted_moves(one.moves) for one in retrievals],
        "retrievals": [(list(r.rows.values()), r.table_slots.tolist()) for r in retrievals],
        "requests": [slot_and_mark(r) for r in runtime._requests.values()],
        "free blocks": world.free,
    }


def slot_and_mark(request: CompactRequest) -> tuple:
    return request.order, request.table_slot, request.offload_mark


def sorted_moves(moves: Moves) -> list[tuple[int, ...]]:
    """Moves in use; only their order is left to the kernel."""
    total = int(moves.total)
    return sorted(zip(*(field[:total].tolist() for field in moves[:-1]), strict=True))


def assert_same(found: object, expected: object, name: str) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, name
        if expected.itemsize == 1:  # torch compares no fp8 elements
            found, expected = found.view(torch.uint8), expected.view(torch.uint8)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=name)
    else:
        assert found == expected, name


# --- random traffic ---


def retrieval_like() -> HeadAssignment:
    """Few full heads, all of them pivots that lead; a layer that never scores."""
    first, second = (0, 1), (0, 2)
    return assignment_of(
        "SPP", "SSS", leaders={(0, 0): first, (1, 0): second, (1, 1): first, (1, 2): first}
    )


def paper_like() -> HeadAssignment:
    """All roles and unequal budgets."""
    return assignment_of(
        "PSV",
        "SAP",
        leaders={(0, 1): (0, 0), (1, 0): (1, 2)},
        weights={(0, 1): 0.5, (1, 0): 2.0},
    )


class Traffic:
    """Random requests through both worlds; counts what came to pass."""

    def __init__(self, twins: Twins, seed: int) -> None:
        self.twins, self.rng = twins, random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.num_requests = 0

    def step(self) -> None:
        twins, rng = self.twins, self.rng
        self._transfer()
        books = twins.books
        gone = [r for r in books if rng.random() < 0.12]
        staying = [r for r in books if r not in gone]
        chunk = {r: n for r in staying if (n := self._next_chunk(r))}
        prefill = self._new_prompt(len(staying), chunk)
        decode = [r for r in staying if r not in chunk]
        rng.shuffle(decode)
        decode = [r for r in decode if rng.random() < 0.9]
        queries = {r: self._queries(books[r]) for r in decode}
        self._note(decode, gone, chunk)
        compact = rng.random() < 0.75
        twins.step(prefill, decode, gone, chunk=chunk, queries=queries, compact=compact)

    def _next_chunk(self, request_id: str) -> int:
        books = self.twins.books[request_id]
        rest = max(0, books.prompt_tokens - books.num_computed)
        return rest and self.rng.choice([1, rest, rest, max(1, rest - 1)])

    def _new_prompt(self, num_running: int, chunk: dict[str, int]) -> dict[str, int]:
        if num_running == 4 or self.rng.random() > 0.6 or len(self.twins.kernels.free) < 40:
            return {}
        num_tokens = self.rng.randint(176, 270)
        name = f"request-{self.num_requests}"
        self.num_requests += 1
        chunk[name] = self.rng.choice([num_tokens, num_tokens, num_tokens - 1, 90])
        return {name: num_tokens}

    def _queries(self, books: Books) -> torch.Tensor:
        """Now and then the attention stays where it was."""
        if books.queries is not None and self.rng.random() < 0.4:
            return books.queries
        return self.twins.random_queries(self.rng.choice([1.0, 3.0]))

    def _transfer(self) -> None:
        """Let some transfers happen, the same ones in both worlds."""
        swaps = [world.swap for world in self.twins.worlds]
        if not isinstance(swaps[0], LaterSwap):
            return
        offloads = self.rng.choice([0, 2, None])
        arrived = [i for i in range(2) if self.rng.random() < 0.5]
        for swap in swaps:
            swap.let_offload(offloads)
            swap.let_fetch([swap.fetches[i] for i in arrived if i < len(swap.fetches)])

    def _note(self, decode: list[str], gone: list[str], chunk: dict[str, int]) -> None:
        runtime, books = self.twins.kernels.runtime, self.twins.books
        compact = [r for r in decode if runtime.request(r)]
        self.seen["several slots"] += len(compact) > 1
        self.seen["compact and dense rows"] += 0 < len(compact) < len(decode)
        self.seen["prefill beside decode"] += bool(chunk and compact)
        for request_id in books.keys() & chunk.keys():
            b, size = books[request_id], chunk[request_id]
            ends = b.num_computed + size == b.prompt_tokens
            self.seen["query kept by the decode"] += b.is_compacted and ends and size == 1
        for one in runtime.retriever._retrievals:
            fetching = {request.order.request_id for request in one.rows}
            self.seen["left during a fetch"] += not fetching.isdisjoint(gone)


EVENTS = (
    "compact and dense rows",
    "left during a fetch",
    "prefill beside decode",
    "query kept by the decode",
    "several slots",
)


@pytest.fixture
def small_launches(monkeypatch):
    """Each program costs milliseconds in the interpreter. Enough spare pages to fetch several."""
    monkeypatch.setattr(budget, "SPARE_SHARE", 0.25)
    monkeypatch.setattr(budget, "SPARE_PAGES_A_SATELLITE", 64)
    monkeypatch.setattr(retrieval, "MAX_MOVES", 160)
    monkeypatch.setattr(paged_decode, "MERGE_DIM", HEAD_DIM)


@pytest.mark.parametrize(
    ("assignment", "swap_class", "interval", "seed", "options"),
    [
        (paper_like, SynchronousSwap, 1, 0, {"drift_threshold": 0.5}),
        (retrieval_like, LaterSwap, 2, 0, {"sink_pages": 2, "recent_pages": 1}),
        (paper_like, LaterSwap, 3, 0, {"forced_share": 0.6, "sink_pages": 0}),
        (paper_like, SynchronousSwap, 1, 0, {"page_dtype": torch.float8_e4m3fn}),
    ],
    ids=["every step", "every other step", "forced", "fp8"],
)
def test_random_traffic_is_served_alike(
    small_launches, assignment, swap_class, interval, seed, options
):
    """The seeds are among those with which everything worth seeing happens."""
    options = {"drift_interval": interval, **options}
    forced_share = options.pop("forced_share", None)
    page_dtype = options.pop("page_dtype", torch.float32)
    sizes = {"gpu_budget": 0.8, "num_blocks": 110, "max_num_seqs": 4, "host_blocks": 48}
    sizes["page_dtype"] = page_dtype
    twins = Twins(assignment(), swap_class=swap_class, options=options, seed=seed, **sizes)
    twins.force_triggers(forced_share)
    traffic = Traffic(twins, seed)
    for _ in range(11):
        traffic.step()
    world = twins.kernels
    assert all(traffic.seen[event] for event in EVENTS), traffic.seen
    assert 0 < world.counted("drift_triggers") < world.counted("drift_checks")
    assert world.counted("pages_fetched") >= 6
    assert world.counted("fetches_late") or swap_class is SynchronousSwap
    twins.step(gone=list(twins.books))
    assert len(world.free) == world.num_blocks


@pytest.mark.parametrize("page_dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_means_of_evicted_pages_are_served_alike(small_launches, page_dtype):
    options = {"drift_interval": 2, "evicted_means": True}
    sizes = {"gpu_budget": 0.5, "num_blocks": 150, "max_num_seqs": 3, "host_blocks": 80}
    sizes["page_dtype"] = page_dtype
    twins = Twins(retrieval_like(), options=options, seed=5, layers_before=1, **sizes)
    twins.force_triggers(0.6)
    twins.step({"a": 560}, chunk={"a": 300})
    twins.step({"b": 601}, chunk={"a": 260})
    for _ in range(4):
        queries = {r: twins.random_queries(2.0) for r in ("a", "b")}
        twins.step(decode=["a", "b"], queries=queries)
    assert twins.kernels.counted("pages_fetched") > 0
    twins.step(gone=["a"], decode=["b"], queries={"b": twins.random_queries(2.0)})
    twins.step(gone=["b"])
    assert len(twins.kernels.free) == twins.kernels.num_blocks
