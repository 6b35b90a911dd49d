"""The engine arguments behind the VllmConfig that vLLM is making."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from vllm_heterocache.refusal import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable

_given: ContextVar[tuple[type | None, dict[str, Any]]] = ContextVar("given", default=(None, {}))


def note_engine_args() -> None:
    """Wrap `EngineArgs.create_engine_config`, which a VllmConfig does not lead back to.

    Calibration loads the model in a process of its own, and loading may need any argument.
    """
    from vllm.engine.arg_utils import EngineArgs

    engine_args: Any = EngineArgs
    if "heterocache_noted" in vars(engine_args):
        return
    engine_args.heterocache_noted = True
    create = engine_args.create_engine_config

    @functools.wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A copy: vLLM writes what it resolves into the arguments.
        token = _given.set((EngineArgs, dict(vars(self))))
        try:
            return create(self, *args, **kwargs)
        finally:
            _given.reset(token)

    engine_args.create_engine_config = create_engine_config


def given_engine_args() -> dict[str, Any]:
    """Engine arguments that are not at their defaults, by name; none outside of their use."""
    kind, values = _given.get()
    if kind is None:
        return {}
    defaults = {field.name: _default(field) for field in dataclasses.fields(kind)}
    return {name: values[name] for name, one in defaults.items() if values[name] != one}


def check_llm_arguments(names: Iterable[str]) -> None:
    """Raise ValueError for the first name that vLLM's LLM() does not take.

    LLM() takes arguments of its own, and hands all others to EngineArgs.
    """
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    own = inspect.signature(LLM).parameters.values()
    known = {one.name for one in own if one.kind is not inspect.Parameter.VAR_KEYWORD}
    known |= {field.name for field in dataclasses.fields(EngineArgs)}
    for name in names:
        if name not in known:
            raise ValueError(
                f"vLLM's LLM() takes no argument {name!r}{did_you_mean(name, known)}; correct or "
                "remove it"
            )


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()
