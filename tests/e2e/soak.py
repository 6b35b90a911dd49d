"""More than a hundred requests that come and go, and what an engine's process shows of itself.

The model is tiny and has random weights, so that the load costs minutes and not hours. Its queries
are scaled: attention is peaked, and asks for other pages with every random token.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import engines
import numpy as np

from common import profiles

SHAPE = dataclasses.replace(
    profiles.TINY,
    name="soak-shape",
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_tokens=8192,
    retrieval_pivots=(1, 1, 0, 0),
)
PEAKED = 6.0  # times the queries, so that few pages have most of the attention
SHARPNESS = 8.0  # of the next token's distribution, so that rounding does not decide
SHORTEST, LONGEST = 10, 6000
LENGTHS = ((SHORTEST, 600), (SHORTEST, 600), (600, LONGEST))  # each as likely
MAX_MODEL_LEN = LONGEST + 400
POOL_BLOCKS = 4 * -(-LONGEST // 16)
OPTIONS = {"gpu_budget": 0.5, "min_prompt_tokens": 256, "debug_poison": True}
MAX_ROWS = 96


def write_model(folder: Path) -> str:
    """Folder of the model, and of a profile in which all heads are alike."""
    profiles.write_weights(SHAPE, folder, {"q_proj": PEAKED, "lm_head": SHARPNESS})
    profile = profiles.retrieval_profile(SHAPE)
    alike = np.where(np.isnan(profile.similarity), np.nan, np.float32(0.9))
    dataclasses.replace(profile, similarity=alike).save(folder / "alike.json")
    return str(folder)


# --- what the clients do ---


@dataclass(frozen=True)
class Visit:
    """One request, and when its client comes and goes."""

    name: str
    at_s: float
    prompt: list[int]
    num_tokens: int
    num_answers: int = 1
    leaves_after_s: float | None = None  # without its answer, if it is not there by then
    leaves_after_tokens: int | None = None
    temperature: float = 0.0


def visits(count: int, per_second: float, seed: int, longest_answer: int) -> list[Visit]:
    """Poisson arrivals; every second prompt shares a prefix with others.

    The first half are prompts of 10 to 6,000 tokens with short answers. The second half are short
    prompts whose answers outgrow the pool together.
    """
    chance = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return [chance.randrange(SHAPE.vocab_size) for _ in range(length)]

    shared = [tokens(LONGEST) for _ in range(5)]
    lengths = [SHORTEST, LONGEST]
    lengths += [chance.randint(*chance.choice(LENGTHS)) for _ in range(count // 2 - 2)]
    lengths += [chance.randint(*LENGTHS[0]) for _ in range(count - len(lengths))]
    found, at_s = [], 0.0
    for index, length in enumerate(lengths):
        at_s += chance.expovariate(per_second)
        num_shared = chance.choice((0, chance.randint(0, length)))
        prompt = chance.choice(shared)[:num_shared] + tokens(length - num_shared)
        is_growing = index >= count // 2
        borders = (longest_answer // 2, longest_answer) if is_growing else (1, longest_answer // 4)
        found.append(Visit(f"{seed}.{index}", at_s, prompt, chance.randint(*borders)))
    return found


def impatient(plan: Sequence[Visit], seed: int) -> list[Visit]:
    """The same visits, of which every fifth ends early and every tenth wants several answers."""
    chance = random.Random(seed)
    found = []
    for visit in plan:
        leaves, several = chance.randrange(10), chance.randrange(10) == 0
        changed = dataclasses.replace(
            visit,
            num_answers=3 if several else 1,
            temperature=1.0 if several else chance.choice((0.0, 1.0)),
            leaves_after_s=chance.expovariate(0.15) if leaves == 0 else None,
            leaves_after_tokens=chance.randint(1, visit.num_tokens) if leaves == 1 else None,
        )
        found.append(changed)
    return found


@dataclass
class Answer:
    """What a client has when it goes."""

    outputs: dict[int, Any] = field(default_factory=dict)  # index -> vLLM's output so far
    has_left: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(len(one.token_ids) for one in self.outputs.values())


class Soak:
    """An engine in a process of its own, its clients, and who watches both."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.resident: list[int] = []  # bytes of the engine's process, at each look
        self.longest_wait_s = 0.0  # for any token of anybody
        self._waiting = 0  # clients
        self._progress = asyncio.get_running_loop().time()  # when a token came last

    async def call(self, method: str, *args: Any) -> Any:
        [result] = await self.llm.collective_rpc(method, args=args)
        return result

    async def serve(
        self, plan: Sequence[Visit], look_every_s: float, stall_s: float
    ) -> dict[str, Answer]:
        """All clients' answers by name.

        Raises AssertionError where clients wait and nobody gets a token for `stall_s` seconds, and
        where a page is lost.
        """
        watchers = [
            asyncio.create_task(self._watch(stall_s)),
            asyncio.create_task(self._look(look_every_s)),
        ]
        clients = [asyncio.create_task(self._visit(visit)) for visit in plan]
        everybody = asyncio.gather(*clients)
        try:
            await asyncio.wait([everybody, *watchers], return_when=asyncio.FIRST_COMPLETED)
            for watcher in watchers:
                if watcher.done():
                    watcher.result()
            answers = await everybody
        finally:
            for task in (*watchers, *clients):
                task.cancel()
            await asyncio.gather(*watchers, *clients, return_exceptions=True)
        return {visit.name: answer for visit, answer in zip(plan, answers, strict=True)}

    async def alone(self, visit: Visit, stall_s: float) -> Answer:
        """The answer while nobody else is there."""
        async with asyncio.timeout(stall_s):
            return await self._ask(visit, Answer())

    async def idle_state(self) -> dict[str, Any]:
        """What the engine shows of itself (`soak_state`) once its last step is behind it."""
        state: dict[str, Any] = {}
        for _ in range(20):
            before, state = state, await self.call("soak_state")
            if state == before:
                break
            await asyncio.sleep(0.5)
        processor = self.llm.output_processor
        for name in ("request_states", "parent_requests", "external_req_ids"):
            state["sizes"][f"output_processor.{name}"] = len(getattr(processor, name))
        return state

    async def _visit(self, visit: Visit) -> Answer:
        await asyncio.sleep(visit.at_s)
        answer = Answer()
        self._waiting += 1
        try:
            async with asyncio.timeout(visit.leaves_after_s):
                return await self._ask(visit, answer)
        except TimeoutError:
            answer.has_left = True
            return answer
        finally:
            self._waiting -= 1

    async def _ask(self, visit: Visit, answer: Answer) -> Answer:
        from vllm import SamplingParams

        # No seed: vLLM's CPU platform dies of one where a prompt is prefilled in chunks.
        params = SamplingParams(
            n=visit.num_answers,
            temperature=visit.temperature,
            max_tokens=visit.num_tokens,
            ignore_eos=True,
            logprobs=2,
            detokenize=False,
        )
        prompt = {"prompt_token_ids": visit.prompt}
        stream = self.llm.generate(prompt, params, visit.name)
        async with contextlib.aclosing(stream):
            async for output in stream:
                self._note_progress()
                answer.outputs |= {one.index: one for one in output.outputs}
                limit = visit.leaves_after_tokens
                if limit is not None and answer.num_tokens >= limit:
                    answer.has_left = True
                    break
        return answer

    def metrics(self) -> dict[str, float]:
        """The plugin's, and of vLLM's own those that the soak must have moved."""
        from vllm.v1.metrics.reader import get_metrics_snapshot

        snapshot = get_metrics_snapshot()
        own = ("vllm:num_preemptions", "vllm:prefix_cache_hits")
        return engines.plugin_metrics(snapshot) | {
            m.name: m.value for m in snapshot if m.name in own
        }

    def _note_progress(self) -> None:
        now = asyncio.get_running_loop().time()
        self.longest_wait_s = max(self.longest_wait_s, now - self._progress)
        self._progress = now

    async def _watch(self, stall_s: float) -> None:
        clock = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0.2)
            if not self._waiting:
                self._progress = clock.time()
            silence = clock.time() - self._progress
            assert silence < stall_s, f"{self._waiting} clients got nothing for {silence:.0f} s"

    async def _look(self, every_s: float) -> None:
        while True:
            self.resident.append(await self.call("soak_look"))
            await asyncio.sleep(every_s)


@contextlib.asynccontextmanager
async def start(model: str) -> AsyncIterator[Soak]:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model,
        skip_tokenizer_init=True,
        dtype=SHAPE.dtype,
        seed=0,
        enforce_eager=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=1024,
        max_num_seqs=MAX_ROWS,
        kv_cache_memory_bytes=(POOL_BLOCKS + 1) * SHAPE.block_bytes,
        attention_backend="heterocache",
        additional_config={"heterocache": OPTIONS | {"profile": f"{model}/alike.json"}},
        worker_extension_cls="soak_engine.WorkerExtension",
        scheduler_cls="soak_engine.Scheduler",
        distributed_executor_backend="soak_engine.Executor",
    )
    llm = AsyncLLM.from_engine_args(arguments)
    try:
        soak = Soak(llm)
        await soak.call("soak_touch")
        yield soak
    finally:
        llm.shutdown()
