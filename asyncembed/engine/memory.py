"""How much memory there is and is used: the machine's, and the cgroup's that contains this process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

DEFAULT_BUDGET_CAP = 2 * 10**9
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60  # cgroup v1 writes a page-rounded 2**63 where there is none


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _read_int(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT else None


def _cgroup_limits(root: Path, proc: Path) -> Iterator[tuple[int, int | None]]:
    """The limit of each cgroup that contains this process, and what is used of it, in bytes.

    Page cache that the kernel drops before it kills counts as used in a cgroup, but is free.
    """
    own = {"": "/", "memory": "/"}  # by controller: v2 has none
    for line in _read(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        own.update((name, path) for name in controllers.split(",") if name in own)
    for base, own_path, limit_name, usage_name, cache_name in (
        (root, own[""], "memory.max", "memory.current", "inactive_file"),
        (root / "memory", own["memory"], "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        own_folder = base / own_path.lstrip("/")
        for folder in (own_folder, *own_folder.parents):
            limit, usage = _read_int(folder / limit_name), _read_int(folder / usage_name)
            if limit is not None:
                statistics = dict(line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines())
                yield limit, usage if usage is None else usage - int(statistics.get(cache_name, 0))
            if folder == base:
                break


def cgroup_available(root: Path = _CGROUP_ROOT, proc: Path = Path("/proc")) -> int | None:
    """Bytes this process's cgroups, version 1 or 2, still allow, the tightest of all; None without a limit."""
    limits = _cgroup_limits(root, proc)
    return min((max(0, limit - used) for limit, used in limits if used is not None), default=None)


def memory_bound(root: Path = _CGROUP_ROOT, proc: Path = Path("/proc")) -> int:
    """Bytes that this process could ever have: the machine's, its cgroups' limits, or its own limit, the smallest."""
    bounds = [int(psutil.virtual_memory().total), *(limit for limit, _ in _cgroup_limits(root, proc))]
    if sys.platform != "win32":
        import resource

        limits_set = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
        bounds += [limit for limit in limits_set if limit != resource.RLIM_INFINITY]
    return min(bounds)


def available_bytes() -> int:
    """Bytes that can still be taken, by the machine's account or the cgroup's, whichever is smaller."""
    machine = int(psutil.virtual_memory().available)
    cgroup = cgroup_available()
    return machine if cgroup is None else min(machine, cgroup)


def rss_bytes() -> int:
    """Resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Most resident memory of this process so far, in bytes; the present one where the system keeps no peak.

    On Linux the kernel's own figure of this program: `getrusage` begins with that of the process which started it.
    """
    if sys.platform == "win32":
        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    with contextlib.suppress(OSError, ValueError), open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class MemoryBudget:
    """The bytes that texts in flight may take."""

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes if max_bytes is not None else max(1, min(available_bytes() // 4, DEFAULT_BUDGET_CAP))
        self._baseline: int | None = None

    def __repr__(self) -> str:
        return f"<MemoryBudget max_bytes={self.max_bytes} baseline={self._baseline}>"

    def set_baseline(self, n_reserved: int = 0) -> None:
        """Measure growth from here: the model is loaded now, and `n_reserved` bytes are texts in flight."""
        self._baseline = max(0, rss_bytes() - n_reserved)

    def exceeded(self) -> bool:
        """True if the process has grown by more than the budget since the model was loaded."""
        return self._baseline is not None and rss_bytes() - self._baseline > self.max_bytes
