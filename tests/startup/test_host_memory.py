from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_heterocache.startup.host_memory import available_host_bytes

HOST = 64 << 30
NO_LIMIT_V1 = 9223372036854771712


@pytest.fixture(autouse=True)
def _host(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=HOST))


def write(root: Path, groups: str, files: dict[str, object]) -> Path:
    """A root folder with /proc/self/cgroup and the files of control groups."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def v2(group: str, limit: object, used: int, inactive: int = 0) -> dict[str, object]:
    folder = f"sys/fs/cgroup/{group}"
    stat = f"anon 1\ninactive_file {inactive}"
    files = {"memory.max": limit, "memory.current": used, "memory.stat": stat}
    return {f"{folder}/{name}": text for name, text in files.items()}


def v1(group: str, limit: int, used: int, inactive: int = 0) -> dict[str, object]:
    folder = f"sys/fs/cgroup/memory/{group}"
    stat = f"inactive_file 1\ntotal_inactive_file {inactive}"
    files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}
    return {f"{folder}/{name}": text for name, text in files.items()}


V1_GROUPS = "12:cpu,cpuacct:/pod\n5:memory:/pod\n1:name=systemd:/pod"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", v2("", 1000, 300), 700),
        ("0::/", v2("", 1000, 300, inactive=50), 750),
        ("0::/", v2("", "max", 300), HOST),
        ("0::/", v2("", 2 * HOST, 0), HOST),
        ("0::/", v2("", 1000, 1200), 0),
        ("0::/", {}, HOST),
        ("0::/pod/box", v2("pod/box", "max", 10) | v2("pod", 500, 40), 460),
        ("0::/pod/box", v2("pod/box", 300, 10) | v2("pod", 500, 40), 290),
        (V1_GROUPS, v1("pod", 1000, 300, inactive=20), 720),
        (V1_GROUPS, v1("pod", NO_LIMIT_V1, 300), HOST),
        # the host's path, which the container does not see: its own group is the root
        (V1_GROUPS, v1("", 1000, 300), 700),
        (f"{V1_GROUPS}\n0::/", v1("pod", 1000, 300), 700),
    ],
)
def test_the_smallest_of_host_and_control_groups_is_available(tmp_path, groups, files, expected):
    assert available_host_bytes(write(tmp_path, groups, files)) == expected


def test_without_control_groups_the_host_is_available(tmp_path):
    assert available_host_bytes(tmp_path) == HOST


def test_this_process_has_some():
    assert 0 < available_host_bytes() <= HOST
