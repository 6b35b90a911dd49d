"""The suite `longbench`: LongBench and LongBench-E from local files.

Source: arXiv 2308.14508; see longbench_tasks.py. --data is the unpacked folder of the data set
THUDM/LongBench: one JSON Lines file per task, TASK.jsonl (TASK_e.jsonl for LongBench-E), with the
fields input, context, answers and all_classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_heterocache.evaluation.local_data import Row, data_folder, draw, find_file, read_rows
from vllm_heterocache.evaluation.longbench_tasks import TASKS
from vllm_heterocache.evaluation.prompt import make_frame
from vllm_heterocache.evaluation.sample import Sample, SuiteSettings
from vllm_heterocache.evaluation.suite_options import choose_tasks, read_options
from vllm_heterocache.evaluation.text_metrics import classification

LAYOUT = "the JSON Lines files of the data set THUDM/LongBench, such as hotpotqa.jsonl"
FILES = f"{LAYOUT}, of all tasks or of those named by --tasks"
EVEN = (  # the tasks of LongBench-E, whose lengths are spread evenly
    "qasper multifieldqa_en hotpotqa 2wikimqa gov_report multi_news trec triviaqa samsum "
    "passage_count passage_retrieval_en lcc repobench-p"
).split()
NAMES = (*TASKS, *(f"{name}_e" for name in EVEN))


class LongBenchSuite:
    """The English tasks. --set chat=true uses the chat template where LongBench does.

    Prompts longer than a length are cut in the middle to it. Without --tasks, all of LongBench.
    """

    name = "longbench"

    def samples(self, tokenizer: Any, settings: SuiteSettings) -> Iterator[Sample]:
        options = read_options(self.name, settings, {"chat": False})
        names = choose_tasks(self.name, settings, NAMES, list(TASKS))
        folder = data_folder(self.name, settings, LAYOUT)
        plain = make_frame(tokenizer, False)
        chat = make_frame(tokenizer, True) if options["chat"] else plain
        files = {
            name: find_file(folder, [f"{name}.jsonl", f"data/{name}.jsonl"], FILES)
            for name in names
        }
        for name, path in files.items():
            task = TASKS[name.removesuffix("_e")]
            rows = read_rows(path, ["input", "context", "answers"])
            for length in settings.lengths:
                for index, row in draw(rows, settings.num_samples, settings.seed, name):
                    text = task.prompt.format(context=row["context"], input=row["input"])
                    frame = plain if task.few_shot else chat
                    prompt, cut = frame.truncated(text, "", length)
                    yield Sample(
                        id=f"longbench/{name}/{length}/{row.get('_id', index)}",
                        prompt=prompt,
                        max_tokens=task.max_tokens,
                        meta=_meta(name, length, row, cut),
                    )

    def score(self, sample: Sample, tokens: list[int], text: str) -> dict[str, float]:
        """The best over the answers; `cut` is 1 where the prompt lost its middle."""
        task = TASKS[sample.task.removesuffix("_e")]
        if task.first_line:
            text = text.lstrip("\n").split("\n")[0]
        answers, metric = sample.meta["answers"], task.metric
        if metric is None:
            classes = sample.meta["classes"]
            score = max(classification(text, answer, classes) for answer in answers)
        else:
            score = max(metric(text, answer) for answer in answers)
        return {"score": score, "cut": float(sample.meta["truncated"])}


def _meta(name: str, length: int, row: Row, cut: bool) -> dict[str, Any]:
    """What scoring and tables need; ValueError where it is missing."""
    meta = {"task": name, "length": length, "answers": row["answers"], "truncated": cut}
    if not row["answers"]:
        raise ValueError(f"--data: a row of {name} has no answers.")
    if TASKS[name.removesuffix("_e")].metric is None:
        if not row.get("all_classes"):
            raise ValueError(f"--data: a row of {name} has no field all_classes.")
        meta["classes"] = row["all_classes"]
    return meta
