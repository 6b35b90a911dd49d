"""vLLM engines in this process, so that tests can look at scheduler and worker after each step."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from request_options import WITHOUT_BLANKS

GIB = 1 << 30
CHAIN_TOKENS, CHAIN_FACTS = 2000, 8
MAX_MODEL_LEN = 6400
GREEDY_TOKENS = 24
ON_GPU = torch.cuda.is_available()
# Without bf16 instructions (AVX2 alone), bf16 products take seven times as long as fp32's.
DTYPE, ELEMENT_BYTES = ("bfloat16", 2) if ON_GPU else ("float32", 4)
BLOCK_BYTES = 2 * 16 * 3 * 64 * ELEMENT_BYTES * 30  # K and V, tokens, KV heads, head size, layers
# Where stock's two best tokens are this close, either is right. Logits of these models are 8 to 32:
# neighbours there are up to 0.125 apart in bf16, and sums in another order differ by 0.01 in fp32.
NEAR_TIE = 0.25 if ON_GPU else 0.02
# Drafts of every step: from the text so far
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
FORCED = "vllm_heterocache.evaluation.forced_tokens:ForcedTokens"


@dataclass
class Engine:
    """One LLM with its insides in reach."""

    llm: Any
    heterocache: bool
    check_every: int = 1  # steps; a check reads all page tables
    peak_running: int = 0
    num_preemptions: int = 0  # most that one request went through
    free_blocks: list[int] = field(default_factory=list)  # after each step of the last run

    @property
    def core(self):
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self):
        return self.core.scheduler

    @property
    def managers(self):
        """The manager that compacts, and vLLM's of the drafter's layers where there are any."""
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        return sorted(managers, key=lambda manager: not hasattr(manager, "ledger"))

    @property
    def manager(self):
        return self.managers[0]

    @property
    def worker(self):
        return self.core.model_executor.driver_worker.worker

    @property
    def runtime(self):
        return self.worker.heterocache

    @property
    def num_free(self) -> int:
        return self.manager.block_pool.get_num_free_blocks()

    def check_integrity(self) -> None:
        if self.heterocache:
            self.manager.check_integrity(*self.managers[1:])
            self.llm.collective_rpc("heterocache_check_integrity")  # of every rank

    def run(
        self,
        prompts: Sequence[Any],
        sampling: Any,
        on_step: Callable[[Engine, int], None] | None = None,
        adapters: Sequence[Any] | None = None,
    ) -> dict[str, Any]:
        """Generate for all prompts at once; every `check_every` steps check every invariant.

        Args:
            prompts: token ids, or vLLM's prompt with token ids and images.
            adapters: vLLM's LoRARequest of each prompt, or None.

        Returns:
            request id ("0", "1", ...) -> final output; aborted requests are missing.
        """
        engine = self.llm.llm_engine
        params = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
        adapters = adapters or [None] * len(prompts)
        for index, (prompt, one, adapter) in enumerate(zip(prompts, params, adapters, strict=True)):
            if not isinstance(prompt, dict):
                prompt = {"prompt_token_ids": prompt}
            engine.add_request(str(index), prompt, one, lora_request=adapter)
        finished: dict[str, Any] = {}
        self.peak_running, self.free_blocks = 0, []
        step = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    finished[output.request_id] = output
            if self.scheduler.requests:
                preempted = [r.num_preemptions for r in self.scheduler.requests.values()]
                self.num_preemptions = max(self.num_preemptions, *preempted)
            self.peak_running = max(self.peak_running, len(self.scheduler.running))
            self.free_blocks.append(self.num_free)
            if step % self.check_every == 0:
                self.check_integrity()
            step += 1
            if on_step is not None:
                on_step(self, step)
        while self.scheduler.has_requests():  # the workers hear of the last ones
            engine.step()
        return finished

    def metrics(self) -> dict[str, float]:
        return plugin_metrics(self.llm.get_metrics())

    def drafts(self) -> dict[str, float]:
        """vLLM's counts of speculative decoding: draft_tokens, accepted_tokens and more."""
        prefix = "vllm:spec_decode_num_"
        return {
            metric.name.removeprefix(prefix): metric.value
            for metric in self.llm.get_metrics()
            if metric.name.startswith(prefix) and hasattr(metric, "value")
        }


def plugin_metrics(metrics: Iterable[Any]) -> dict[str, float]:
    """The plugin's among vLLM's metrics, as `name{labels}` without the model and engine labels."""
    values = {}
    for metric in metrics:
        if "heterocache" in metric.name:
            labels = {k: v for k, v in metric.labels.items() if k in ("kind", "reason")}
            text = ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
            values[metric.name.removeprefix("vllm:heterocache_") + f"{{{text}}}"] = metric.value
    return values


_KEPT: list[Any] = []


def spare_collections() -> None:
    """Call this before an engine starts: vLLM collects garbage five times meanwhile, and what was
    imported need not be looked through each time, for more than a second. It unfreezes when the
    engine ends."""
    gc.freeze()


@contextlib.contextmanager
def start(
    model: str, options: dict[str, Any] | None = None, is_last: bool = False, **kwargs: Any
) -> Iterator[Engine]:
    """An engine in this process: HeteroCache with `options`, or stock vLLM where None.

    `is_last`: the process ends next, and nothing is collected before. Collecting an engine of
    several ranks can wait for ever for the sockets that vLLM left open.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory

        if options is not None:
            kwargs |= {
                "attention_backend": "heterocache",
                "additional_config": {"heterocache": options},
            }
        settings = {
            "dtype": DTYPE,
            "enforce_eager": True,
            "disable_log_stats": False,
            "kv_cache_memory_bytes": GIB,
            "max_num_seqs": 32,
            "seed": 0,
        }
        if ON_GPU:
            settings["gpu_memory_utilization"] = 0.2  # other tests' engines may be there
        spare_collections()
        engine = Engine(LLM(model, **(settings | kwargs)), heterocache=options is not None)
        try:
            yield engine
        finally:
            engine.llm.llm_engine.engine_core.shutdown()
            if is_last:
                gc.disable()
                _KEPT.append(engine.llm)
            else:
                # the test still holds `engine`, and the GPU's memory through it
                engine.llm = None
                cleanup_dist_env_and_memory()  # collects


def chain_engine(model: str, options: dict[str, Any] | None, **kwargs: Any):
    """An engine that can run chains, the mixed prompts and the requests of request_options.py."""
    return start(
        model,
        options,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=512,
        logits_processors=[FORCED],
        # those that tokens are chosen by, with penalties and grammars
        logprobs_mode="processed_logprobs",
        structured_outputs_config=WITHOUT_BLANKS,
        **kwargs,
    )


def run_chains(engine, chains) -> list[list[int]]:
    """Output token ids of each chain."""
    from vllm import SamplingParams

    params = [SamplingParams(**chain.sampling_kwargs()) for chain in chains]
    outputs = engine.run([chain.prompt for chain in chains], params)
    return [list(outputs[str(i)].outputs[0].token_ids) for i in range(len(chains))]


def num_right(chains, outputs: list[list[int]]) -> int:
    """Right answers of all chains."""
    return sum(sum(chain.correct(output)) for chain, output in zip(chains, outputs, strict=True))


def run_greedy(engine, prompts: list[list[int]]):
    """Greedy completions with the two best log-probabilities of each token."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=GREEDY_TOKENS, logprobs=2, ignore_eos=True)
    outputs = engine.run(prompts, params)
    return [outputs[str(i)].outputs[0] for i in range(len(prompts))]


def assert_same_greedy_tokens(tokens: Sequence[int], stock: Any, near_tie: float = NEAR_TIE) -> int:
    """Compare token by token up to the first near tie; return how many were compared."""
    for position, (token, expected) in enumerate(zip(tokens, stock.token_ids, strict=True)):
        if token == expected:
            continue
        best, second = sorted(e.logprob for e in stock.logprobs[position].values())[-1:-3:-1]
        assert best - second <= near_tie + 1e-4, (
            f"token {position} differs where stock was sure: {token} for {expected}, "
            f"gap {best - second:.3f}"
        )
        return position
    return len(stock.token_ids)


def assert_same_completions(
    ours: Sequence[Any], stock: Sequence[Any], near_tie: float = NEAR_TIE
) -> None:
    """Compare completions one by one, and find most of their tokens before a near tie."""
    pairs = list(zip(ours, stock, strict=True))
    compared = sum(
        assert_same_greedy_tokens(one.token_ids, other, near_tie) for one, other in pairs
    )
    assert compared > 0.6 * sum(len(other.token_ids) for _, other in pairs)
