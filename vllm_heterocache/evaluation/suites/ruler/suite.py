"""The suite `ruler`: RULER's 13 tasks, generated here (QA from local files).

Source: Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models?,
arXiv 2404.06654. Tasks, prompts and metrics are RULER's; these differ: a length is that of the
prompt (RULER counts the tokens to generate in), every sample is fitted to it, prose is Python's
reference unless --data has RULER's PaulGrahamEssays.json, and words come from other lists.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from vllm_heterocache.evaluation.local_data import data_folder
from vllm_heterocache.evaluation.prompt import PromptFrame, largest_fitting, make_frame
from vllm_heterocache.evaluation.prose import Prose, load_prose
from vllm_heterocache.evaluation.sample import Sample, SuiteSettings
from vllm_heterocache.evaluation.suite_options import choose_tasks, read_options
from vllm_heterocache.evaluation.suites.ruler.lists import (
    CommonWords,
    FrequentWords,
    VariableTracking,
)
from vllm_heterocache.evaluation.suites.ruler.needles import Niah
from vllm_heterocache.evaluation.suites.ruler.qa import FILES, load_qa
from vllm_heterocache.evaluation.text_metrics import string_match_all, string_match_part

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_heterocache.evaluation.suites.ruler.task import Drawn, RulerTask

GENERATED: dict[str, RulerTask] = {  # synthetic.yaml of RULER
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("prose"),
    "niah_single_3": Niah("prose", values="uuids"),
    "niah_multikey_1": Niah("prose", num_keys=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Niah("prose", num_values=4),
    "niah_multiquery": Niah("prose", num_keys=4, num_queries=4),
    "vt": VariableTracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
}
TASKS = (*GENERATED, *FILES)


class RulerSuite:
    """RULER at any length. --set chat=true asks in the model's chat template.

    The metric `score` is the share of the answers found in the output, for QA whether one is.
    """

    name = "ruler"

    def samples(self, tokenizer: Any, settings: SuiteSettings) -> Iterator[Sample]:
        """Task by task, length by length; without --tasks, QA only where --data has its files."""
        options = read_options(self.name, settings, {"chat": False})
        tasks = _load_tasks(settings)
        frame = make_frame(tokenizer, options["chat"])
        prose = load_prose(settings.data)
        for name, task in tasks.items():
            for length in settings.lengths:
                for index in range(settings.num_samples):
                    seed = f"{settings.seed}.{index}"
                    yield _make_sample(frame, prose, name, task, length, seed)

    def score(self, sample: Sample, tokens: list[int], text: str) -> dict[str, float]:
        match = string_match_part if sample.meta["any_answer"] else string_match_all
        return {"score": match(text, sample.meta["answers"])}


def _load_tasks(settings: SuiteSettings) -> dict[str, RulerTask]:
    present = [name for name in FILES if settings.data and (settings.data / FILES[name]).is_file()]
    chosen = choose_tasks("ruler", settings, TASKS, [*GENERATED, *present])
    tasks: dict[str, RulerTask] = {}
    for name in chosen:
        if name in FILES:
            folder = data_folder("ruler", settings, f"{FILES[name]} for --tasks {name}")
            tasks[name] = load_qa(name, folder)
        else:
            tasks[name] = GENERATED[name]
    return tasks


def _make_sample(
    frame: PromptFrame, prose: Prose, name: str, task: RulerTask, length: int, seed: str
) -> Sample:
    """The largest prompt of the task within `length` tokens."""

    def draw(size: int) -> Drawn:
        return task.draw(random.Random(f"{name} {length} {seed}"), size, length, prose)

    def ids(drawn: Drawn) -> list[int]:
        return frame.ids(drawn.text, drawn.answer_prefix)

    size = largest_fitting(
        lambda size: len(ids(draw(size))), length, task.least(length), f"--tasks {name}"
    )
    drawn = draw(size)
    return Sample(
        id=f"ruler/{name}/{length}/{seed}",
        prompt=ids(drawn),
        max_tokens=task.max_tokens,
        meta={
            "task": name,
            "length": length,
            "answers": drawn.answers,
            "any_answer": task.any_answer,
            "size": size,
        },
    )
