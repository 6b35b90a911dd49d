"""Snapshots in, Prometheus text and log line out."""

import functools
import random
import re
from collections import Counter as Tally
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vllm_heterocache.connectors.hetero import HeteroConnector
from vllm_heterocache.metrics import (
    Counters,
    HeteroCacheStats,
    PageCounts,
    counted_since,
    scheduler_snapshot,
    worker_snapshot,
)

LABELS = {0: ["model", "0"], 1: ["model", "1"]}
CONFIG = SimpleNamespace(kv_transfer_config=None)


class Exposition:
    """HeteroCachePromMetrics on a registry of its own, read back as /metrics prints it."""

    def __init__(self):
        self.registry = CollectorRegistry()
        types = {
            kind: functools.partial(kind, registry=self.registry)
            for kind in (Gauge, Counter, Histogram)
        }
        self.metrics = HeteroConnector.build_prom_metrics(
            CONFIG, types, ["model_name", "engine"], LABELS
        )

    def observe(self, data, engine=0):
        self.metrics.observe(data, engine)

    @property
    def text(self) -> str:
        return generate_latest(self.registry).decode()

    def value(self, name, engine=0, **labels):
        """Value of one sample; None where it is not printed."""
        labels = {"model_name": "model", "engine": str(engine), **labels}
        return self.registry.get_sample_value(f"vllm:heterocache_{name}", labels)


def worker(requests=None, pages_per_block=4, rows=None, **counts):
    counters = Counters(**counts)
    counters.decode_rows.update(rows or {})
    return worker_snapshot(counters, requests or {}, pages_per_block)


def test_names_and_labels_on_metrics_are_the_documented_ones():
    exposition = Exposition()
    exposition.observe({"rank0": worker(rows={("compact", "compacted"): 1})})
    samples = {
        re.sub(r"\{.*", "", line.rsplit(" ", 1)[0])
        for line in exposition.text.splitlines()
        if not line.startswith("#") and "_created" not in line
    }
    assert samples == {
        "vllm:heterocache_pages",
        "vllm:heterocache_decode_pages_dense_total",
        "vllm:heterocache_decode_pages_read_total",
        "vllm:heterocache_drift_checks_total",
        "vllm:heterocache_drift_triggers_total",
        "vllm:heterocache_fetches_late_total",
        "vllm:heterocache_pages_fetched_total",
        "vllm:heterocache_pages_offloaded_total",
        "vllm:heterocache_decode_rows_total",
        "vllm:heterocache_requests_compacted_total",
        "vllm:heterocache_requests_short_of_reference_queries_total",
        "vllm:heterocache_requests_without_retrieval_total",
    }
    line = 'vllm:heterocache_decode_rows_total{engine="0",kind="compact",'
    assert line + 'model_name="model",reason="compacted"} 1.0' in exposition.text
    kinds = re.findall(r'heterocache_pages\{engine="0",kind="(\w+)"', exposition.text)
    assert sorted(kinds) == ["compact", "dense", "host", "spare"]


def test_everything_reads_zero_before_the_first_request():
    exposition = Exposition()
    for engine in LABELS:
        assert exposition.value("requests_compacted_total", engine) == 0
        assert exposition.value("pages", engine, kind="host") == 0


def test_counts_add_up_over_time_and_over_ranks():
    """Transfers add up; requests and decode rows are the same ones on every rank."""
    exposition = Exposition()
    rng = random.Random(0)
    names = ["drift_checks", "drift_triggers", "fetches_late"]
    names += ["decode_pages_read", "decode_pages_dense", "pages_fetched", "pages_offloaded"]
    of_requests = ["requests_compacted", "requests_without_retrieval"]
    of_requests += ["requests_short_of_reference_queries"]
    expected = {engine: Tally() for engine in LABELS}
    for _ in range(40):
        engine = rng.choice([0, 1])
        requests = {name: rng.randrange(3) for name in of_requests}
        rows = {("compact", "compacted"): rng.randrange(1, 9)}
        data = {}
        for rank in range(3):
            counts = {name: rng.randrange(5) for name in names}
            expected[engine].update(counts)
            data[f"rank{rank}"] = worker(rows=rows, **requests, **counts)
        expected[engine].update(requests, rows=rows["compact", "compacted"])
        exposition.observe(data, engine)
    for engine in LABELS:
        for name in names + of_requests:
            assert exposition.value(f"{name}_total", engine) == expected[engine][name]
        rows = exposition.value("decode_rows_total", engine, kind="compact", reason="compacted")
        assert rows == expected[engine]["rows"]


def test_api_servers_together_export_what_was_counted_once():
    """vLLM hands a step's stats to one of them; in multiprocess mode /metrics is their sum."""
    servers = [Exposition(), Exposition()]
    counters, earlier = Counters(), None
    for step in range(100):
        counters.requests_compacted += 1
        counters.decode_rows["compact", "compacted"] += 8
        snapshot = worker_snapshot(counters, {}, 4)
        servers[step % 2].observe({"rank0": counted_since(snapshot, earlier)})
        earlier = snapshot
    assert sum(server.value("requests_compacted_total") for server in servers) == 100
    labels = {"kind": "compact", "reason": "compacted"}
    assert sum(server.value("decode_rows_total", **labels) for server in servers) == 800


def test_of_several_api_servers_the_one_that_was_told_last_says_what_is_held():
    assert Exposition().metrics._pages._multiprocess_mode == "mostrecent"


def test_engines_do_not_mix():
    exposition = Exposition()
    data = {"rank0": worker({0: PageCounts(5, 6, 7)}), "scheduler": scheduler_snapshot(2, [0])}
    exposition.observe(data, 1)
    assert exposition.value("pages", 1, kind="compact") == 5
    assert exposition.value("pages", 0, kind="compact") == 0


def pages(exposition):
    return {
        kind: exposition.value("pages", kind=kind) for kind in ("dense", "compact", "host", "spare")
    }


def test_pages_are_those_of_requests_that_the_scheduler_still_holds():
    exposition = Exposition()
    ranks = {
        "rank0": worker({3: PageCounts(10, 20, 2), 4: PageCounts(1, 2, 3)}, pages_per_block=6),
        "rank1": worker({3: PageCounts(11, 21, 2)}, pages_per_block=5),
    }
    exposition.observe({**ranks, "scheduler": scheduler_snapshot(7, [3, 4])})
    assert pages(exposition) == {"dense": 7 * 11, "compact": 22, "host": 43, "spare": 7}
    # The scheduler has freed request 3; the workers learn of it with a later step.
    exposition.observe({"scheduler": scheduler_snapshot(1, [4])})
    assert pages(exposition) == {"dense": 11, "compact": 1, "host": 2, "spare": 3}
    exposition.observe({**ranks, "scheduler": scheduler_snapshot(0, [])})
    assert pages(exposition) == dict.fromkeys(("dense", "compact", "host", "spare"), 0)


def test_workers_alone_hold_nothing_yet():
    exposition = Exposition()
    exposition.observe({"rank0": worker({3: PageCounts(10, 20, 2)}, drift_checks=4)})
    assert set(pages(exposition).values()) == {0}
    assert exposition.value("drift_checks_total") == 4


def test_snapshots_survive_vllms_message_format():
    import msgspec

    data = {
        "rank0": worker({3: PageCounts(1, 2, 3)}, rows={("dense", "short_prompt"): 2}),
        "scheduler": scheduler_snapshot(1, [3]),
    }
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(data))
    assert HeteroCacheStats(data=arrived).reduce() == HeteroCacheStats(data=data).reduce()


def test_snapshot_is_a_copy():
    counters = Counters()
    before = worker_snapshot(counters, {}, 1)
    counters.drift_checks += 1
    counters.decode_rows["dense", "short_prompt"] += 1
    assert before["drift_checks"] == 0 and before["decode_rows"] == {}


def test_joining_over_time_adds_counts_and_keeps_the_latest_pages():
    first = {"rank0": worker({3: PageCounts(9, 9, 9)}, drift_checks=1), "rank1": worker()}
    first["scheduler"] = scheduler_snapshot(8, [3, 4])
    later = {
        "rank0": worker({4: PageCounts(5, 6, 7)}, drift_checks=5),
        "scheduler": scheduler_snapshot(2, [4]),
    }
    joined = HeteroCacheStats(data=first).aggregate(HeteroCacheStats(data=later))
    assert joined.reduce() == {
        "heterocache_drift_checks": 6,
        "heterocache_pages_dense": 2 * 8,
        "heterocache_pages_compact": 5,
        "heterocache_pages_host": 6,
        "heterocache_pages_spare": 7,
    }
    assert joined.data.keys() == {"rank0", "rank1", "scheduler"}
    joined.reset()
    assert joined.is_empty()


def test_log_line_has_pages_held_and_what_was_counted_since_the_last_line():
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging

    logging = KVConnectorLogging(None)
    logging.connector_cls = HeteroConnector
    rows = {
        ("dense", "short_prompt"): 4,
        ("dense", "capture_limit"): 1,
        ("compact", "compacted"): 9,
    }
    logging.observe({"rank0": worker(drift_checks=1, fetches_late=1, pages_per_block=2)})
    logging.observe({"rank0": worker(drift_checks=2, pages_per_block=2, rows=rows)})
    data = {
        "rank1": worker(
            {8: PageCounts(1, 2, 3)},
            drift_checks=3,
            fetches_late=6,
            rows=rows,
            pages_per_block=2,
        ),
        "scheduler": scheduler_snapshot(5, [8]),
    }
    logging.observe(data)
    lines = []
    logging.log(lambda *args: lines.append(args[0] % args[1:]))
    (line,) = lines
    printed = dict(
        part.split("=") for part in line.removeprefix("KV Transfer metrics: ").split(", ")
    )
    assert printed == {
        "heterocache_drift_checks": "6",
        "heterocache_fetches_late": "7",
        "heterocache_pages_dense": "20",
        "heterocache_pages_compact": "1",
        "heterocache_pages_host": "2",
        "heterocache_pages_spare": "3",
        "heterocache_decode_rows_compact": "9",
        "heterocache_decode_rows_dense": "5",
    }
    logging.log(lambda *args: pytest.fail("printed twice"))
