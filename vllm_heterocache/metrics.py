"""What the plugin counts, and how it reaches vLLM's /metrics and its periodic log line."""

from __future__ import annotations

from collections import Counter as Tally
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_heterocache.compat import KVConnectorPromMetrics, KVConnectorStats

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm_heterocache.compat import VllmConfig

COUNTERS = {
    "decode_pages_dense": "Pages that full attention would have read for the decode rows.",
    "decode_pages_read": "Pages that decode attention read, and that choosing pages read.",
    "drift_checks": "Drift checks: pivots compared with their reference set.",
    "drift_triggers": "Drift checks that found drift.",
    "fetches_late": "Fetches that the GPU waited for, as their pages came too late.",
    "pages_fetched": "Pages copied from the host pool to the GPU.",
    "pages_offloaded": "Pages copied from the GPU to the host pool.",
    "requests_compacted": "Requests whose prompt was compacted.",
    "requests_short_of_reference_queries": "Requests compacted whose matched tokens were fitted to "
    "fewer queries, as other prompts had the room.",
    "requests_without_retrieval": "Requests compacted for which the host pool had no room.",
}
SAME_ON_ALL_RANKS = (
    "requests_compacted",
    "requests_short_of_reference_queries",
    "requests_without_retrieval",
)
PAGE_KINDS = ("dense", "compact", "host", "spare")
SCHEDULER = "scheduler"  # key of the scheduler's part of the stats; workers use "rank<i>"


@dataclass
class Counters:
    """Totals since start-up of one worker."""

    decode_pages_dense: int = 0  # what full attention would have read for the decode rows
    decode_pages_read: int = 0  # pages that these rows read, and that choosing pages read
    drift_checks: int = 0  # pivots compared with their reference set
    drift_triggers: int = 0  # drift checks that found drift
    fetches_late: int = 0  # fetches that the device waited for
    pages_fetched: int = 0  # host to GPU
    pages_offloaded: int = 0  # GPU to host
    requests_compacted: int = 0
    requests_short_of_reference_queries: int = 0  # compacted while other prompts had the room
    requests_without_retrieval: int = 0  # compacted while the host pool was full
    # (kind, reason) -> decode rows; kind is "compact" or "dense"
    decode_rows: Tally[tuple[str, str]] = field(default_factory=Tally)

    def reset(self) -> None:
        """Count from zero again."""
        for counter in fields(self):
            fresh: Any = Tally() if counter.name == "decode_rows" else 0
            setattr(self, counter.name, fresh)


class PageCounts(NamedTuple):
    """Pages that one compacted request holds on one worker."""

    compact: int
    host: int
    spare: int


def worker_snapshot(
    counters: Counters, requests: dict[int, PageCounts], pages_per_block: int
) -> dict[str, Any]:
    """One worker's totals and pages.

    Args:
        requests: ticket of the compaction -> pages held.
        pages_per_block: layers times KV heads of this worker.
    """
    snapshot: dict[str, Any] = {name: getattr(counters, name) for name in COUNTERS}
    snapshot["decode_rows"] = {"|".join(key): n for key, n in counters.decode_rows.items()}
    snapshot["requests"] = {str(ticket): list(counts) for ticket, counts in requests.items()}
    snapshot["pages_per_block"] = pages_per_block
    return snapshot


def counted_since(snapshot: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """One worker's part of the stats: a snapshot whose counters count from an earlier one.

    vLLM hands the stats of a step to one of several API servers, and what these export is summed.
    So each step's counts must reach exactly one of them.
    """
    if earlier is None:
        return snapshot
    counts = {name: snapshot[name] - earlier[name] for name in COUNTERS}
    before = earlier["decode_rows"]
    rows = {key: n - before.get(key, 0) for key, n in snapshot["decode_rows"].items()}
    counts["decode_rows"] = {key: n for key, n in rows.items() if n > 0}
    return {**snapshot, **counts}


def scheduler_snapshot(dense_blocks: int, tickets: Iterable[int]) -> dict[str, Any]:
    """The scheduler's part: it is the first to know that a request has ended.

    Args:
        dense_blocks: kernel blocks in use that are not compact.
        tickets: compactions whose blocks are still held.
    """
    return {"dense_blocks": dense_blocks, "tickets": [str(ticket) for ticket in tickets]}


class HeteroCacheStats(KVConnectorStats):
    """Parts by source. Of two parts of a source, counts add up and the later one's pages stand, so
    joining over ranks and joining over time are the same operation."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        joined = dict(self.data)
        for source, later in other.data.items():
            joined[source] = _add(joined[source], later) if source in joined else later
        self.data = joined
        return self

    def is_empty(self) -> bool:
        return not self.data

    def reduce(self) -> dict[str, int | float]:
        """Totals over all sources, for the log line: pages held now, and what was counted."""
        totals = totals_of(self.data)
        rows = totals.pop("decode_rows")
        for kind in ("compact", "dense"):
            totals[f"decode_rows_{kind}"] = sum(
                n for key, n in rows.items() if key.startswith(kind + "|")
            )
        pages = [f"pages_{kind}" for kind in PAGE_KINDS]
        return {f"heterocache_{key}": n for key, n in totals.items() if n or key in pages}


def _add(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Join two parts of one source."""
    if "decode_rows" not in later:  # the scheduler counts nothing
        return later
    counts = {name: earlier[name] + later[name] for name in COUNTERS}
    rows = Tally(earlier["decode_rows"]) + Tally(later["decode_rows"])
    return {**later, **counts, "decode_rows": dict(rows)}


def totals_of(data: dict[str, Any]) -> dict[str, Any]:
    """Join the workers' parts into an engine's totals.

    Pages, checks and transfers add up over ranks, because each rank has heads of its own;
    requests and decode rows are the same ones on every rank. Pages of requests that the scheduler
    has freed do not count.
    """
    scheduler = data.get(SCHEDULER, {"dense_blocks": 0, "tickets": []})
    held = set(scheduler["tickets"])
    totals: dict[str, Any] = {"decode_rows": Tally()}
    totals |= dict.fromkeys((*COUNTERS, *(f"pages_{kind}" for kind in PAGE_KINDS)), 0)
    for source, snapshot in data.items():
        if source == SCHEDULER:
            continue
        for name in COUNTERS:
            join = max if name in SAME_ON_ALL_RANKS else int.__add__
            totals[name] = join(totals[name], snapshot[name])
        totals["decode_rows"] |= Tally(snapshot["decode_rows"])
        totals["pages_dense"] += scheduler["dense_blocks"] * snapshot["pages_per_block"]
        for ticket, counts in snapshot["requests"].items():
            if ticket in held:
                for kind, count in PageCounts(*counts)._asdict().items():
                    totals[f"pages_{kind}"] += count
    return totals


class HeteroCachePromMetrics(KVConnectorPromMetrics):
    """Prometheus metrics `vllm:heterocache_*` of each engine."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._labelnames = list(labelnames)
        # vLLM gives every metric the union of all kinds as its type.
        gauge_cls: Any = self._gauge_cls
        self._pages: Any = gauge_cls(
            name="vllm:heterocache_pages",
            documentation="KV pages (16 tokens of one head) held now, by kind.",
            labelnames=[*self._labelnames, "kind"],
            multiprocess_mode="mostrecent",  # not one value for each API server
        )
        self._counters: dict[str, Any] = {
            name: self._counter_cls(
                name=f"vllm:heterocache_{name}",
                documentation=text,
                labelnames=self._labelnames,
            )
            for name, text in COUNTERS.items()
        }
        self._rows: Any = self._counter_cls(
            name="vllm:heterocache_decode_rows",
            documentation="Decode rows by how they were served, and why.",
            labelnames=[*self._labelnames, "kind", "reason"],
        )
        self._latest: dict[int, dict[str, Any]] = {}
        for engine_idx, labels in self.per_engine_labelvalues.items():
            self._latest[engine_idx] = {}
            for kind in PAGE_KINDS:
                self._pages.labels(*labels, kind)
            for counter in self._counters.values():
                counter.labels(*labels)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        latest = self._latest[engine_idx]
        latest.update(transfer_stats_data)
        held, counted = totals_of(latest), totals_of(transfer_stats_data)
        labels = self.per_engine_labelvalues[engine_idx]
        for kind in PAGE_KINDS:
            self._pages.labels(*labels, kind).set(held[f"pages_{kind}"])
        for name, counter in self._counters.items():
            counter.labels(*labels).inc(counted[name])
        for key, rows in counted["decode_rows"].items():
            self._rows.labels(*labels, *key.split("|")).inc(rows)
