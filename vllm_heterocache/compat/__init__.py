"""The only package that imports vLLM (but its logger) or reaches into its objects.

`from vllm_heterocache.compat import NAME` imports one of the names of names.py on demand, so that
importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

from vllm_heterocache.compat.names import INTERNALS, RENAMED


def __getattr__(name: str) -> Any:
    if name not in INTERNALS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(INTERNALS[name]), RENAMED.get(name, name))
