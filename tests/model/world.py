"""A worker without vLLM: the runtime, a small pool, a scheduler's books and a made-up model.

Every K and V is random and remembered, every page that nobody owns holds NaN, and `World.step`
ends with a check of all books and of the contents of every page that a table names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from later_swap import LaterSwap, Offload

from vllm_heterocache.compat.engine import Rotation
from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole
from vllm_heterocache.heads.budget import compact_blocks
from vllm_heterocache.kernels.kv_scales import KVScales
from vllm_heterocache.messages import CompactionOrder, PrefillStart
from vllm_heterocache.policies import make_policy
from vllm_heterocache.startup.serving_plan import ServingPlan, recomputed_tokens, serving_policy
from vllm_heterocache.worker.assemble import assemble_runtime
from vllm_heterocache.worker.batch import Batch
from vllm_heterocache.worker.host.swap import SynchronousSwap
from vllm_heterocache.worker.observe.moved_queries import query_mover
from vllm_heterocache.worker.observe.prompt_observer import window_places
from vllm_heterocache.worker.ops.interface import Geometry, Memory, Ops
from vllm_heterocache.worker.ops.torch_ops import TorchOps
from vllm_heterocache.worker.rank import Rank
from vllm_heterocache.worker.requests import CompactRequest
from vllm_heterocache.worker.runtime import HeteroCacheRuntime
from vllm_heterocache.worker.tables.head_maps import head_maps
from vllm_heterocache.worker.tables.page_table import PageTable

CPU = torch.device("cpu")
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


def head_entries(table: PageTable, table_slot: int, layer: int, head: int) -> slice:
    """The entries of one head's list."""
    start = int(table.tensors.start[table_slot, layer, head])
    return slice(start, start + int(table.tensors.count[table_slot, layer, head]))


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


@dataclass
class Books:
    """What the scheduler and the test know of one request."""

    kv: torch.Tensor  # [L, H, num_tokens, 2 * D], all tokens so far, the whole prompt at least
    blocks: list[int]  # block table; freed blocks become NOBODYS_BLOCK
    prompt_tokens: int
    prompt_queries: torch.Tensor  # [prompt_tokens, L, Hq, D]
    is_compacted: bool  # whether its compaction is ordered once the prompt is complete
    num_computed: int = 0  # tokens whose K and V are in the pool
    order: CompactionOrder | None = None
    queries: torch.Tensor | None = None  # [L, Hq, D], of the last decode step
    outputs: torch.Tensor | None = None  # [L, Hq, D], of the last decode step

    @property
    def num_tokens(self) -> int:
        return self.kv.shape[2]

    @property
    def last_query(self) -> torch.Tensor:
        """[L, Hq, D], of the last prompt token."""
        return self.prompt_queries[-1]


class StepRow(NamedTuple):
    """A row of a batch."""

    request_id: str | None  # None: padding
    num_new: int
    num_tokens: int  # the new ones included


PADDING = StepRow(None, 0, 0)


@dataclass
class World:
    """Drives a HeteroCacheRuntime step by step, as vLLM's scheduler and model runner would.

    Without means of evicted pages, unless the options say otherwise.
    """

    assignment: HeadAssignment
    gpu_budget: float = 0.7
    num_blocks: int = 128
    host_blocks: int = 1024
    max_num_seqs: int = 8
    num_query_windows: int = 8
    group: int = 2
    head_dim: int = 8
    seed: int = 0
    swap_class: type = SynchronousSwap
    make_ops: Callable[[Geometry, Memory], Ops] = TorchOps
    tells_starts: bool = True  # whether the workers hear of a prompt when its prefill begins
    padding: int = 2  # rows that vLLM would add to a batch of nothing but decodes
    layers_before: int = 0  # of the model, on other workers
    compact_min_tokens: int = 1
    compacts_late: bool = False  # when the next step begins, as a worker does
    answers_first: bool = False  # vLLM ends a step behind its answers where drafts are verified
    max_queries: int = 1  # of a decode row; longer chunks are prefill rows
    page_dtype: torch.dtype = torch.float32  # an fp8 pool has scales at random
    rotation: Rotation | None = None  # of the queries, which matched tokens make known
    options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.num_layers, self.num_kv_heads = self.assignment.roles.shape
        self.generator = torch.Generator().manual_seed(self.seed)
        self.prompt_generator = torch.Generator().manual_seed(self.seed + 1)
        defaults = {"min_prompt_tokens": 1, "drift_interval": 1}
        if not self.options.get("matched_share"):
            defaults["evicted_means"] = False
        options = defaults | self.options
        self.config = HeteroCacheConfig(gpu_budget=self.gpu_budget, **options)
        self.scale = self.head_dim**-0.5
        shape = (self.num_blocks, self.num_layers, self.num_kv_heads, PAGE, 2 * self.head_dim)
        self.kv_scales = self._make_scales()
        self.pool = torch.full(shape, torch.nan).to(self.page_dtype)
        self.pages = self.pool.view(-1, PAGE, 2 * self.head_dim)
        self.runtime = self._make_runtime()
        self.table, self.swap = self.runtime.table, self.runtime.swap
        self.books: dict[str, Books] = {}
        self.free = list(range(self.num_blocks))
        self.tickets = itertools.count(1000)
        self.due: set[str] = set()  # requests that the last decode step scored the pages of
        self.done: list[str] = []
        self.refused: list[str] = []

    def _make_runtime(self) -> HeteroCacheRuntime:
        plan = self._make_plan()
        geometry = Geometry(
            num_layers=self.num_layers,
            num_q_heads=self.num_kv_heads * self.group,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.scale,
            dtype=torch.float32,
            max_rows=self.max_num_seqs + self.padding,
            max_queries=self.max_queries,
            num_query_windows=self.num_query_windows,
            window=window_places(plan.policy, self.max_queries),
        )
        self.batch_ids: list[str] = []
        layers = list(range(self.layers_before, self.layers_before + self.num_layers))
        self.maps = head_maps(self.assignment, CPU)
        rank = Rank(
            plan,
            self.assignment,
            self.maps,
            geometry,
            layers,
            list(range(self.num_kv_heads)),
            self.layers_before + self.num_layers,
            index=0,
            max_num_seqs=self.max_num_seqs,
            steps_in_flight=2,
        )
        runtime = assemble_runtime(
            rank,
            self.pages,
            self.num_blocks,
            self.host_blocks,
            self.make_ops,
            self.swap_class,
            lambda num_rows, req_idx: self.batch_ids[:num_rows],
            self.kv_scales,
            None if self.rotation is None else query_mover([self.rotation] * self.num_layers),
        )
        runtime.ops.memory.last_queries.fill_(torch.nan)
        runtime.host_pool.pages.fill_(torch.nan)
        return runtime

    def _make_plan(self) -> ServingPlan:
        """As start-up would make it, but for the roles and the shortest prompt, which are given."""
        policy = serving_policy(self.config, make_policy(self.config))
        recomputed = recomputed_tokens(self.config, policy, self.num_blocks * PAGE)
        return ServingPlan(
            self.config, policy, (self.assignment,), self.compact_min_tokens, recomputed
        )

    def _make_scales(self) -> KVScales | None:
        """Powers of two, so that a number and its element say the same."""
        if self.page_dtype == torch.float32:
            return None
        generator = torch.Generator().manual_seed(self.seed + 2)
        shape = (3, self.num_layers, self.num_kv_heads)
        return KVScales(*torch.randint(-2, 2, shape, generator=generator).float().exp2())

    def _unit(self) -> torch.Tensor | float:
        """[L, H, 1, 2 * D], what a token's elements are multiplied with."""
        if self.kv_scales is None:
            return 1.0
        both = torch.stack(self.kv_scales[:2], dim=-1)  # [L, H, 2]
        return both.repeat_interleave(self.head_dim, dim=-1)[:, :, None]

    def _elements(self, kv: torch.Tensor) -> torch.Tensor:
        """What the pool holds of K and V [L, H, num_tokens, 2 * D]."""
        return (kv / self._unit()).to(self.page_dtype)

    def _random_kv(self, num_tokens: int) -> torch.Tensor:
        """[L, H, num_tokens, 2 * D] that the pool holds without rounding."""
        kv = self.random(self.num_layers, self.num_kv_heads, num_tokens, 2 * self.head_dim)
        return self._elements(kv).float() * self._unit()

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    @property
    def query_shape(self) -> tuple[int, int, int]:
        return self.num_layers, self.num_kv_heads * self.group, self.head_dim

    def random_queries(self) -> torch.Tensor:
        return self.random(*self.query_shape)

    def compacted(self, request_id: str) -> CompactRequest:
        request = self.runtime.request(request_id)
        assert request is not None, f"{request_id} is not compacted"
        return request

    def resident(self, request_id: str, layer: int, head: int) -> list[int]:
        """Prompt pages that a head holds, in the order of its list."""
        entries = head_entries(self.table, self.compacted(request_id).table_slot, layer, head)
        return self.table.tensors.positions[entries].tolist()

    @property
    def num_free_windows(self) -> int:
        """Query windows that no prompt holds."""
        return len(self.runtime.observer._free_windows)

    def num_spares(self, request_id: str) -> int:
        return self.table.num_spares(self.compacted(request_id).table_slot)

    def counted(self, name: str) -> int:
        return self.runtime.snapshot()[name]

    def snapshot_rows(self) -> dict[str, int]:
        """Decode rows so far, by "kind|reason"."""
        return self.runtime.snapshot()["decode_rows"]

    # --- one step ---

    @one_thread()
    def step(
        self,
        prefill: Mapping[str, int] | None = None,
        decode: Iterable[str] = (),
        gone: Iterable[str] = (),
        chunk: Mapping[str, int] | None = None,
        scores: Mapping[str, torch.Tensor] | None = None,
        queries: Mapping[str, torch.Tensor] | None = None,
        compact: bool = True,
    ) -> None:
        """Requests leave, prompts are prefilled (and compacted), others decode a token.

        Args:
            prefill: request -> prompt tokens; the whole prompt where `chunk` does not say less.
            chunk: request -> prompt tokens of this step, of new or of earlier requests.
            scores: request -> [num_pivots, P], what the decode kernel is said to have written
                of the pivots of a request that is due; others attend for real.
            queries: request -> [L, Hq, D], random where not named.
            compact: whether the prompts that begin in this step are compacted.
        """
        prefill, gone = dict(prefill or {}), list(gone)
        for request_id in gone:
            self._free_all(self.books.pop(request_id))
        starts = []
        for request_id, num_tokens in prefill.items():
            self.books[request_id] = self._new_books(num_tokens, compact)
            if compact and self.tells_starts:
                starts.append(PrefillStart(request_id, num_tokens))
        rows = self._make_rows({**prefill, **(chunk or {})}, list(decode))
        orders = [order for row in rows if (order := self._order(row)) is not None]
        self.runtime.begin_step(gone, starts, orders)
        self._forward(rows, queries or {}, scores or {})
        if self.answers_first:
            self._take_answers()
        self.runtime.after_forward()
        if not self.compacts_late:
            self.runtime.compact_finished()  # so that tests see it done
        if not self.answers_first:
            self._take_answers()
        self.check()

    def _new_books(self, num_tokens: int, compact: bool) -> Books:
        kv = self._random_kv(num_tokens)
        blocks = self._take(math.ceil(num_tokens / PAGE))
        last_query = 3 * self.random_queries()
        queries = torch.randn(num_tokens, *last_query.shape, generator=self.prompt_generator)
        queries[-1] = last_query
        return Books(kv, blocks, num_tokens, queries, compact)

    def _make_rows(self, chunks: Mapping[str, int], decode: list[str]) -> list[StepRow]:
        """Rows of few tokens come first; a batch of them alone is padded."""
        for request_id in decode:
            self._append_token(self.books[request_id])
        rows = [
            StepRow(r, n, self.books[r].num_computed + n)
            for r, n in [*chunks.items(), *((r, 1) for r in decode)]
        ]
        rows.sort(key=lambda row: row.num_new > self.max_queries)
        if rows and rows[-1].num_new <= self.max_queries:
            rows += [PADDING] * self.padding
        return rows

    def _append_token(self, books: Books) -> None:
        assert books.num_computed == books.num_tokens, "the prompt is not complete"
        if books.num_tokens % PAGE == 0:
            books.blocks += self._take(1)
        books.kv = torch.cat((books.kv, self._random_kv(1)), dim=2)

    def _order(self, row: StepRow) -> CompactionOrder | None:
        """What the scheduler says of a row that completes its prompt."""
        if row.request_id is None:
            return None
        books = self.books[row.request_id]
        is_last_chunk = books.num_computed < books.prompt_tokens == row.num_tokens
        if not books.is_compacted or not is_last_chunk:
            return None
        is_copied = self.runtime.rank.plan.policy.frees_prompt
        num_blocks = compact_blocks(row.num_tokens, self.gpu_budget) if is_copied else 0
        blocks = self._take(num_blocks)
        books.order = CompactionOrder(next(self.tickets), row.request_id, row.num_tokens, blocks)
        return books.order

    # --- the forward pass ---

    def make_batch(self, rows: list[StepRow]) -> Batch:
        """What the metadata builder would tell the runtime."""
        self.batch_ids = [row.request_id for row in rows if row.request_id is not None]
        width = max([len(self.books[r].blocks) for r in self.batch_ids], default=1)
        block_table = torch.full((len(rows), width), NOBODYS_BLOCK, dtype=torch.int32)
        is_prefilling = np.zeros(len(rows), bool)
        for i, request_id in enumerate(self.batch_ids):
            books = self.books[request_id]
            block_table[i, : len(books.blocks)] = torch.tensor(books.blocks, dtype=torch.int32)
            is_prefilling[i] = books.num_computed < books.prompt_tokens
        return Batch(
            np.array([row.num_new for row in rows], np.int64),
            np.array([row.num_tokens for row in rows], np.int64),
            is_prefilling,
            sum(row.num_new <= self.max_queries for row in rows),
            block_table,
        )

    def _forward(
        self,
        rows: list[StepRow],
        queries: Mapping[str, torch.Tensor],
        scores: Mapping[str, torch.Tensor],
    ) -> None:
        batch = self.make_batch(rows)
        kept = self.runtime.begin_batch(batch)
        for row in rows:
            if row.request_id is not None:
                self._write_kv(self.books[row.request_id], row.num_tokens)
        queries_of_prefill = self._prefill_queries(rows)
        for layer in range(self.num_layers):
            self.runtime.observer.observe(layer, queries_of_prefill[:, layer], kept)
        if batch.num_decodes:
            self._decode(rows[: batch.num_decodes], batch, queries)
        for i, row in enumerate(rows):
            if row.request_id in scores:
                self._pretend_scores(row.request_id, i, scores[row.request_id])

    def _prefill_queries(self, rows: list[StepRow]) -> torch.Tensor:
        """[tokens of the batch, L, Hq, D]; decode rows, which the hook does not see, hold NaN."""
        parts = []
        for row in rows:
            if row.num_new > self.max_queries:
                queries = self.books[row.request_id].prompt_queries
                parts.append(queries[row.num_tokens - row.num_new : row.num_tokens])
            else:
                parts.append(torch.full((row.num_new, *self.query_shape), torch.nan))
        return torch.cat(parts) if parts else torch.empty(0, *self.query_shape)

    def _write_kv(self, books: Books, num_tokens: int) -> None:
        for token in range(books.num_computed, num_tokens):
            block = books.blocks[token // PAGE]
            elements = self._elements(books.kv[:, :, token : token + 1])
            self.pool[block, :, :, token % PAGE] = elements[:, :, 0]
        books.num_computed = num_tokens

    def _decode(
        self, rows: list[StepRow], batch: Batch, queries: Mapping[str, torch.Tensor]
    ) -> None:
        """What the backend does in each layer for the decode rows."""
        runtime, num_rows = self.runtime, len(rows)
        seq_lens = torch.from_numpy(batch.seq_lens).int()
        ends = list(itertools.accumulate(row.num_new for row in rows))
        starts = torch.tensor([0, *ends], dtype=torch.int32)
        decode_rows = runtime.rows.decode_rows(batch.block_table, seq_lens, starts, num_rows)
        self.due = {r.request_id for r, due in zip(rows, decode_rows.is_due, strict=True) if due}
        if self.max_queries == 1:  # a padded row has a query then, which nobody reads
            ends = list(range(1, num_rows + 1))
        query = torch.cat([self._queries_of(row, queries) for row in rows])
        outputs = torch.full_like(query, torch.nan)
        for layer in range(self.num_layers):
            output = outputs[:, layer].contiguous()
            runtime.decode(layer, query[:, layer], decode_rows, output)
            outputs[:, layer] = output
        for i, row in enumerate(rows):
            if row.request_id is not None:
                books = self.books[row.request_id]
                books.queries, books.outputs = query[ends[i] - 1], outputs[ends[i] - 1]
        assert not outputs.isnan().any()

    def _queries_of(self, row: StepRow, queries: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[queries of a decode row, L, Hq, D]"""
        if row.request_id is None:
            num_queries = int(self.max_queries == 1)
            return torch.full((num_queries, *self.query_shape), torch.nan)
        books = self.books[row.request_id]
        if row.num_tokens <= books.prompt_tokens:  # a short chunk
            return books.prompt_queries[row.num_tokens - row.num_new : row.num_tokens]
        given = queries.get(row.request_id)
        return (self.random_queries() if given is None else given)[None]

    def _pretend_scores(self, request_id: str, row: int, scores: torch.Tensor) -> None:
        """Replace what the decode wrote of the pivots, if the request is due."""
        if request_id not in self.due:
            return
        request, tables = self.compacted(request_id), self.table.tensors
        num_pages = self.books[request_id].prompt_tokens // PAGE
        first = int(tables.first_stripe[request.table_slot]) * tables.pivot_width
        for pivot, flat in enumerate(self.maps.pivot_heads.tolist()):
            layer, head = divmod(flat, self.num_kv_heads)
            places = slice(first + pivot * num_pages, first + (pivot + 1) * num_pages)
            of_head = self.runtime.ops._head_lse[layer, row * self.num_kv_heads + head]
            tables.page_lse[places] = scores[pivot].float().log2()[:, None] + of_head

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
            if self.runtime.rank.plan.policy.frees_prompt:
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
        spare: list[int] = []
        for request_id, request in self._requests.items():
            listed_pages = self._check_pages(request_id, request)
            if request.dense_blocks is None:  # else others may read the same blocks
                named += listed_pages
            assert not {page // self.assignment.num_heads for page in listed_pages} & set(self.free)
            listed, base = (
                self.table.num_listed(request.table_slot),
                self.table.base(request.table_slot),
            )
            spares = slice(base + listed, base + listed + self.table.num_spares(request.table_slot))
            spare += self.table.tensors.entries[spares].tolist()
            if request.offload_mark is None and request.host is not None:
                self._check_host(request_id, request)
        assert len(named) == len(set(named))
        if isinstance(self.swap, LaterSwap):
            fetches = [fetch for fetch in self.swap.fetches if not fetch.has_arrived]
            written = [page for f in fetches for page in f.gpu_pages.tolist()]
            assert len(written) == len(set(written)), "two transfers write one page"
            assert not set(written) & set(named), "a page that a table names is being written"
            assert set(written) <= set(spare), "a page that was given away is being written"
            self._check_reads()

    def _check_reads(self) -> None:
        """What is copied to a request's host blocks for good is still what it was."""
        final = {}
        for copy in self.swap.to_host:
            if isinstance(copy, Offload):
                final |= dict(zip(copy.host_pages.tolist(), copy.gpu_pages.tolist(), strict=True))
        num_satellites = self.maps.satellite_heads.numel()
        copies = {r: q.host for r, q in self._requests.items() if q.host is not None}
        for request_id, copy in {**copies, **self.runtime.host_copies._of_prefills}.items():
            books = self.books[request_id]
            for page, block in enumerate(copy.host_blocks[: copy.num_copied].tolist()):
                for i, flat in enumerate(self.maps.satellite_heads.tolist()):
                    source = final.get(block * num_satellites + i)
                    if source is not None:
                        dense = self._prompt_pages(books, *divmod(flat, self.num_kv_heads))
                        assert torch.equal(self.pages[source].float(), dense[page])

    @property
    def _requests(self) -> dict[str, CompactRequest]:
        return self.runtime._requests

    def _prompt_pages(self, books: Books, layer: int, head: int) -> torch.Tensor:
        """[P, PAGE, 2 * D] fp32, the elements that stand for the prompt."""
        full = books.prompt_tokens // PAGE * PAGE
        elements = self._elements(books.kv[:, :, :full])[layer, head]
        return elements.view(-1, PAGE, 2 * self.head_dim).float()

    def _check_pages(self, request_id: str, request: CompactRequest) -> list[int]:
        """Every listed page holds the prompt page that the table says."""
        tables = self.table.tensors
        for layer in range(self.num_layers):
            for head in range(self.num_kv_heads):
                entries = head_entries(self.table, request.table_slot, layer, head)
                dense = self._prompt_pages(self.books[request_id], layer, head)
                held = self.pages[tables.entries[entries].long()]
                assert torch.equal(held.float(), dense[tables.positions[entries].long()]), (
                    layer,
                    head,
                )
        return self.table.listed_pages(request.table_slot).tolist()

    def _check_host(self, request_id: str, request: CompactRequest) -> None:
        """The host holds the satellites' whole prompts."""
        blocks = torch.from_numpy(request.host.host_blocks)
        num_satellites = self.maps.satellite_heads.numel()
        for i, flat in enumerate(self.maps.satellite_heads.tolist()):
            dense = self._prompt_pages(self.books[request_id], *divmod(flat, self.num_kv_heads))
            held = self.runtime.host_pool.pages[blocks * num_satellites + i]
            assert torch.equal(held.float(), dense), flat


def resident_pages(world: World, request_id: str) -> dict[tuple[int, int], list[int]]:
    heads = [(i, j) for i in range(world.num_layers) for j in range(world.num_kv_heads)]
    return {head: sorted(world.resident(request_id, *head)) for head in heads}


def attention_over(world: World, request_id: str, resident, left_behind=None) -> torch.Tensor:
    """[L, Hq, D], float64, token by token: each head over its resident pages and the tail.

    Args:
        left_behind: (layer, head) -> K and V [m, 2 * D] of what stands in for evicted pages, and
            the bias [m] of their logits.
    """
    books = world.books[request_id]
    tail = list(range(books.prompt_tokens // PAGE * PAGE, books.num_tokens))
    output = torch.empty(books.queries.shape, dtype=torch.float64)
    for layer in range(world.num_layers):
        for q_head in range(output.shape[1]):
            head = q_head // world.group
            tokens = [p * PAGE + i for p in resident[layer, head] for i in range(PAGE)] + tail
            kv, bias = books.kv[layer, head, tokens].double(), torch.zeros(len(tokens)).double()
            if left_behind is not None:
                more, more_bias = left_behind(layer, head)
                kv, bias = torch.cat((kv, more.double())), torch.cat((bias, more_bias.double()))
            keys, values = kv.chunk(2, dim=-1)
            logits = keys @ books.queries[layer, q_head].double() * world.scale + bias
            weights = logits.exp()
            output[layer, q_head] = (weights[:, None] * values).sum(0) / weights.sum()
    return output


def assert_outputs(world: World, request_id: str, expected: torch.Tensor) -> None:
    outputs = world.books[request_id].outputs.double()
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)


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
