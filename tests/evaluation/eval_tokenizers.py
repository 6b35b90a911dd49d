"""A tokenizer for tests of prompts: pieces of at most five characters, lossless."""

from __future__ import annotations

import re


class Pieces:
    """Ids are given out on the way; 0 begins a sequence where `bos`."""

    def __init__(self, bos: bool = False, chat: bool = False):
        self._bos = bos
        self._known: dict[str, int] = {}
        self._pieces = ["<s>"]
        self.chat_template = "there is one" if chat else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [0] if self._bos and add_special_tokens else []
        for piece in re.findall(r" ?\w{1,5}|[^\w]", text):
            if piece not in self._known:
                self._known[piece] = len(self._pieces)
                self._pieces.append(piece)
            ids.append(self._known[piece])
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        if skip_special_tokens:
            ids = [i for i in ids if i]
        return "".join(self._pieces[i] for i in ids)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt) -> str:
        assert not tokenize and add_generation_prompt
        (message,) = messages
        return f"<s>[{message['role']}]{message['content'].strip()}[/user][assistant]"
