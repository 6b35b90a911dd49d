"""How much host memory this process may still take: the host's, or its container's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator


class CgroupFiles(NamedTuple):
    """Where a version of Linux control groups keeps the memory of a group."""

    root: str
    controller: str  # of the group's line in /proc/self/cgroup
    limit: str
    used: str
    reclaimable: str  # key of memory.stat: file cache that the kernel gives up for others


V1 = CgroupFiles(
    "sys/fs/cgroup/memory",
    "memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
)
V2 = CgroupFiles("sys/fs/cgroup", "", "memory.max", "memory.current", "inactive_file")


def available_host_bytes(root: Path = Path("/")) -> int:
    """The smallest of the host's free memory and what the control groups of this process leave.

    `root` is the folder in which `proc` and `sys` lie.
    """
    return min([psutil.virtual_memory().available, *_left_by_cgroups(root)])


def _left_by_cgroups(root: Path) -> Iterator[int]:
    """Bytes that each group leaves, from the process's own up to the outermost that is seen."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for files in (V1, V2):
            if files.controller in controllers.split(","):
                own = Path(path.lstrip("/"))
                for group in (own, *own.parents):
                    yield from _left_by(root / files.root / group, files)


def _left_by(group: Path, files: CgroupFiles) -> Iterator[int]:
    """Bytes that one group leaves; nothing where it has no limit, or is not seen from here (a
    container may see its own group as the root alone)."""
    try:
        limit = (group / files.limit).read_text().strip()
        used = int((group / files.used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return
    if limit != "max":
        yield max(0, int(limit) - used + int(stat.get(files.reclaimable, 0)))
