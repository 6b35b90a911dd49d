"""The folder of one evaluation: its settings, its rows as they come in, and nothing twice.

run.json             what is evaluated; a resumed run must be the same
samples/NAME.jsonl   a row per sample of one configuration, appended when it is done
engines/NAME.json    what is known of one configuration's engine: versions, memory, counters
logs/NAME.log        what the engine printed
distributions/       next-token distributions, where the suite compares them
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.evaluation.distributions import Distributions
from vllm_heterocache.evaluation.sample import Sample, SuiteSettings

STOCK = "stock"
_IN_NAME = ("policy", "gpu_budget", "policy_options")  # where a configuration's name has them


@dataclass(frozen=True)
class Configuration:
    """One engine: `options` are those of heterocache, None is stock vLLM."""

    name: str
    options: dict[str, Any] | None

    @property
    def file_name(self) -> str:
        """The name as a file, and a few digits of the options so that no two are the same."""
        readable = re.sub(r"[^\w.=-]+", "_", self.name)[:80]
        text = json.dumps(self.options, sort_keys=True)
        return f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def stock() -> Configuration:
    return Configuration(STOCK, None)


def configuration(options: dict[str, Any]) -> Configuration:
    """Named by policy, budget and what else is set: "heterocache 0.5 recipe=paper".

    Of a profile's path the name has the last part, of the policy's own options each by itself.
    """
    policy, *words = variant(options).split(" ")
    budget = options.get("gpu_budget", HeteroCacheConfig.gpu_budget)
    return Configuration(" ".join([policy, f"{budget:g}", *words]), options)


def variant(options: dict[str, Any]) -> str:
    """A configuration's name without its budget: one line of a plot over budgets."""
    rest = {key: value for key, value in options.items() if key not in _IN_NAME}
    if "profile" in rest:
        rest["profile"] = Path(rest["profile"]).name
    rest |= options.get("policy_options", {})
    words = (f"{key}={value}" for key, value in sorted(rest.items()))
    return " ".join([options.get("policy", HeteroCacheConfig.policy), *words])


@dataclass(frozen=True)
class Run:
    """What is evaluated, apart from the configurations."""

    model: str
    suite: str
    settings: SuiteSettings
    llm: dict[str, Any]  # further arguments of vLLM's LLM
    batch: int  # samples that are in the engine at once

    def to_json(self) -> dict[str, Any]:
        data = self.settings.data
        values = asdict(self)
        values["settings"]["data"] = None if data is None else str(data)
        return json.loads(json.dumps(values))  # tuples as lists

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Run:
        settings = SuiteSettings(**values["settings"])
        settings = replace(
            settings,
            lengths=tuple(settings.lengths),
            tasks=None if settings.tasks is None else tuple(settings.tasks),
            data=None if settings.data is None else Path(settings.data),
        )
        return cls(**{**values, "settings": settings})


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, run: Run, resume: bool) -> None:
        """Write run.json, or check that the one there is of the same run.

        A run without any answer, such as one whose options the suite refused, is begun anew.

        Raises:
            ValueError: the folder holds a run that is not to be resumed, or another run.
        """
        file = self.path / "run.json"
        self.check_new(resume)
        for name in ("samples", "engines", "logs"):  # a copy of a run may lack logs
            (self.path / name).mkdir(parents=True, exist_ok=True)
        if not self._has_answers():
            file.write_text(json.dumps(run.to_json(), indent=1) + "\n")
            return
        there, wanted = json.loads(file.read_text()), run.to_json()
        for name in wanted:
            if there.get(name) != wanted[name]:
                raise ValueError(
                    f"--resume is refused: {name} was {there.get(name)} in {self.path} and is "
                    f"{wanted[name]} now; repeat the options of that run, or name another --out"
                )

    def check_new(self, resume: bool) -> None:
        """Raise ValueError where the folder holds a run that is not to be resumed."""
        if self._has_answers() and not resume:
            raise ValueError(
                f"--out {self.path} holds a run; add --resume to continue it, or name another "
                "folder"
            )

    def _has_answers(self) -> bool:
        return any(one.stat().st_size for one in (self.path / "samples").glob("*.jsonl"))

    def run(self) -> Run:
        return Run.from_json(json.loads((self.path / "run.json").read_text()))

    # --- samples ---

    def samples_file(self, configuration: Configuration) -> Path:
        return self.path / "samples" / f"{configuration.file_name}.jsonl"

    def rows(self, configuration: Configuration) -> dict[str, dict[str, Any]]:
        """Sample id -> its row. A last line that a killed run left half written does not count."""
        file = self.samples_file(configuration)
        lines = file.read_text().split("\n")[:-1] if file.is_file() else []
        return {row["id"]: row for row in map(json.loads, lines)}

    def append(self, configuration: Configuration, row: dict[str, Any]) -> None:
        with self.samples_file(configuration).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def repair(self, configuration: Configuration) -> None:
        """Cut off a half written last line, so that a row can follow."""
        file = self.samples_file(configuration)
        if file.is_file():
            content = file.read_text()
            file.write_text(content[: content.rfind("\n") + 1])

    # --- engines ---

    def log_file(self, configuration: Configuration) -> Path:
        return self.path / "logs" / f"{configuration.file_name}.log"

    def engine(self, configuration: Configuration) -> dict[str, Any] | None:
        """What `save_engine` was told last, or None."""
        file = self.path / "engines" / f"{configuration.file_name}.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def configurations(self) -> list[Configuration]:
        """All but stock whose engines noted their options, in the order of their names."""
        files = sorted((self.path / "engines").glob("*.json"))
        noted = [json.loads(file.read_text()).get("options") for file in files]
        return [configuration(options) for options in noted if options is not None]

    def save_engine(self, configuration: Configuration, facts: dict[str, Any]) -> None:
        file = self.path / "engines" / f"{configuration.file_name}.json"
        file.write_text(json.dumps(facts, indent=1) + "\n")

    # --- distributions ---

    def _distributions_file(self, configuration: Configuration, sample: Sample) -> Path:
        name = hashlib.sha256(sample.id.encode()).hexdigest()[:16]
        return self.path / "distributions" / configuration.file_name / f"{name}.npz"

    def save_distributions(
        self, configuration: Configuration, sample: Sample, values: Distributions
    ) -> None:
        import numpy as np

        file = self._distributions_file(configuration, sample)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, ids=values.ids, logprobs=values.logprobs, chosen=values.chosen)

    def load_distributions(self, configuration: Configuration, sample: Sample) -> Distributions:
        """Raises ValueError where there are none of this sample."""
        import numpy as np

        file = self._distributions_file(configuration, sample)
        if not file.is_file():
            raise ValueError(
                f"{configuration.name} has no distributions of {sample.id} in {self.path}; "
                "evaluate it again in a new --out"
            )
        with np.load(file) as values:
            return Distributions(values["ids"], values["logprobs"], values["chosen"])
