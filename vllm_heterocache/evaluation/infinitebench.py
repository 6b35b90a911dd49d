"""The suite `infinitebench`: InfiniteBench's English tasks from local files.

Source: arXiv 2402.13718; see infinitebench_tasks.py. --data is the folder of the data set
xinrongzhang2022/InfiniteBench: one JSON Lines file per task with the fields id, context, input,
answer (a value or a list) and options.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from vllm_heterocache.evaluation.infinitebench_tasks import TASKS
from vllm_heterocache.evaluation.local_data import Row, data_folder, draw, find_file, read_rows
from vllm_heterocache.evaluation.prompt import make_frame
from vllm_heterocache.evaluation.sample import Sample, SuiteSettings
from vllm_heterocache.evaluation.suite_options import choose_tasks, read_options

LAYOUT = "the JSON Lines files of the data set InfiniteBench, such as passkey.jsonl"
FILES = f"{LAYOUT}, of all tasks or of those named by --tasks"
CHOICES = {  # and how their prompts end
    "longbook_choice_eng": "\n\nThe letter of the correct answer is",
    "code_debug": "\n\nThe correct option is:",
}
DEFAULT = [name for name in TASKS if name != "math_calc"]  # it generates 30,000 tokens a sample


class InfiniteBenchSuite:
    """--set chat=true puts the prompt in the model's chat template.

    Without it, the end of a choice's prompt is forced in decode: else its letter would be the
    prefill's, with full attention, in every configuration.

    Prompts longer than a length are cut in the middle to it. Without --tasks, all English tasks
    but math_calc.
    """

    name = "infinitebench"

    def samples(self, tokenizer: Any, settings: SuiteSettings) -> Iterator[Sample]:
        options = read_options(self.name, settings, {"chat": False})
        names = choose_tasks(self.name, settings, list(TASKS), DEFAULT)
        folder = data_folder(self.name, settings, LAYOUT)
        frame = make_frame(tokenizer, options["chat"])
        files = {name: find_file(folder, [f"{name}.jsonl"], FILES) for name in names}
        for name, path in files.items():
            rows = read_rows(path, ["context", "input", "answer"])
            for length in settings.lengths:
                for index, row in draw(rows, settings.num_samples, settings.seed, name):
                    text = TASKS[name].prompt.format(**_fields(name, row))
                    end = "" if options["chat"] else CHOICES.get(name, "")
                    prompt, cut = frame.truncated(text.removesuffix(end), "", length)
                    forced = frame.encode(end)
                    yield Sample(
                        id=f"infinitebench/{name}/{length}/{index}",
                        prompt=prompt,
                        max_tokens=len(forced) + TASKS[name].max_tokens,
                        forced=forced or None,
                        meta={
                            "task": name,
                            "length": length,
                            "answers": _answers(name, row),
                            "truncated": cut,
                        },
                    )

    def score(self, sample: Sample, tokens: list[int], text: str) -> dict[str, float]:
        """`cut` is 1 where the prompt lost its middle."""
        if sample.forced is not None:
            text = text.partition(CHOICES[sample.task].strip())[2]
        score = float(TASKS[sample.task].judge(text, sample.meta["answers"]))
        return {"score": score, "cut": float(sample.meta["truncated"])}


def _fields(name: str, row: Row) -> dict[str, str]:
    """What the task's prompt is filled with.

    Raises:
        ValueError: the row is not of the task's form.
    """
    fields = {"context": row["context"], "input": row["input"]}
    if name in CHOICES:
        fields |= zip("abcd", _options(name, row), strict=True)
    elif name == "code_run":
        call = _find(r"func_[0-9]+\(-?[0-9]+\)", name, row)
        fields |= {"func": call.split("(")[0], "func_call": call}
    elif name == "math_find":
        wanted = _find(r"The .+ of", name, row).lower().removesuffix(" of")
        fields["prefix"] = f"What is {wanted} in the following list?"
    return fields


def _answers(name: str, row: Row) -> list[Any]:
    """The truths; for a choice, the option's text and its letter."""
    given = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    if not given:
        raise ValueError(f"--data: a row of {name} has no answer.")
    if name not in CHOICES:
        return given
    options = _options(name, row)
    if len(given) == 2 and given[1] in tuple("ABCD"):
        return given
    if given[0] not in options:
        raise ValueError(f"--data: a row of {name} has the answer {given[0]!r}, not an option.")
    return [given[0], "ABCD"[options.index(given[0])]]


def _options(name: str, row: Row) -> list[str]:
    options = row.get("options") or []
    if len(options) != 4:
        raise ValueError(f"--data: a row of {name} has {len(options)} options instead of 4.")
    return options


def _find(pattern: str, name: str, row: Row) -> str:
    found = re.search(pattern, row["input"])
    if found is None:
        raise ValueError(f"--data: the input of a row of {name} has nothing like {pattern!r}.")
    return found[0]
