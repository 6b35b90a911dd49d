"""What the engine tests share: a real model, a long text, and stock vLLM's answers."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import preloaded
import pytest
import request_options
from engines import (
    CHAIN_FACTS,
    CHAIN_TOKENS,
    ON_GPU,
    chain_engine,
    run_chains,
    run_greedy,
)
from filelock import FileLock

# Of two processes of tests one calibrates in the first file, the longest. The other one asks stock
# vLLM in the second file, which needs no profile. So neither waits for what the other one makes.
FIRST = ("test_quality_gate.py", "test_full_budget.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.e2e)
        item.add_marker(pytest.mark.slow)
    places = set(ours)
    in_order = iter(sorted(ours, key=lambda item: _place(item.path.name)))
    items[:] = [next(in_order) if item in places else item for item in items]


def _place(name: str) -> int:
    return FIRST.index(name) if name in FIRST else len(FIRST)


@pytest.fixture(scope="module", autouse=True)
def _few_processes():
    """On a CPU engines that tests and calibrations start have one process instead of three, because
    importing vLLM takes half a minute on a small machine. `vllm serve` always has its own."""
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield


@pytest.fixture(scope="module")
def cpu_ranks():
    """Ranks that share the cores of this test, and that need not import vLLM."""
    from vllm.v1.executor import multiproc_executor

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setattr(multiproc_executor, "get_mp_context", preloaded.context)
        yield


@pytest.fixture(scope="session")
def model(request: pytest.FixtureRequest) -> str:
    """The 128K model where it was built, else the 8K model."""
    if os.environ.get("HETEROCACHE_TEST_MODEL_128K"):
        return request.getfixturevalue("long_model")
    return request.getfixturevalue("small_model")


@pytest.fixture(scope="session")
def tokenizer(model: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="session")
def haystack() -> str:
    from vllm_heterocache.evaluation.haystacks import prose

    return prose()


@pytest.fixture(scope="session")
def text_tokens(tokenizer, haystack):
    """`text_tokens(start, length)`: token ids of a piece of the haystack."""
    ids = tokenizer.encode(haystack, add_special_tokens=False)
    return lambda start, length: ids[start : start + length]


@pytest.fixture(scope="session")
def mixed_prompts(text_tokens) -> list[list[int]]:
    """Lengths around page and chunk borders; the last two share a prefix of 560."""
    lengths = (40, 333, 512, 513, 601, 575)
    prompts = [text_tokens(3000 * i, length) for i, length in enumerate(lengths)]
    shared = prompts[-1][:560]
    return [*prompts, shared + text_tokens(40000, 60), shared + text_tokens(50000, 99)]


@pytest.fixture(scope="session")
def chain(tokenizer, haystack):
    from vllm_heterocache.evaluation.chain import make_chain

    return make_chain(tokenizer, haystack, CHAIN_TOKENS, CHAIN_FACTS, seed=0)


@dataclass(frozen=True)
class StockAnswers:
    greedy: list  # completion of each mixed prompt
    chain: list[int]  # output tokens of the chain
    options: dict[str, Any]  # output of each request of request_options.py
    beams: list  # beams of the prompt for beam search, best first
    chat: Any  # completion of the conversation
    tool_call: Any  # the same where a call of the tool is asked for


@pytest.fixture(scope="session")
def stock(
    model: str, mixed_prompts, chain, text_tokens, tokenizer, haystack, shared_folder
) -> StockAnswers:
    """What unmodified vLLM says, on this machine. Its engine is gone when a test sees this.

    Of several processes of tests one asks vLLM, and the others read what it writes down.
    """

    def ask() -> StockAnswers:
        chat = request_options.chat_prompt(tokenizer, haystack)
        with chain_engine(model, None) as engine:
            return StockAnswers(
                greedy=run_greedy(engine, mixed_prompts),
                chain=run_chains(engine, [chain])[0],
                options=request_options.answer(engine, request_options.requests(text_tokens)),
                beams=request_options.beams(engine, request_options.beam_prompt(text_tokens)),
                chat=run_greedy(engine, [chat])[0],
                tool_call=engine.run([chat], request_options.tool_call())["0"].outputs[0],
            )

    of_all = shared_folder / "stock.pickle"
    with FileLock(f"{of_all}.lock"):
        if not of_all.exists():
            of_all.write_bytes(pickle.dumps(ask()))
        return pickle.loads(of_all.read_bytes())
