"""A worker without vLLM: the runtime, a small pool, a scheduler's books and a made-up model.

Every K and V is random and remembered, every page that nobody owns holds NaN, and `World.step`
ends with a check of all books and of the contents of every page that a table names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch

from vllm_heterocache import runtime as runtime_module
from vllm_heterocache.budget import compact_blocks
from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.cpu_pool import CpuPool
from vllm_heterocache.head_profile import HeadAssignment, HeadRole
from vllm_heterocache.kernels.paged_decode_ref import PageLists, paged_decode_ref
from vllm_heterocache.request_state import CompactionOrder, CompactRequest
from vllm_heterocache.runtime import HeteroCacheRuntime, LayerGroup, Row
from vllm_heterocache.swap import SynchronousSwap, Transfer

PAGE = 16
NOBODYS_BLOCK = 10**6  # indexing with it fails
ROLES = {role.name[0]: role for role in HeadRole}


@contextmanager
def one_thread() -> Iterator[None]:
    """For tiny tensors: on a busy machine, threads wait for one another ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assignment_of(
    *rows: str,
    leaders: Mapping[tuple[int, int], tuple[int, int]] | None = None,
    weights: Mapping[tuple[int, int], float] | None = None,
) -> HeadAssignment:
    """Roles by their first letter, a row for each layer; weights are 1 where not given."""
    roles = np.array([[ROLES[letter] for letter in row] for row in rows], np.int8)
    leader_of = np.full(roles.shape, -1, np.int32)
    for satellite, (layer, head) in (leaders or {}).items():
        leader_of[satellite] = layer * roles.shape[1] + head
    weight_of = np.ones(roles.shape, np.float32)
    for compressed, weight in (weights or {}).items():
        weight_of[compressed] = weight
    weight_of[(roles == HeadRole.PIVOT) | (roles == HeadRole.VOLATILE)] = 0
    assignment = HeadAssignment(roles, leader_of, weight_of)
    assignment.validate()
    return assignment


def mixed_assignment() -> HeadAssignment:
    """3 layers of 3 heads with all roles, unequal budgets, and leaders in earlier layers."""
    first, second = (0, 0), (1, 2)
    return assignment_of(
        "PSA",
        "SVP",
        "SSS",
        leaders={(0, 1): first, (1, 0): first, (2, 0): second, (2, 1): first, (2, 2): second},
        weights={(0, 1): 0.5, (1, 0): 2.0, (2, 0): 1.5, (2, 2): 0.7},
    )


class LaterSwap:
    """A swap manager whose transfers happen when the test lets them.

    Until then the pages they write hold NaN, and they read what is there at that time.
    """

    def __init__(self, gpu_pool: torch.Tensor, host_pool: CpuPool) -> None:
        self._gpu, self._host = gpu_pool, host_pool.pages
        self.offloads: dict[int, Transfer] = {}
        self.fetches: dict[int, Transfer] = {}
        self._completed: list[int] = []

    @property
    def open_tickets(self) -> list[int]:
        return [*self.offloads, *self.fetches]

    def offload(self, transfer: Transfer) -> None:
        self._host[transfer.host_pages] = torch.nan
        self.offloads[transfer.ticket] = transfer

    def fetch(self, transfer: Transfer) -> None:
        self._gpu[transfer.gpu_pages.long()] = torch.nan
        self.fetches[transfer.ticket] = transfer

    def let_happen(self, tickets: Iterable[int]) -> None:
        for ticket in list(tickets):
            if ticket in self.offloads:
                done = self.offloads.pop(ticket)
                self._host[done.host_pages] = self._gpu[done.gpu_pages.long()]
            else:
                done = self.fetches.pop(ticket)
                self._gpu[done.gpu_pages.long()] = self._host[done.host_pages]
            self._completed.append(ticket)

    def settle(self, tickets: list[int]) -> None:
        self.let_happen(ticket for ticket in tickets if ticket in self.open_tickets)

    def take_completed(self) -> list[int]:
        completed, self._completed = self._completed, []
        return completed


@dataclass
class Books:
    """What the scheduler and the test know of one request."""

    kv: torch.Tensor  # [L, H, num_tokens, 2 * D], all tokens so far
    blocks: list[int]  # block table; freed blocks become NOBODYS_BLOCK
    prompt_tokens: int
    last_query: torch.Tensor  # [L, Hq, D], of the last prompt token
    order: CompactionOrder | None = None
    queries: torch.Tensor | None = None  # [L, Hq, D], of the last decode step
    outputs: torch.Tensor | None = None  # [L, Hq, D], of the last decode step

    @property
    def num_tokens(self) -> int:
        return self.kv.shape[2]


@dataclass
class World:
    """Drives a HeteroCacheRuntime step by step, as vLLM's scheduler and model runner would."""

    assignment: HeadAssignment
    gpu_budget: float = 0.7
    num_blocks: int = 128
    host_pages: int = 4096
    max_num_seqs: int = 8
    group: int = 2
    head_dim: int = 8
    seed: int = 0
    swap_class: type = SynchronousSwap
    options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.num_layers, self.num_kv_heads = self.assignment.roles.shape
        self.generator = torch.Generator().manual_seed(self.seed)
        self.config = HeteroCacheConfig(
            gpu_budget=self.gpu_budget, min_prompt_tokens=1, **self.options
        )
        self.scale = self.head_dim**-0.5
        shape = (self.num_blocks, self.num_layers, self.num_kv_heads, PAGE, 2 * self.head_dim)
        self.pool = torch.full(shape, torch.nan)
        self.pages = self.pool.view(-1, PAGE, 2 * self.head_dim)
        group = LayerGroup(
            layer_names=[f"layers.{layer}.attn" for layer in range(self.num_layers)],
            layer_ids=list(range(self.num_layers)),
            num_q_heads=self.num_kv_heads * self.group,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.scale,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self.runtime = HeteroCacheRuntime(
            self.config, self.assignment, group, 0, self.max_num_seqs, lambda n: []
        )
        kv_caches = [self.pool[:, layer] for layer in range(self.num_layers)]
        with mock.patch.object(runtime_module, "SynchronousSwap", self.swap_class):
            self.runtime.bind_pool(self.pages, kv_caches, self.host_pages)
        self.runtime.host_pool.pages.fill_(torch.nan)
        self.swap = self.runtime.swap
        self.books: dict[str, Books] = {}
        self.free = list(range(self.num_blocks))
        self.tickets = itertools.count(1000)
        self.done: list[str] = []
        self.refused: list[str] = []

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def compacted(self, request_id: str) -> CompactRequest:
        return self.runtime._requests[request_id]

    def resident(self, request_id: str, layer: int, head: int) -> list[int]:
        """Prompt pages that a head holds, in the order of its list."""
        table, slot = self.runtime.table, self.compacted(request_id).slot
        return table.positions[table.head_entries(slot, layer, head)].tolist()

    # --- one step ---

    @one_thread()
    def step(
        self,
        prefill: Mapping[str, int] | None = None,
        decode: Iterable[str] = (),
        gone: Iterable[str] = (),
        scores: Mapping[str, torch.Tensor] | None = None,
        queries: Mapping[str, torch.Tensor] | None = None,
        compact: bool = True,
    ) -> None:
        """Requests leave, prompts are prefilled (and compacted), others decode a token.

        Args:
            prefill: request -> prompt tokens.
            scores: request -> [num_pivots, P], what the decode kernel is said to have written;
                requests that are not named attend for real.
            queries: request -> [L, Hq, D], random where not named.
            compact: whether the prompts of this step are ordered to be compacted.
        """
        prefill, gone = prefill or {}, list(gone)
        for request_id in gone:
            self._free_all(self.books.pop(request_id))
        for request_id, num_tokens in prefill.items():
            self.books[request_id] = self._new_books(request_id, num_tokens, compact)
        orders = [self.books[r].order for r in prefill if self.books[r].order is not None]
        self.runtime.begin_step(gone, orders)
        ids = [*prefill, *decode]
        rows = self.runtime.rows(ids, [r not in prefill for r in ids])
        for request_id, row in zip(ids, rows, strict=True):
            books = self.books[request_id]
            if request_id in prefill:
                self._prefill(books, row)
                continue
            self._append_token(books)
            if scores and request_id in scores:
                row.request.scores.copy_(scores[request_id])
            else:
                given = (queries or {}).get(request_id)
                self._attend(books, row, given)
        self.runtime.after_forward()
        self._take_answers()
        self.check()

    def _new_books(self, request_id: str, num_tokens: int, compact: bool) -> Books:
        kv = self.random(self.num_layers, self.num_kv_heads, num_tokens, 2 * self.head_dim)
        query = self.random(self.num_layers, self.num_kv_heads * self.group, self.head_dim)
        books = Books(kv, self._take(math.ceil(num_tokens / PAGE)), num_tokens, 3 * query)
        if compact:
            targets = self._take(compact_blocks(num_tokens, self.gpu_budget))
            books.order = CompactionOrder(next(self.tickets), request_id, num_tokens, targets)
        return books

    def _prefill(self, books: Books, row: Row) -> None:
        for token in range(books.prompt_tokens):
            self.pool[books.blocks[token // PAGE], :, :, token % PAGE] = books.kv[:, :, token]
        assert (row.capture is None) == (books.order is None)
        if row.capture is not None:
            assert row.capture.order == books.order
            row.capture.last_query.copy_(books.last_query)
            row.capture.dense_blocks = torch.tensor(books.blocks, dtype=torch.int32)

    def _append_token(self, books: Books) -> None:
        if books.num_tokens % PAGE == 0:
            books.blocks += self._take(1)
        token = self.random(self.num_layers, self.num_kv_heads, 1, 2 * self.head_dim)
        self.pool[books.blocks[-1], :, :, books.num_tokens % PAGE] = token[:, :, 0]
        books.kv = torch.cat((books.kv, token), dim=2)

    def _attend(self, books: Books, row: Row, queries: torch.Tensor | None) -> None:
        """What the backend does in each layer for one decode row."""
        runtime = self.runtime
        if queries is None:
            queries = self.random(self.num_layers, self.num_kv_heads * self.group, self.head_dim)
        table, slot = runtime.table, row.slot
        outputs = []
        for layer in range(self.num_layers):
            buffers = {} if row.request is None else runtime.score_buffers(row.request, layer)
            outputs.append(
                paged_decode_ref(
                    queries[layer][None],
                    self.pages,
                    PageLists(
                        table.entries,
                        table.start[slot, layer][None],
                        table.count[slot, layer][None],
                        table.prompt_pages[slot][None],
                    ),
                    torch.tensor([books.blocks], dtype=torch.int32),
                    torch.tensor([books.num_tokens], dtype=torch.int32),
                    layer,
                    self.num_layers,
                    self.scale,
                    [buffers],
                )[0]
            )
        books.queries, books.outputs = queries, torch.stack(outputs)

    def dense_attention(self, request_id: str) -> torch.Tensor:
        """[L, Hq, D] of the last decode queries over every token of the request, float64."""
        books = self.books[request_id]
        keys, values = books.kv.double().repeat_interleave(self.group, dim=1).chunk(2, dim=-1)
        logits = (keys @ books.queries.double()[..., None])[..., 0] * self.scale
        return (logits.softmax(dim=-1)[..., None] * values).sum(dim=2)

    # --- the scheduler's blocks ---

    def _take(self, count: int) -> list[int]:
        assert count <= len(self.free), "the test's pool is too small"
        order = torch.randperm(len(self.free), generator=self.generator).tolist()
        taken = [self.free[i] for i in order[:count]]
        self.free = [self.free[i] for i in order[count:]]
        return taken

    def _give_back(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.pool[block] = torch.nan
            self.free.append(block)

    def _free_all(self, books: Books) -> None:
        self._give_back(block for block in books.blocks if block != NOBODYS_BLOCK)
        if books.order is not None:
            self._give_back(books.order.block_ids)

    def _take_answers(self) -> None:
        done, refused = self.runtime.take_answers()
        owner = {b.order.ticket: r for r, b in self.books.items() if b.order is not None}
        for request_id in (owner[ticket] for ticket in done):
            books = self.books[request_id]
            full = books.prompt_tokens // PAGE
            assert NOBODYS_BLOCK not in books.blocks, "answered twice"
            self._give_back(books.blocks[:full])
            books.blocks[:full] = [NOBODYS_BLOCK] * full
            self.done.append(request_id)
        for request_id in (owner[ticket] for ticket in refused):
            self._give_back(self.books[request_id].order.block_ids)
            self.books[request_id].order = None
            self.refused.append(request_id)

    # --- the checks after every step ---

    def check(self) -> None:
        self.runtime.check_integrity()
        named: list[int] = []
        for request_id, request in self.runtime._requests.items():
            named += self._check_pages(request_id, request)
            if request.offload_ticket is None and request.host_pages.numel():
                self._check_host(request_id, request)
        assert len(named) == len(set(named))
        assert not {page // self.assignment.num_heads for page in named} & set(self.free)
        if isinstance(self.swap, LaterSwap):
            written = [p for t in self.swap.fetches.values() for p in t.gpu_pages.tolist()]
            assert len(written) == len(set(written)), "two transfers write one page"
            assert not set(written) & set(named), "a page that a table names is being written"
            requests = self.runtime._requests.values()
            used = {page for r in requests for page in r.host_pages.flatten().tolist()}
            hosts = [p for t in self.swap.offloads.values() for p in t.host_pages.tolist()]
            assert set(hosts) <= used, "host pages were given away while being written"

    def _check_pages(self, request_id: str, request: CompactRequest) -> list[int]:
        """Every listed page holds the prompt page that the table says."""
        table, kv = self.runtime.table, self.books[request_id].kv
        full = self.books[request_id].prompt_tokens // PAGE * PAGE
        for layer in range(self.num_layers):
            for head in range(self.num_kv_heads):
                entries = table.head_entries(request.slot, layer, head)
                dense = kv[layer, head, :full].view(-1, PAGE, 2 * self.head_dim)
                held = self.pages[table.entries[entries].long()]
                assert torch.equal(held, dense[table.positions[entries].long()]), (layer, head)
        listed = slice(table.base(request.slot), table.spare_entries(request.slot).start)
        return table.entries[listed].tolist()

    def _check_host(self, request_id: str, request: CompactRequest) -> None:
        """The host holds the satellites' whole prompts."""
        satellites = np.flatnonzero(self.assignment.roles.ravel() == HeadRole.SATELLITE)
        books = self.books[request_id]
        full = books.prompt_tokens // PAGE * PAGE
        for flat, pages in zip(satellites.tolist(), request.host_pages, strict=True):
            layer, head = divmod(flat, self.num_kv_heads)
            dense = books.kv[layer, head, :full].view(-1, PAGE, 2 * self.head_dim)
            assert torch.equal(self.runtime.host_pool.pages[pages], dense), (layer, head)


def slow_page_scores(
    queries: torch.Tensor, keys: torch.Tensor, num_pages: int, scale: float
) -> list[float]:
    """Attention mass on each page, the largest over the query heads [G, D]; float64."""
    best = np.zeros(num_pages)
    for query in queries.double().numpy():
        powers = np.exp(keys.double().numpy() @ query * scale)
        mass = powers / powers.sum()
        best = np.maximum(best, mass[: num_pages * PAGE].reshape(num_pages, PAGE).sum(axis=1))
    return best.tolist()


def slow_select(scores: list[float], budget: int, sinks: int, recent: int) -> set[int]:
    """Protected pages and the best others."""
    num_pages = len(scores)
    if budget == num_pages:
        return set(range(num_pages))
    protected = {p for p in range(num_pages) if p < sinks or p >= num_pages - recent}
    others = sorted(set(range(num_pages)) - protected, key=lambda p: (-scores[p], p))
    return protected | set(others[: budget - len(protected)])
