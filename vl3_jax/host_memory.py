"""The memory that this machine, or the container that the process is in, still has."""

import contextlib
import ctypes
import pathlib
import re
from collections.abc import Iterator

_MEMINFO = pathlib.Path("/proc/meminfo")
_OWN_GROUPS = pathlib.Path("/proc/self/cgroup")
_GROUPS = pathlib.Path("/sys/fs/cgroup")
# Files of a control group: its limit, its use, and the line of its statistics with what is only cached, which the
# kernel gives up first. Version 2, then version 1.
_FILES = (("memory.max", "memory.current", "inactive_file"),)
_FILES += (("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),)


def free_host_memory() -> int | None:
    """Returns the bytes that the process can still allocate without swapping; None where the system does not tell."""
    return min((*_of_machine(), *_of_groups()), default=None)


def return_freed_memory() -> None:
    """Gives memory that was freed back to the system, where the C library otherwise keeps it (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _of_machine() -> Iterator[int]:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", _MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return
    if found:
        yield 1024 * int(found[1])


def _of_groups() -> Iterator[int]:
    """Yields what is left of the limit of each control group that the process belongs to."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for number, controllers, path in (line.split(":", 2) for line in lines):
        if number == "0" or "memory" in controllers.split(","):
            root = _GROUPS / ("" if number == "0" else "memory")
            folder = root / path.lstrip("/")
            # In a container, the path is that outside of it, and the root is the container's own group.
            yield from (left for group in (folder, *folder.parents) if group >= root for left in _left_in(group))


def _left_in(group: pathlib.Path) -> Iterator[int]:
    for limit, used, cached in _FILES:
        try:
            most, now = (int((group / name).read_text()) for name in (limit, used))
            found = re.search(rf"^{cached} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        except (OSError, ValueError):  # there is no such file, or "max": no limit
            continue
        yield max(0, most - now + (int(found[1]) if found else 0))
