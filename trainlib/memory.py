"""How much memory there is, and which errors say that it is not enough."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from trainlib.errors import first_line

CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Controllers in /proc/self/cgroup: where their groups are mounted and the file of the limit.
# Version 2 has no named controllers; systemd mounts it below version 1 where there are both.
LIMIT_FILES = {
    "": ((".", "memory.max"), ("unified", "memory.max")),
    "memory": (("memory", "memory.limit_in_bytes"),),
}
# Of errors that are no MemoryError: what torch and numpy say of sizes that cannot be had.
OUT_OF_MEMORY = (
    *("out of memory", "not enough memory", "allocate memory", "unable to allocate", "bad alloc"),
    *("bad_alloc", "alloc_failed", "calculation overflowed", "multiplication overflow"),
    *("array is too big", "maximum allowed dimension exceeded"),
)


def memory_limit() -> int:
    """Return the bytes of memory that this process may use.

    The least of the machine's memory, the limits of the process's control groups (version 1 or 2)
    and of all groups around them, and `ulimit -v` and `ulimit -d`.
    """
    limits = [*_group_limits(), *_process_limits()]
    if hasattr(os, "sysconf"):  # Windows has none; there a set is read as if it fitted
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=sys.maxsize)


def _group_limits() -> Iterator[int]:
    """Yield the limits of the control groups, from the process's own up to the mount."""
    try:
        own = OWN_GROUPS.read_text("utf-8", "surrogateescape")
    except OSError:  # another system
        own = ""
    paths = dict.fromkeys(LIMIT_FILES, "/")  # as a container sees its own group
    for controllers, path in re.findall(r"^\d+:(.*?):(/.*)$", own, re.MULTILINE):
        paths.update((name, path) for name in controllers.split(",") if name in paths)
    for name, places in LIMIT_FILES.items():
        path = PurePosixPath(paths[name])
        for mount, file in places:
            for group in (path, *path.parents):
                try:
                    yield int((CGROUPS / mount / str(group).lstrip("/") / file).read_text())
                except (OSError, ValueError):  # no such group, or "max"
                    continue


def _process_limits() -> Iterator[int]:
    """Yield the limits of the process's address space and data."""
    try:
        import resource
    except ImportError:  # another system
        return
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            yield soft


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, numpy or torch says that memory is not enough."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    message = str(error).lower()
    is_of_a_library = isinstance(error, RuntimeError) or type(error) is ValueError
    return is_of_a_library and any(words in message for words in OUT_OF_MEMORY)


@contextmanager
def memory_named(what: str, lower: str = "") -> Iterator[None]:
    """Turn an error that says that memory is not enough into MemoryError: `what`, what to lower."""
    try:
        yield
    except Exception as e:  # of many kinds
        if not is_out_of_memory(e):
            raise
        reason = first_line(e) if str(e) else "out of memory"
        words = f"{what} does not fit into memory ({reason}); lower {lower or what}"
        raise MemoryError(words) from None
