"""What a layer with finders pays in a step, beside decode attention in the same process.

`find_pages` searches, `exchange_pages` then fetches from pinned memory of the host. The finders
first hold the best pages of their queries, so that no page moves. Where pages move, a round over
the layers asks by the negated queries, and the next one by the queries themselves. Each brings
back what the other sent away, so that nothing is reset between calls; a row says how many moved.

A layer is timed whole, too: decode attention alone, and behind search and fetch. There it begins
while they run, and reads the finders' pages last; `in_turn_us` is the time where it waits for them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from common import cells, finder_kernels, step_kernels
from common.cells import PAGE, D, H
from common.finder_kernels import FinderCell
from common.paged_decode import PagedDecode
from common.step_kernels import PROTECTED, expect_equal, on_grid
from common.timing import DEVICE, expect, expect_close, time_calls
from vllm_heterocache.kernels.exchange_pages import exchange_pages
from vllm_heterocache.kernels.exchange_pages_ref import MAX_EXCHANGED, exchange_pages_ref
from vllm_heterocache.kernels.tables import drift_counters
from vllm_heterocache.kernels.values import DriftCounter

HOST_BYTES = 512 << 20  # of pinned memory at most; pages of one finder share blocks beyond it


@dataclasses.dataclass
class ExchangeCell(FinderCell):
    """A decode batch whose finders' pages are all on the host, and some of them on the GPU."""

    host_pages: torch.Tensor  # [host blocks * num_finders, PAGE, 2 * D], pinned
    counters: torch.Tensor

    @property
    def num_listed(self) -> int:
        return int(self.tables.count[0, 0, 0])

    @property
    def max_moved(self) -> int:
        """Pages of a finder that a call can fetch."""
        return min(MAX_EXCHANGED, max(0, self.num_listed - sum(PROTECTED)))

    def exchange(self, layer: int) -> None:
        self._exchange(exchange_pages, layer, program_lse=self.program_lse[layer])

    def exchange_ref(self, layer: int) -> None:
        self._exchange(exchange_pages_ref, layer)

    def _exchange(self, exchange: Callable[..., None], layer: int, **found: torch.Tensor) -> None:
        exchange(
            self.pages, self.host_pages, self.tables, self.finders, self.rows, layer, PROTECTED,
            self.counters, **found,
        )  # fmt: skip

    def find_and_exchange(self, layer: int) -> None:
        self.find(layer)
        self.exchange(layer)

    def negated(self) -> ExchangeCell:
        """The same lists, asked for by the negated queries."""
        tables = self.tables._replace(page_lse=torch.full_like(self.tables.page_lse, torch.nan))
        program_lse = torch.full_like(self.program_lse, torch.nan)
        return dataclasses.replace(self, query=-self.query, tables=tables, program_lse=program_lse)

    def copied(self) -> ExchangeCell:
        """With what is written of its own."""
        written = ("scores", "positions", "is_resident")
        copies = {name: getattr(self.tables, name).clone() for name in written}
        tables = self.tables._replace(**copies)
        pages, counters = self.pages.clone(), self.counters.clone()
        return dataclasses.replace(self, pages=pages, tables=tables, counters=counters)

    def find_all(self) -> None:
        for layer in range(self.num_layers):
            self.find(layer)

    def hold_best(self) -> None:
        """Each finder lists the best pages of its queries in ascending order, protected ones
        included; `find_all` went before."""
        num_pages, tables = self.prompt_pages, self.tables
        lse = self.by_finder(tables.page_lse)
        rank = (lse - lse.exp2().sum(2, keepdim=True).log2()).amax(3)
        rank[..., : PROTECTED.sinks] = torch.inf
        rank[..., num_pages - PROTECTED.recent :] = torch.inf
        held = rank.topk(self.num_listed, dim=2).indices.sort(dim=2).values
        positions = tables.positions.view(self.num_rows, self.num_layers, H, self.num_listed)
        finders = positions[:, :, : self.num_finders]
        finders.copy_(held.view(finders.shape))
        tables.is_resident.zero_().view(rank.shape).scatter_(2, held, 1)
        for layer in range(self.num_layers):  # where the kernel rounds another way
            self.exchange(layer)


def make_cell(name: str, num_layers: int | None) -> ExchangeCell:
    """Lists hold any pages of the pool, of unset positions; no log-sum-exp is there yet."""
    num_rows, num_tokens, mix = cells.parse(name)
    cell = finder_kernels.make_cell(num_rows, num_tokens, finder_kernels.MIXES[mix], num_layers)
    width, num_pages = cell.finders.width, num_rows * cell.prompt_pages
    for row in range(num_rows):
        cell.quantize(row)
    num_blocks = min(num_pages, HOST_BYTES // (width * PAGE * 2 * D * 2))
    pages = cells.random_pages(num_blocks * width)
    host_pages = torch.empty(pages.shape, dtype=pages.dtype, pin_memory=DEVICE.type == "cuda")
    entries = torch.randperm(cell.pages.shape[0], device=DEVICE)[: cell.tables.entries.shape[0]]
    tables = cell.tables._replace(
        entries=entries.int(),
        scores=torch.full((num_pages * width,), torch.nan, device=DEVICE),
        is_resident=torch.zeros(num_pages * width, dtype=torch.int8, device=DEVICE),
        host_blocks=(torch.randperm(num_pages, device=DEVICE) % num_blocks).int(),
        satellite_width=width,
        host_width=1,
    )
    fields = vars(cell) | {"tables": tables}
    return ExchangeCell(
        **fields, host_pages=host_pages.copy_(pages), counters=drift_counters(DEVICE)
    )


def check_exchanged(
    cell: ExchangeCell, exchange: Callable[[ExchangeCell], None], what: str
) -> None:
    """The first layer, on copies. Log-sum-exps are quarters, so that the order of the pages does
    not hang on the rounding of their scores."""
    lse = on_grid(cell.tables.page_lse.clone())
    cell = dataclasses.replace(
        cell,
        tables=cell.tables._replace(page_lse=lse),
        program_lse=torch.full_like(cell.program_lse, -torch.inf),
    )
    of_layer = cell.by_finder(lse)[:, : cell.num_finders]
    cell.by_program(0)[:, :, 0] = of_layer.exp2().sum(2).log2()
    exact, actual = cell.copied(), cell.copied()
    exact.exchange_ref(0)
    exchange(actual)
    for name in ("positions", "is_resident"):
        expect_equal(getattr(actual.tables, name), getattr(exact.tables, name), f"{what}, {name},")
    found, expected = actual.tables.scores, exact.tables.scores
    is_close = torch.allclose(found, expected, rtol=1e-5, atol=0, equal_nan=True)
    expect(is_close, f"{what}, scores,")
    expect(torch.equal(actual.pages, exact.pages), f"{what}, pages,")
    expect(torch.equal(actual.counters, exact.counters), f"{what}, counters,")


def pages_moved(cell: ExchangeCell, call: Callable[[int], None], num_calls: int) -> float:
    """Of a finder in a call."""
    cell.counters.zero_()
    for i in range(num_calls):
        call(i)
    moved = int(cell.counters[DriftCounter.PAGES_FETCHED])
    return moved / (num_calls * cell.num_rows * cell.num_finders)


def time_moving(
    cell: ExchangeCell, call: Callable[[int], None], num_calls: int, moves: bool
) -> tuple[float, float, float]:
    """Median, spread, and the pages of a finder that a call moves: any if `moves`, else none."""
    us, spread = time_calls(call, num_calls)
    moved = pages_moved(cell, call, num_calls)
    expect((moved > 0) == moves, f"exchange_pages, which moved {moved:.2f} pages a finder,")
    return us, spread, moved


def time_layer(asked: Sequence[ExchangeCell], moves: bool) -> dict[str, float]:
    """Medians of decode attention alone, behind search and fetch, and beside them."""
    cell, num_calls = asked[-1], 2 * asked[-1].num_layers
    heads = cell.finders.heads.tolist()
    alone = [PagedDecode(one) for one in asked]
    beside = [PagedDecode(one, late_heads=heads) for one in asked]

    def attend(i: int) -> None:
        alone[i // cell.num_layers](i % cell.num_layers)

    def look(decodes: list[PagedDecode], i: int) -> None:
        turn, layer = divmod(i, cell.num_layers)
        asked[turn].find_and_exchange(layer)
        decodes[turn](layer)

    alone_us, _ = time_calls(attend, num_calls)
    in_turn_us, _, _ = time_moving(cell, functools.partial(look, alone), num_calls, moves)
    us, spread, moved = time_moving(cell, functools.partial(look, beside), num_calls, moves)
    for turn, decode in enumerate(beside):
        look(beside, turn * cell.num_layers)
        output = decode.results.output.clone()
        expect_close(output, decode.cell.reference(0).output, "attention beside search and fetch")
    return {
        "layer_us": us,
        "layer_spread_us": spread,
        "layer_moved_pages": moved,
        "attention_us": alone_us,
        "in_turn_us": in_turn_us,
        "added_us": us - alone_us,
    }


def exchange_row(name: str, num_layers: int | None) -> dict[str, Any]:
    cell = make_cell(name, num_layers)
    layers = cell.num_layers
    cell.summarize()
    decode_us, whole_us = step_kernels.time_decode(cell)
    finder_kernels.check_found(cell, cell.find, "find_pages")
    negated = cell.negated()
    asked = negated, cell
    for one in asked:
        one.find_all()
    cell.hold_best()
    check_exchanged(negated, lambda one: one.exchange(0), "exchange_pages")

    def in_turn(call: Callable[[ExchangeCell, int], None], i: int) -> None:
        call(asked[i // layers], i % layers)

    exchange = functools.partial(in_turn, ExchangeCell.exchange)
    both = functools.partial(in_turn, ExchangeCell.find_and_exchange)
    none_better_us, _, _ = time_moving(cell, cell.exchange, layers, moves=False)
    none_due_us, _, _ = time_moving(cell, cell.none_due().exchange, layers, moves=False)
    moves = cell.max_moved > 0
    us, spread, moved = time_moving(cell, exchange, 2 * layers, moves)
    together_us, together_spread, _ = time_moving(cell, both, 2 * layers, moves)
    check_exchanged(negated, lambda one: one.exchange(0), "exchange_pages after timing")
    layer = time_layer(asked, moves)
    page_bytes = PAGE * 2 * D * 2
    return {
        "benchmark": "exchange_pages",
        "cell": name,
        "config": {
            "finders": cell.num_finders,
            "share": finder_kernels.SHARE,
            "listed_pages": cell.num_listed,
            "num_layers": layers,
            "host_bytes": cell.host_pages.numel() * 2,
        },
        "moved_pages": moved,
        "moved_bytes": moved * cell.num_rows * cell.num_finders * page_bytes,
        "median_us": us,
        "spread_us": spread,
        "nothing_better_us": none_better_us,
        "no_row_due_us": none_due_us,
        "with_search_us": together_us,
        "with_search_spread_us": together_spread,
        **layer,
        "decode_us": decode_us,
        "whole_decode_us": whole_us,
        "to_decode": together_us / decode_us,
        "to_whole_decode": (together_us + decode_us) / whole_us,
    }
