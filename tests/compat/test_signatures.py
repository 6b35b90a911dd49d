"""What vLLM hands to our methods, they take: compared by name, before an engine has to start."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from inspect import Parameter
from typing import Any

import pytest

import vllm_heterocache
from vllm_heterocache import compat

VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
# Methods of vLLM that are wrapped or replaced on a class or an object, and the parameters of the
# replacement. Its own *args and **kwargs take the rest.
REPLACED = {
    "vllm.platforms.interface:Platform.check_and_update_config": ("vllm_config",),
    "vllm.platforms.interface:Platform.register_custom_kv_cache_specs": ("vllm_config",),
    "vllm.platforms.interface:Platform.get_attn_backend_cls": ("selected_backend", "*"),
    "vllm.model_executor.layers.attention:Attention.get_kv_cache_spec": ("vllm_config",),
    "vllm.v1.core.block_pool:BlockPool.free_blocks": ("ordered_blocks",),
}
# vLLM makes these by a factory, with keywords.
BY_KEYWORDS = ("HeteroManager.__init__",)
# Called by vLLM where a backend's impl has them.
DUCK_TYPED = {"do_kv_cache_update": "vllm.model_executor.layers.attention.attention"}
# Called on all workers by their names (collective_rpc), in benchmarks and tests.
REMOTE = ("heterocache_check_integrity", "heterocache_set_drift")
# Of a vLLM that is newer than the oldest one supported.
NEWER = ("supports_sleep_mode",)


def modules() -> Iterator[Any]:
    for info in pkgutil.walk_packages(vllm_heterocache.__path__, "vllm_heterocache."):
        if ".kernels." not in info.name:
            yield importlib.import_module(info.name)


def of_vllm(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "vllm"


def members_of_ours(cls: type) -> dict[str, Any]:
    """What an object of this class has by name of what the class and its bases of ours define."""
    names = {
        name: None
        for base in cls.__mro__
        if base.__module__.split(".")[0] == "vllm_heterocache"
        for name in vars(base)
    }
    return {name: inspect.getattr_static(cls, name) for name in names}


def derived_classes() -> list[type]:
    """Our classes that have a base of vLLM's, each once."""
    found = {
        value
        for module in modules()
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__
        if any(of_vllm(base) for base in value.__mro__)
    }
    return sorted(found, key=lambda cls: f"{cls.__module__}.{cls.__name__}")


def overridden(cls: type) -> Iterator[tuple[type, str]]:
    """Classes of vLLM's, and names of their methods that our class overrides. The override is its
    own, or stands in a base of ours between the two."""
    for name, own in members_of_ours(cls).items():
        for base in cls.__mro__:
            if of_vllm(base) and callable_of(own) and callable_of(vars(base).get(name)):
                yield base, name


def overrides() -> list[Any]:
    return [
        pytest.param(cls, base, name, id=f"{cls.__name__}.{name}-{base.__name__}")
        for cls in derived_classes()
        for base, name in overridden(cls)
    ]


def callable_of(member: Any) -> Callable[..., Any] | None:
    """The function behind a method, a class method or a static method."""
    if isinstance(member, classmethod | staticmethod):
        return member.__func__
    return member if inspect.isfunction(member) else None


def untaken(ours: Callable[..., Any], theirs: Callable[..., Any]) -> list[str]:
    """Parameters of vLLM's function that ours cannot be given as vLLM's callers give them."""
    parameters = list(inspect.signature(ours).parameters.values())
    by_name = {p.name: p for p in parameters if p.kind not in VARIADIC}
    kinds = {p.kind for p in parameters}
    asked = [p for p in inspect.signature(theirs).parameters.values() if p.kind not in VARIADIC]
    missing = []
    for index, parameter in enumerate(asked):
        by_keyword = parameter.name in by_name or Parameter.VAR_KEYWORD in kinds
        by_place = Parameter.VAR_POSITIONAL in kinds or (
            index < len(parameters) and parameters[index].name == parameter.name
        )
        if not by_keyword or (parameter.kind == Parameter.POSITIONAL_OR_KEYWORD and not by_place):
            missing.append(parameter.name)
    names = [parameter.name for parameter in asked]
    needed = [p.name for p in by_name.values() if p.default is Parameter.empty]
    return missing + [f"{name} (of ours alone)" for name in needed if name not in names]


def test_a_parameter_that_is_not_taken_is_found():
    def theirs(self, a, b=1, *, c=2): ...
    def same(self, a, b=1, *, c=2): ...
    def variadic(self, *args, **kwargs): ...
    def lacks_b(self, a, *, c=2): ...
    def lacks_c(self, a, b=1): ...
    def swapped(self, b, a, *, c=2): ...
    def asks_more(self, a, b, d, *, c=2): ...

    assert untaken(same, theirs) == untaken(variadic, theirs) == []
    assert untaken(lacks_b, theirs) == ["b"] and untaken(lacks_c, theirs) == ["c"]
    assert untaken(swapped, theirs) == ["a", "b"]
    assert untaken(asks_more, theirs) == ["d (of ours alone)"]


def test_a_method_of_a_base_of_ours_is_compared_with_what_it_hides():
    class Theirs:
        __module__ = "vllm.somewhere"

        def load(self, a, b): ...
        @classmethod
        def layout(cls, config): ...
        def theirs_alone(self): ...

    class Common:
        __module__ = "vllm_heterocache.somewhere"

        def load(self, a): ...
        @classmethod
        def layout(cls, config): ...

    class Derived(Common, Theirs):
        __module__ = "vllm_heterocache.somewhere"

    class Mended(Derived):
        __module__ = "vllm_heterocache.somewhere"

        def load(self, a, b): ...

    class Stranger(Theirs):
        __module__ = "elsewhere"

        def load(self, a): ...

    assert sorted(name for _, name in overridden(Derived)) == ["layout", "load"]
    assert compared(Derived, Theirs, "load") == ["b"]
    assert compared(Derived, Theirs, "layout") == compared(Mended, Theirs, "load") == []
    assert not list(overridden(Stranger))


@pytest.mark.parametrize(("cls", "theirs", "name"), overrides())
def test_an_override_takes_what_vllm_hands_on(cls, theirs, name):
    by_us = name == "__init__" and not issubclass(cls, called_by_vllm())
    if by_us or f"{cls.__name__}.{name}" in BY_KEYWORDS:
        pytest.skip("vLLM makes none, or by keywords")
    assert compared(cls, theirs, name) == []


def compared(cls: type, theirs: type, name: str) -> list[str]:
    """Parameters of a method of vLLM's that our override of it does not take."""
    ours, original = callable_of(members_of_ours(cls)[name]), callable_of(vars(theirs)[name])
    assert ours is not None and original is not None
    return untaken(ours, original)


def called_by_vllm() -> tuple[type, ...]:
    """Classes whose objects vLLM makes."""
    names = ("AttentionImpl", "AttentionMetadataBuilder", "FullAttentionManager")
    names += ("KVConnectorBase_V1", "KVConnectorPromMetrics", "WorkerBase")
    return tuple(getattr(compat, name) for name in names)


def test_every_kind_of_class_that_vllm_calls_is_compared():
    bases = {base for cls in derived_classes() for base in cls.__mro__ if of_vllm(base)}
    assert set(called_by_vllm()) <= bases
    assert len(overrides()) > 40


@pytest.mark.parametrize("path", REPLACED)
def test_a_replaced_method_has_the_parameters_that_its_replacement_takes(path):
    module, names = path.split(":")
    member = importlib.import_module(module)
    for name in names.split("."):
        member = inspect.getattr_static(member, name)
    function = callable_of(member)
    assert function is not None, "it is a method no longer"
    found = [p.name for p in inspect.signature(function).parameters.values()]
    expected = REPLACED[path]
    named = [name for name in expected if name != "*"]
    assert found[1 : 1 + len(named)] == named
    assert "*" in expected or len(found) == 1 + len(named)


def test_every_public_method_of_a_derived_class_is_vllms_or_called_by_us():
    """A method whose original vLLM has dropped or renamed would never be called again."""
    text = "\n".join(inspect.getsource(module) for module in modules())
    called = (*DUCK_TYPED, *NEWER, *REMOTE)
    unused = [
        f"{cls.__name__}.{name}"
        for cls in derived_classes()
        for name, member in members_of_ours(cls).items()
        if callable_of(member) and not name.startswith("_")
        if not any(of_vllm(base) and name in vars(base) for base in cls.__mro__)
        if f".{name}" not in text and f'"{name}"' not in text and name not in called
    ]
    assert not unused
    for name, caller in DUCK_TYPED.items():
        assert f"impl.{name}(" in inspect.getsource(importlib.import_module(caller))
