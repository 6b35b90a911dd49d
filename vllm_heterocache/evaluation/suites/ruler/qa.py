"""RULER's question answering: one right document among others, from local SQuAD and HotpotQA.

Source: arXiv 2404.06654, section 3, and qa.py of github.com/NVIDIA/RULER; see task.py.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_heterocache.evaluation.local_data import read_json
from vllm_heterocache.evaluation.suites.ruler.task import Drawn

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from vllm_heterocache.evaluation.prose import Prose

FILES = {"qa_1": "squad.json", "qa_2": "hotpotqa.json"}  # RULER's names; SQuAD 2.0, distractor
INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)


class Question(NamedTuple):
    question: str
    answers: list[str]
    own: list[str]  # documents that must be in the context
    near: list[str]  # taken before those of other questions


@dataclass(frozen=True)
class DocumentQa:
    """A question and documents, at least its own among them. Size: documents.

    A sample's question is drawn at random; RULER takes them in the order of the file.
    """

    questions: list[Question]
    documents: list[str]
    max_tokens: int = 32
    any_answer: bool = True

    def least(self, length: int) -> int:
        return 1

    def draw(self, rng: random.Random, size: int, length: int, prose: Prose) -> Drawn:
        asked = rng.choice(self.questions)
        near = rng.sample(asked.near, len(asked.near))
        taken = {*asked.own, *near}
        others = [x for x in self.documents if x not in taken]
        rng.shuffle(others)
        size = max(size, len(asked.own))
        repeated = itertools.cycle(asked.own + near + others)
        chosen = list(itertools.islice(repeated, size))
        rng.shuffle(chosen)
        context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(chosen, 1))
        text = (
            f"{INSTRUCTION}\n\nThe following are given documents.\n\n{context}\n\n{INSTRUCTION}"
            f"\n\nQuestion: {asked.question}"
        )
        return Drawn(text, " Answer:", asked.answers)


def load_qa(task: str, folder: Path) -> DocumentQa:
    """The task "qa_1" or "qa_2" from RULER's file in the folder.

    Raises:
        ValueError: the file is missing or has another form.
    """
    path = folder / FILES[task]
    if not path.is_file():
        raise ValueError(
            f"--tasks {task} reads {FILES[task]}, which --data {folder} does not have."
        )
    read = _read_squad if task == "qa_1" else _read_hotpot
    try:
        questions = read(read_json(path))
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"--data: {path} is not of its public form ({error!r}).") from None
    if not questions:
        raise ValueError(f"--data: {path} has no question that can be answered.")
    documents = sorted({document for q in questions for document in q.own + q.near})
    return DocumentQa(questions, documents)


def _read_squad(data: dict[str, Any]) -> list[Question]:
    """Paragraphs of the same article are near."""
    questions = []
    for article in data["data"]:
        paragraphs = dict.fromkeys(paragraph["context"] for paragraph in article["paragraphs"])
        for paragraph in article["paragraphs"]:
            own = paragraph["context"]
            near = [text for text in paragraphs if text != own]
            for qa in paragraph["qas"]:
                if not qa.get("is_impossible", False):
                    answers = [answer["text"] for answer in qa["answers"]]
                    questions.append(Question(qa["question"], answers, [own], near))
    return questions


def _read_hotpot(data: list[dict[str, Any]]) -> list[Question]:
    """A document is its title and its joined sentences; a question's ten are its own."""
    questions = []
    for row in data:
        own = [f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]]
        questions.append(Question(row["question"], [row["answer"]], own, []))
    return questions
