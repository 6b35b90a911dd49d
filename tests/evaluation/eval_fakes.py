"""An evaluation without vLLM: a tokenizer, a suite and an engine that fit in the head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_heterocache.evaluation.engine.session import Answer
from vllm_heterocache.evaluation.run_folder import Configuration, Run
from vllm_heterocache.evaluation.sample import Sample, SuiteSettings


class Characters:
    """One token per character."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(character) for character in text]


class EchoSuite:
    """The answer to a prompt is its last token; with `questions`, that many times."""

    name = "echo"

    def __init__(self, questions: int = 0) -> None:
        if questions:
            self.right = lambda sample, tokens: [t == sample.prompt[-1] for t in tokens[:questions]]

    def samples(self, tokenizer, settings: SuiteSettings):
        for task in settings.tasks or ("echo",):
            for length in settings.lengths:
                for i in range(settings.num_samples):
                    meta = {"task": task, "length": length, "depth": i / 4}
                    yield Sample(f"{task}-{length}-{i}", [7] * length + [i], 6, meta=meta)

    def score(self, sample, tokens, text):
        return {"score": float(tokens[0] == sample.prompt[-1]), "tokens": float(len(tokens))}


@dataclass
class FakeEngines:
    """`open` is an OpenSession; a session answers wrongly where `wrong(configuration, sample)`."""

    wrong: Any = lambda configuration, sample: False
    fail_after: int | None = None  # answers of a session, then it raises
    opened: list[str] = field(default_factory=list)
    closed: int = 0
    asked: list[list[str]] = field(default_factory=list)
    longest: int = 0

    def open(self, run: Run, configuration: Configuration, longest: int, top_k: int | None):
        self.opened.append(configuration.name)
        self.longest = longest
        return FakeSession(self, configuration)


@dataclass
class FakeSession:
    engines: FakeEngines
    configuration: Configuration
    answered: int = 0
    lengths: set[int] = field(default_factory=set)

    def answers(self, samples):
        self.engines.asked.append([sample.id for sample in samples])
        (length,) = {sample.length for sample in samples}
        self.lengths.add(length)
        for sample in reversed(samples):  # as they complete, not as they were asked
            if self.answered == self.engines.fail_after:
                raise RuntimeError("out of memory")
            self.answered += 1
            token = sample.prompt[-1] + self.engines.wrong(self.configuration, sample)
            yield Answer(sample, [token] * sample.max_tokens, "text")

    def facts(self):
        budget = (self.configuration.options or {}).get("gpu_budget", 1.0)
        resident = {"share": budget + 0.01, "with_tables": budget + 0.015, "moments": 5}
        resident |= {"highest_share": budget + 0.02, "host": 0.0}
        facts = {"resident": resident, "steps": {"median_ms": 2.5, "steps": 20}}
        if self.configuration.options is not None:
            resident["host"] = budget / 2
            facts["reads"] = {"share": budget + 0.03, "fetched": 0.002, "dense_pages": 900}
        facts = {name: dict.fromkeys(map(str, self.lengths), v) for name, v in facts.items()}
        plugin = {"counters": {"drift_checks": 3}}
        if self.configuration.options is not None:
            plugin |= {"block_bytes": [400, 2], "roles": ["PS", "SA", "VP"]}
        return {"reads": {}} | facts | plugin

    def close(self):
        self.engines.closed += 1


def echo_run(**settings: Any) -> Run:
    batch = settings.pop("batch", 3)
    values = {"lengths": (20, 40), "num_samples": 4} | settings
    return Run("org/fake", "echo", SuiteSettings(**values), {}, batch)
