"""Text that facts are hidden in, from what every Python installation has."""

from __future__ import annotations

import functools
import importlib.util
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

STEP = 25_000  # characters between the beginnings of two samples' texts
# Modules whose source is the code haystack, about 1.1 million characters.
CODE_MODULES = (
    "argparse", "ast", "calendar", "codecs", "collections", "configparser", "copy", "csv",
    "datetime", "decimal", "difflib", "doctest", "enum", "fractions", "ftplib", "functools",
    "gettext", "heapq", "imaplib", "inspect", "ipaddress", "locale", "logging", "mailbox", "os",
    "pathlib", "pdb", "pickle", "plistlib", "pydoc", "random", "shutil", "smtplib", "socket",
    "ssl", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading",
    "tokenize", "traceback", "turtle", "typing", "uuid", "weakref", "zipfile",
)  # fmt: skip
NOISE_CHARACTERS = 1_200_000
_WORDS_A_SENTENCE = (5, 20)


@functools.cache
def prose() -> str:
    """Python's reference: about 400,000 characters of English."""
    from pydoc_data.topics import topics

    return re.sub(r"[ \t]+", " ", "\n".join(topics[name] for name in sorted(topics)))


@functools.cache
def noise() -> str:
    """Random words of the prose as sentences without meaning."""
    words = sorted({word.lower() for word in re.findall(r"[A-Za-z]{3,10}", prose())})
    rng = random.Random(0)
    sentences, size = [], 0
    while size < NOISE_CHARACTERS:
        picked = rng.choices(words, k=rng.randint(*_WORDS_A_SENTENCE))
        sentences.append(" ".join(picked).capitalize() + ".")
        size += len(sentences[-1]) + 1
    return " ".join(sentences)


@functools.cache
def code() -> str:
    """Source of modules of Python's library. Modules that a Python version lacks are left out."""
    sources = []
    for name in CODE_MODULES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            sources.append(Path(spec.origin).read_text(encoding="utf-8"))
    return "\n".join(sources)


HAYSTACKS: dict[str, Callable[[], str]] = {"prose": prose, "noise": noise, "code": code}


def piece(text: str, index: int, num_characters: int) -> str:
    """`num_characters` of `text` from the beginning of sample `index`; it goes round at the end."""
    start = STEP * index % len(text)
    turns = -(-(start + num_characters) // len(text))
    return (text * turns)[start : start + num_characters]
