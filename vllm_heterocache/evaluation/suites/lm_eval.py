"""Suite `lm_eval`: tasks of lm-eval, with the question asked during decode.

Source: github.com/EleutherAI/lm-evaluation-harness, whose prompts, filters and metrics are used.
lm-eval itself puts the question at the prompt's end, where it decides which pages stay. Here the
prompt ends with the document, and what follows the document is forced during decode, after the
prompt was compacted. So every task works whose text holds one field of its rows word by word:
LongBench, LongBench v2 and InfiniteBench (field `context`), or tasks of a user's own.

A multiple choice is answered by the first letters of the output, not by likelihoods, which are
the prefill's. `--data DIR` is a folder with tasks of one's own, as lm-eval's `--include_path`;
`--set context=FIELD` names the document's field. Documents that do not fit in a length lose their
middle; metric `cut` is the share of the samples that did.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from vllm_heterocache.evaluation.local_data import draw
from vllm_heterocache.evaluation.prompt import make_frame
from vllm_heterocache.evaluation.sample import Sample, SuiteSettings
from vllm_heterocache.evaluation.suite_options import read_options

if TYPE_CHECKING:
    from collections.abc import Iterator

CHOICE_TOKENS = 4  # of an answer to a multiple choice
MULTIPLE_CHOICE = "multiple_choice"


class LmEvalSuite:
    name = "lm_eval"

    def __init__(self) -> None:
        self._tasks: dict[str, Any] = {}
        self._docs: dict[str, Any] = {}  # each a data set of the library `datasets`
        self._tokenizer: Any = None

    def samples(self, tokenizer: Any, settings: SuiteSettings) -> Iterator[Sample]:
        field = read_options(self.name, settings, {"context": "context"})["context"]
        self._tokenizer, self._tasks = tokenizer, load_tasks(settings)
        frame = make_frame(tokenizer, False)
        for name, task in self._tasks.items():
            docs, free = task.eval_docs, _answer_tokens(task)
            self._docs[name] = docs
            for length in settings.lengths:
                for index in draw(len(docs), settings.num_samples, settings.seed, name):
                    document, question = split(task, docs[index], field)
                    prompt, cut = frame.truncated(document, "", length)
                    forced = frame.encode(question)
                    yield Sample(
                        id=f"lm_eval/{name}/{length}/{index}",
                        prompt=prompt,
                        max_tokens=len(forced) + free,
                        forced=forced,
                        meta={"task": name, "length": length, "index": index, "truncated": cut},
                    )

    def score(self, sample: Sample, tokens: list[int], text: str) -> dict[str, float]:
        """lm-eval's metrics of the answer, the first of them as `score`; `cut` is 0 or 1."""
        task = self._tasks[sample.task]
        answer = self._tokenizer.decode(
            tokens[len(sample.forced or []) :], skip_special_tokens=True
        )
        doc = self._docs[sample.task][sample.meta["index"]]
        judge = _choice if task.OUTPUT_TYPE == MULTIPLE_CHOICE else _generated
        metrics = judge(task, doc, answer)
        score = metrics.get("score", next(iter(metrics.values())))
        return metrics | {"score": score, "cut": float(sample.meta["truncated"])}


def load_tasks(settings: SuiteSettings) -> dict[str, Any]:
    """Task name -> lm-eval's task; a group of lm-eval is all its tasks.

    Raises:
        ValueError: lm-eval is not installed, there are no --tasks, or one is not known or scores
            likelihoods of something other than choices.
    """
    if not settings.tasks:
        raise ValueError("--suite lm_eval needs --tasks: name tasks or groups of lm-eval")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError(
            "--suite lm_eval needs lm-eval, which is not installed: "
            'pip install "vllm-heterocache[eval]"'
        ) from None
    manager = TaskManager(include_path=None if settings.data is None else str(settings.data))
    known = {*manager.all_tasks, *manager.all_groups, *manager.all_tags}
    for name in settings.tasks:
        if name not in known:
            raise ValueError(
                f"--tasks {name} is not known to lm-eval; `lm_eval ls tasks` lists its tasks, and "
                "--data DIR adds a folder of others"
            )
    tasks = manager.load(list(settings.tasks))["tasks"]
    for name, task in tasks.items():
        if task.OUTPUT_TYPE not in ("generate_until", MULTIPLE_CHOICE):
            raise ValueError(
                f"--tasks {name} is refused: its output type {task.OUTPUT_TYPE} generates nothing; "
                f"take tasks of generate_until or {MULTIPLE_CHOICE}"
            )
    return tasks


def split(task: Any, doc: dict[str, Any], field: str) -> tuple[str, str]:
    """lm-eval's zero-shot text of a row: up to the end of the document, and after it.

    Raises:
        ValueError: the text does not hold the field, or nothing stands after it.
    """
    text = task.fewshot_context(doc, 0)
    before, document, after = text.partition(str(doc.get(field) or "\0"))
    if not after.strip():
        raise ValueError(
            f"--tasks {task.config.task} is refused: its text has no field {field!r} with a "
            "question after it; name the document's field with --set context=FIELD"
        )
    return before + document, after


def _answer_tokens(task: Any) -> int:
    if task.OUTPUT_TYPE == MULTIPLE_CHOICE:
        return CHOICE_TOKENS
    return int(task.config.generation_kwargs.get("max_gen_toks", 256))  # lm-eval's default


def _choice(task: Any, doc: dict[str, Any], answer: str) -> dict[str, float]:
    """score: the right choice came first; answered: some choice did."""
    choices = task.doc_to_choice(doc)
    patterns = [rf"\W*{re.escape(choice)}\b" for choice in choices]
    found = [i for i, pattern in enumerate(patterns) if re.match(pattern, answer)]
    target = task.doc_to_target(doc)
    right = choices.index(target) if isinstance(target, str) else target
    return {"score": float(found == [right]), "answered": float(bool(found))}


def _generated(task: Any, doc: dict[str, Any], answer: str) -> dict[str, float]:
    """Metrics of an output that ends where lm-eval ends it, after the task's first filter."""
    for end in task.config.generation_kwargs.get("until") or []:
        answer = answer.split(end)[0] if end else answer
    request = task.construct_requests(doc, "", metadata=(task.config.task, 0, 1))
    request.resps, task._instances = [answer], [request]
    task.apply_filters()
    filtered = next(iter(request.filtered_resps.values()))
    results = task.process_results(doc, [filtered])
    return {name: float(value) for name, value in results.items()}
