"""One vLLM engine that answers samples, and what it holds in its KV pool meanwhile."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vllm_heterocache.evaluation.distributions import Distributions
from vllm_heterocache.evaluation.engine.turns import Conversation
from vllm_heterocache.evaluation.sample import Sample

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE_SIZE = 16
# The pool is looked at in steps in which every request in the engine has this many output tokens:
# by then all are compacted, and nothing is prefilled.
SETTLED_TOKENS = 4
LOOK_EVERY = 4  # of those steps
PREFIX = "vllm:heterocache_"


@dataclass(frozen=True)
class Answer:
    """The engine's output for one sample."""

    sample: Sample
    tokens: list[int]
    text: str
    distributions: Distributions | None = None


class EvalSession(Protocol):
    """What the runner needs of an engine; the tests have one without vLLM."""

    def answers(self, samples: list[Sample]) -> Iterator[Answer]:
        """All samples at once, each answer as soon as it is complete. They are of one length."""
        ...

    def facts(self) -> dict[str, Any]:
        """What was noted so far, JSON-able.

        By prompt length `resident` (Residency.summary), `reads` (Reads.summary) and `steps`
        (Steps.summary); of the plugin `counters`, `block_bytes` (KV of a block, tables for it) and
        `roles` (a string a layer).
        """
        ...

    def close(self) -> None: ...


@dataclass
class Residency:
    """KV on the GPU and in host memory against what the same tokens take in full.

    table_share: bytes of the plugin's tables over those of the KV that they describe.
    num_heads: KV heads of all layers that are served.
    """

    table_share: float = 0.0
    num_heads: int = 0
    shares: list[float] = field(default_factory=list)
    host_shares: list[float] = field(default_factory=list)

    def look(self, used_tokens: float, lengths: list[int], host_pages: float = 0) -> None:
        """Note one moment.

        Args:
            used_tokens: token slots of the pool's blocks that are in use.
            lengths: tokens of each request so far, prompt and output.
            host_pages: in host memory, each of one head; 0 where `num_heads` is.
        """
        full = sum(-(-length // PAGE_SIZE) for length in lengths)
        self.shares.append(used_tokens / PAGE_SIZE / full)
        self.host_shares.append(host_pages / (full * max(self.num_heads, 1)))

    def summary(self) -> dict[str, float | int | None]:
        """share: mean over the moments, generated tokens included, None without a moment;
        with_tables: the same with the tables' bytes; host: mean share in host memory."""
        mean = float(np.mean(self.shares)) if self.shares else None
        worst = max(self.shares) if self.shares else None
        return {
            "share": mean,
            "with_tables": None if mean is None else mean * (1 + self.table_share),
            "highest_share": worst,
            "host": float(np.mean(self.host_shares)) if self.host_shares else None,
            "moments": len(self.shares),
        }


@dataclass
class Reads:
    """Pages that decode rows read, were fetched for them, and would have been read in full."""

    read: int = 0
    fetched: int = 0
    dense: int = 0

    def add(self, before: dict[str, int], after: dict[str, int]) -> None:
        """Note what the plugin's counters moved by."""
        self.read += after["decode_pages_read"] - before["decode_pages_read"]
        self.fetched += after["pages_fetched"] - before["pages_fetched"]
        self.dense += after["decode_pages_dense"] - before["decode_pages_dense"]

    def summary(self) -> dict[str, float | int | None]:
        """share: pages read, over dense; fetched: pages copied from the host, over dense."""
        pages = {"share": self.read, "fetched": self.fetched}
        shares = {name: n / self.dense if self.dense else None for name, n in pages.items()}
        return shares | {"dense_pages": self.dense}


@dataclass
class Steps:
    """How long decode steps take, as the process that asks for them sees it."""

    milliseconds: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float | int | None]:
        """median_ms: of the steps in which every request decodes; None without one."""
        median = float(np.median(self.milliseconds)) if self.milliseconds else None
        return {"median_ms": median, "steps": len(self.milliseconds)}


class VllmSession:
    """LLM() in this process; its engine core is a process of its own, as vLLM likes it."""

    def __init__(
        self, model: str, options: dict[str, Any] | None, max_model_len: int, llm: dict[str, Any]
    ) -> None:
        from vllm_heterocache.compat import LLM

        extra: dict[str, Any] = {}
        if options is not None:
            extra["attention_backend"] = "heterocache"
            extra["additional_config"] = {"heterocache": options}
        defaults: dict[str, Any] = {
            "max_model_len": max_model_len,
            "disable_log_stats": False,
            "enable_prefix_caching": False,
            "seed": 0,
            "logits_processors": ["vllm_heterocache.evaluation.forced_tokens:ForcedTokens"],
        }
        self.llm = LLM(model, **(defaults | llm | extra))
        cache = self.llm.llm_engine.vllm_config.cache_config
        assert cache.num_gpu_blocks is not None, "the engine has started"
        self._pool_tokens = (cache.num_gpu_blocks - 1) * cache.block_size  # block 0 is unused
        self._residency: dict[int, Residency] = {}  # by the samples' length
        self._reads: dict[int, Reads] = {}
        self._steps: dict[int, Steps] = {}
        self._plugin = {} if options is None else plugin_facts(self.llm)

    def answers(self, samples: list[Sample]) -> Iterator[Answer]:
        length = samples[0].length
        before = self._counters() if self._plugin else {}
        at_once = [sample for sample in samples if not sample.in_turns]
        yield from self._run(at_once, length)
        in_turns = [Conversation(sample) for sample in samples if sample.in_turns]
        yield from self._converse(in_turns, length)
        if self._plugin:
            self._reads.setdefault(length, Reads()).add(before, self._counters())

    def _residency_of(self, length: int) -> Residency:
        kv, tables = self._plugin.get("block_bytes", (1, 0))
        num_heads = sum(map(len, self._plugin.get("roles", [])))
        return self._residency.setdefault(length, Residency(tables / kv, num_heads))

    def _run(self, samples: list[Sample], length: int) -> Iterator[Answer]:
        engine, residency = self.llm.llm_engine, self._residency_of(length)
        steps = self._steps.setdefault(length, Steps())
        by_id = {sample.id: sample for sample in samples}
        for sample in samples:
            prompt: Any = {"prompt_token_ids": sample.prompt}
            engine.add_request(sample.id, prompt, _sampling_params(sample))
        num_output = dict.fromkeys(by_id, 0)
        settled_steps = 0
        while engine.has_unfinished_requests():
            done, was_settled = [], min(num_output.values()) >= SETTLED_TOKENS
            started = time.perf_counter()
            outputs: list[Any] = engine.step()
            if was_settled:
                steps.milliseconds.append(1000 * (time.perf_counter() - started))
            for output in outputs:
                num_output[output.request_id] = len(output.outputs[0].token_ids)
                if output.finished:
                    done.append(output)
            if not done and min(num_output.values()) >= SETTLED_TOKENS:
                settled_steps += 1
                if settled_steps % LOOK_EVERY == 1:
                    lengths = [len(by_id[i].prompt) + n for i, n in num_output.items()]
                    residency.look(*self._kv_in_use(lengths))
            for output in done:
                del num_output[output.request_id]
                yield _answer(by_id[output.request_id], output.outputs[0])

    def _converse(self, conversations: list[Conversation], length: int) -> Iterator[Answer]:
        """Turn by turn, the same turn of all at once."""
        by_id = {one.sample.id: one for one in conversations}
        while by_id:
            turns = {name: one.next_turn() for name, one in by_id.items()}
            for name in [name for name, turn in turns.items() if turn is None]:
                one = by_id.pop(name)
                yield Answer(one.sample, one.tokens, one.text)
            for answer in self._run([turn for turn in turns.values() if turn], length):
                by_id[answer.sample.id].take(answer.tokens, answer.text)

    def _kv_in_use(self, lengths: list[int]) -> tuple[float, list[int], float]:
        """What `Residency.look` takes: `lengths` with what the pools hold of them now."""
        metrics: list[Any] = self.llm.get_metrics()
        usage = sum(m.value for m in metrics if m.name == "vllm:kv_cache_usage_perc")
        pages = [m for m in metrics if m.name == f"{PREFIX}pages"]
        host = sum(m.value for m in pages if m.labels["kind"] == "host")
        return usage * self._pool_tokens, lengths, host

    def facts(self) -> dict[str, Any]:
        resident = {str(length): r.summary() for length, r in self._residency.items()}
        reads = {str(length): r.summary() for length, r in self._reads.items()}
        steps = {str(length): s.summary() for length, s in self._steps.items()}
        by_length = {"resident": resident, "reads": reads, "steps": steps}
        return by_length | {"counters": self._counters()} | self._plugin

    def _counters(self) -> dict[str, int]:
        """The plugin's; {} of stock vLLM."""
        counters: dict[str, int] = {}
        metrics: list[Any] = self.llm.get_metrics()
        for metric in metrics:
            name = metric.name.removeprefix(PREFIX)
            if name != metric.name and name != "pages":
                counters[name] = counters.get(name, 0) + metric.value
        return counters

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def plugin_facts(llm: Any) -> dict[str, Any]:
    """What the workers say when they have started, over all ranks: `block_bytes` and `roles`."""
    from vllm_heterocache.heads.assignment import HeadRole

    kv, tables = zip(*llm.collective_rpc("heterocache_block_bytes"), strict=True)
    roles: dict[int, dict[int, str]] = {}
    for layers, heads, of_rank in llm.collective_rpc("heterocache_head_roles"):
        for layer, row in zip(layers, of_rank, strict=True):
            letters = (HeadRole(role).name[0] for role in row)
            roles.setdefault(layer, {}).update(zip(heads, letters, strict=True))
    lines = ["".join(row[head] for head in sorted(row)) for _, row in sorted(roles.items())]
    return {"block_bytes": [sum(kv), sum(tables)], "roles": lines}


def _sampling_params(sample: Sample) -> Any:
    from vllm_heterocache.compat import SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=sample.max_tokens,
        ignore_eos=not sample.ends_freely,
        stop=list(sample.stop) or None,
        logprobs=sample.top_k,
        detokenize=sample.top_k is None,
        extra_args=None if sample.forced is None else {"forced_tokens": sample.forced},
    )


def _answer(sample: Sample, output: Any) -> Answer:
    tokens = list(output.token_ids)
    if sample.top_k is None:
        return Answer(sample, tokens, output.text)
    return Answer(sample, tokens, "", distributions_of(tokens, output.logprobs, sample.top_k))


def distributions_of(tokens: list[int], steps: list[dict[int, Any]], top_k: int) -> Distributions:
    """vLLM's log-probabilities as arrays.

    Args:
        tokens: output tokens.
        steps: for each of them, token -> object with `logprob` and `rank` (1 is the likeliest),
            for the `top_k` likeliest tokens and for the one that was taken.
    """
    ids = np.zeros((len(tokens), top_k), np.int32)
    logprobs = np.full((len(tokens), top_k), -np.inf, np.float32)
    chosen = np.zeros(len(tokens), np.float32)
    for row, (token, known) in enumerate(zip(tokens, steps, strict=True)):
        best = sorted(known.items(), key=lambda item: (-item[1].logprob, item[0]))[:top_k]
        ids[row] = [found for found, _ in best]
        logprobs[row] = [value.logprob for _, value in best]
        chosen[row] = known[token].logprob
    return Distributions(ids, logprobs, chosen)
