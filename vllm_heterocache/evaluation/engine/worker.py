"""One configuration of an evaluation, in a process of its own.

usage: python -m vllm_heterocache.evaluation.engine.worker FOLDER CONFIGURATION-JSON
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.evaluation.engine.session import Answer, EvalSession, VllmSession
from vllm_heterocache.evaluation.provenance import provenance
from vllm_heterocache.evaluation.run_folder import Configuration, Run, RunFolder, stock
from vllm_heterocache.evaluation.sample import DistributionSuite, QuestionSuite, Sample, Suite
from vllm_heterocache.evaluation.suites import make_suite
from vllm_heterocache.policies import make_policy

# Of the run, the configuration, the longest sequence in tokens, and how many log-probabilities.
OpenSession = Callable[[Run, Configuration, int, int | None], EvalSession]
BY_LENGTH = ("resident", "reads", "steps")  # of a session's facts
PARENT_POLL_S = 1.0
MAX_TEXT = 2000  # characters of a free output that are kept


def run_configuration(
    folder: RunFolder,
    configuration: Configuration,
    tokenizer: Any,
    open_session: OpenSession,
    suite: Suite | None = None,
) -> None:
    """Answer and score the samples that are not in the folder yet; no engine if there are none.

    Args:
        suite: instead of the one that the run names.
    """
    run = folder.run()
    suite = suite or make_suite(run.suite)
    samples = list(suite.samples(tokenizer, run.settings))
    _check(samples, run)
    folder.repair(configuration)
    done = folder.rows(configuration)
    for sample in samples:
        if sample.id in done and done[sample.id]["prompt"] != prompt_digest(sample):
            raise ValueError(
                f"sample {sample.id} in {folder.path} has another prompt than this version of the "
                "suite and the tokenizer give it; name another --out"
            )
    missing = [sample for sample in samples if sample.id not in done]
    facts: dict[str, Any] = {"resident": {}, "reads": {}, "steps": {}, "seconds": {}}
    facts |= folder.engine(configuration) or {}
    facts |= {"samples": len(samples), "options": configuration.options}
    folder.save_engine(configuration, facts)
    if not missing:
        return
    top_k = max((sample.top_k for sample in samples if sample.top_k), default=None)
    longest = max(len(sample.prompt) + sample.max_tokens for sample in samples)
    session = open_session(run, configuration, longest, top_k)
    try:
        for group in _batches(missing, run.batch):
            started = time.perf_counter()
            for answer in session.answers(group):
                row = _score(folder, configuration, suite, answer)
                folder.append(configuration, row)
            length, now = str(group[0].length), session.facts()
            seconds = facts["seconds"].get(length, 0.0) + time.perf_counter() - started
            facts["seconds"][length] = seconds
            # lengths that an earlier session has answered keep what it saw
            by_length = {name: facts[name] | now[name] for name in BY_LENGTH}
            facts |= {**now, **provenance(), **by_length}
            folder.save_engine(configuration, facts)
    finally:
        session.close()


def _batches(samples: list[Sample], size: int) -> list[list[Sample]]:
    """At most `size` samples of one length each; lengths and their samples in the order given.

    Tasks share batches, so that few samples of many tasks fill them too.
    """
    of_length: dict[int, list[Sample]] = {}
    for sample in samples:
        of_length.setdefault(sample.length, []).append(sample)
    groups = of_length.values()
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def _check(samples: list[Sample], run: Run) -> None:
    if not samples:
        raise ValueError(
            f"suite {run.suite} has no samples at these options; look at --tasks, --lengths, "
            "--samples and --data"
        )
    if len({sample.id for sample in samples}) < len(samples):
        raise ValueError(f"suite {run.suite} gives two samples the same id")


def _score(
    folder: RunFolder, configuration: Configuration, suite: Suite, answer: Answer
) -> dict[str, Any]:
    """The row of one answer. Distributions are compared with stock's of the same folder.

    Raises:
        TypeError: there are distributions and the suite is no DistributionSuite.
    """
    sample = answer.sample
    row: dict[str, Any] = {
        "id": sample.id,
        "task": sample.task,
        "length": sample.length,
        "prompt": prompt_digest(sample),
        "prompt_tokens": len(sample.prompt),
        "output_tokens": len(answer.tokens),
        "scores": suite.score(sample, answer.tokens, answer.text),
    }
    if "depth" in sample.meta:
        row["depth"] = sample.meta["depth"]
    if isinstance(suite, QuestionSuite):
        row["right"] = suite.right(sample, answer.tokens)
    if sample.ends_freely:
        row["text"] = answer.text[:MAX_TEXT]
    if answer.distributions is not None:
        if not isinstance(suite, DistributionSuite):
            raise TypeError(
                f"suite {suite.name} gives samples a top_k and has no score_distributions(); add it"
            )
        own = full = answer.distributions
        if configuration.options is None:
            folder.save_distributions(configuration, sample, own)
        else:
            full = folder.load_distributions(stock(), sample)
        row["scores"] |= suite.score_distributions(full, own)
    return row


def prompt_digest(sample: Sample) -> str:
    """Equal for equal prompts and forced tokens."""
    text = json.dumps([sample.prompt, sample.forced])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def open_vllm(
    run: Run, configuration: Configuration, longest: int, top_k: int | None
) -> VllmSession:
    """An engine for sequences of `longest` tokens; eager where there is no GPU, to start faster,
    and where CUDA graphs cannot hold the policy's steps."""
    from vllm_heterocache.compat import current_platform

    # Asked of vLLM: torch's own question would keep a forked engine from using CUDA.
    is_eager = current_platform.is_cpu() or not is_graphed(configuration)
    llm: dict[str, Any] = {"enforce_eager": is_eager}
    if top_k is not None:
        llm["max_logprobs"] = top_k
    return VllmSession(run.model, configuration.options, longest, llm | run.llm)


def is_graphed(configuration: Configuration) -> bool:
    """Whether CUDA graphs can hold the decode steps of a configuration."""
    if configuration.options is None:
        return True
    config = HeteroCacheConfig.from_additional_config({"heterocache": configuration.options})
    return make_policy(config).is_graphed


def load_tokenizer(model: str, llm: dict[str, Any]) -> Any:
    """The tokenizer of a model that vLLM's LLM() loads with these arguments."""
    from transformers import AutoTokenizer

    names = ("revision", "trust_remote_code")
    options = {name: llm[name] for name in names if name in llm}
    return AutoTokenizer.from_pretrained(llm.get("tokenizer", model), **options)


def end_with_parent() -> None:
    """End this process and its engine's soon after its parent, however that was killed.

    Else they would go on writing into the folder beside those of a resumed run. A process that the
    runner starts leads a group of its own.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        os.killpg(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    end_with_parent()
    folder = RunFolder(Path(sys.argv[1]))
    configuration = Configuration(**json.loads(sys.argv[2]))
    run = folder.run()
    run_configuration(folder, configuration, load_tokenizer(run.model, run.llm), open_vllm)
    return 0


if __name__ == "__main__":
    sys.exit(main())
