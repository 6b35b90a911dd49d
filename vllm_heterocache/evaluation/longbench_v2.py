"""The suite `longbench_v2`: LongBench v2, multiple choice over long contexts, from a local file.

Source: Bai et al., LongBench v2, arXiv 2412.15204; prompt (prompts/0shot.txt), tokens to generate
and reading of the answer from github.com/THUDM/LongBench. --data is data.json of the data set
THUDM/LongBench-v2 (a list of objects) or its folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_heterocache.evaluation.local_data import Row, data_folder, draw, find_file, read_rows
from vllm_heterocache.evaluation.prompt import make_frame
from vllm_heterocache.evaluation.sample import Sample, SuiteSettings
from vllm_heterocache.evaluation.suite_options import choose_tasks, read_options

LAYOUT = "data.json of the data set THUDM/LongBench-v2"
FIELDS = (
    "_id domain difficulty length question choice_A choice_B choice_C choice_D answer context"
).split()
TASKS = ("short", "medium", "long")  # the field `length`: to 32K, to 128K, to 2M words
PROMPT = (
    "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>"
    "\n\nWhat is the correct answer to this question: {question}\nChoices:\n(A) {choice_A}\n"
    "(B) {choice_B}\n(C) {choice_C}\n(D) {choice_D}"
)
FORMAT = '\n\nFormat your response as follows: "The correct answer is (insert answer here)".'
PLAIN_PREFIX = "\n\nThe correct answer is ("
CHAT_TOKENS = 128
PLAIN_TOKENS = 4  # after the prefix


class LongBenchV2Suite:
    """Tasks are the length classes. --set chat=true asks as the benchmark does.

    Without it, for base models, the beginning of the answer is forced in decode, and the sentence
    about its format is left out, which they copy ("insert answer here"). At the prompt's end, the
    letter would be the prefill's, with full attention, in every configuration. Prompts
    longer than a length are cut in the middle to it. The metric `answered` says whether there was
    an answer of the right form (a wrong form scores 0), `cut` whether the prompt lost its middle.
    """

    name = "longbench_v2"

    def samples(self, tokenizer: Any, settings: SuiteSettings) -> Iterator[Sample]:
        options = read_options(self.name, settings, {"chat": False})
        tasks = choose_tasks(self.name, settings, TASKS, TASKS)
        path = data_folder(self.name, settings, LAYOUT)
        rows = read_rows(_file(path), FIELDS)
        frame = make_frame(tokenizer, options["chat"])
        template, forced, max_tokens = PROMPT + FORMAT, None, CHAT_TOKENS
        if not options["chat"]:
            template, forced = PROMPT, frame.encode(PLAIN_PREFIX)
            max_tokens = len(forced) + PLAIN_TOKENS
        for task in tasks:
            of_task = [row for row in rows if row["length"] == task]
            for length in settings.lengths:
                for _, row in draw(of_task, settings.num_samples, settings.seed, task):
                    text = template.format(**{key: str(row[key]).strip() for key in FIELDS})
                    prompt, cut = frame.truncated(text, "", length)
                    yield Sample(
                        id=f"longbench_v2/{task}/{length}/{row['_id']}",
                        prompt=prompt,
                        max_tokens=max_tokens,
                        forced=forced,
                        meta=_meta(task, length, row, cut),
                    )

    def score(self, sample: Sample, tokens: list[int], text: str) -> dict[str, float]:
        choice = read_choice(text) if sample.forced is None else _begun_choice(text)
        return {
            "score": float(choice == sample.meta["answers"][0]),
            "answered": float(choice is not None),
            "cut": float(sample.meta["truncated"]),
        }


def read_choice(text: str) -> str | None:
    """The letter after "The correct answer is", in parentheses or bare; None without one."""
    text = text.replace("*", "")
    for pattern in (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"):
        if match := re.search(pattern, text):
            return match[1]
    return None


def _begun_choice(text: str) -> str | None:
    """The letter after the sentence's forced beginning."""
    match = re.match(r"\s*([A-D])\b", text.partition(PLAIN_PREFIX.strip())[2])
    return match[1] if match else None


def _file(path: Path) -> Path:
    return path if path.is_file() else find_file(path, ["data.json", "data.jsonl"], LAYOUT)


def _meta(task: str, length: int, row: Row, cut: bool) -> dict[str, Any]:
    return {
        "task": task,
        "length": length,
        "answers": [row["answer"]],
        "domain": row["domain"],
        "difficulty": row["difficulty"],
        "truncated": cut,
    }
