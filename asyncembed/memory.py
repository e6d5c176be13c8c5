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


def _read_int(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT else None


def _inactive_file(path: Path, name: str) -> int:
    """Page cache that the kernel drops before it kills: it counts as used in a cgroup, but is free."""
    try:
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def _own_paths(proc: Path) -> tuple[str, str]:
    """This process's cgroup paths: of the v2 hierarchy, and of v1's memory controller."""
    v2 = v1 = "/"
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return v2, v1
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            v2 = path
        elif "memory" in controllers.split(","):
            v1 = path
    return v2, v1


def cgroup_available(root: Path = _CGROUP_ROOT, proc: Path = Path("/proc")) -> int | None:
    """Bytes this process's cgroups still allow, the tightest of them and their parents; None without a limit.

    Reads cgroup v2 (`memory.max`, `memory.current`, `inactive_file` of `memory.stat`) and v1
    (`memory.limit_in_bytes`, `memory.usage_in_bytes`, `total_inactive_file`).
    """
    v2, v1 = _own_paths(proc)
    layouts = (
        (root, v2, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", v1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    available: list[int] = []
    for base, own, limit_name, usage_name, cache_name in layouts:
        for folder in _folders(base, own):
            limit, usage = _read_int(folder / limit_name), _read_int(folder / usage_name)
            if limit is not None and usage is not None:
                available.append(max(0, limit - usage + _inactive_file(folder / "memory.stat", cache_name)))
    return min(available, default=None)


def _folders(base: Path, own: str) -> Iterator[Path]:
    """A cgroup's folder and its parents', up to the top of the hierarchy."""
    own_folder = base / own.lstrip("/")
    for folder in (own_folder, *own_folder.parents):
        if not folder.is_relative_to(base):
            return
        yield folder


def memory_bound(root: Path = _CGROUP_ROOT, proc: Path = Path("/proc")) -> int:
    """Bytes that this process could ever have: the machine's, its cgroups' limits, or its own limit, the smallest."""
    v2, v1 = _own_paths(proc)
    bounds = [int(psutil.virtual_memory().total)]
    for base, own, name in ((root, v2, "memory.max"), (root / "memory", v1, "memory.limit_in_bytes")):
        limits = (_read_int(folder / name) for folder in _folders(base, own))
        bounds += [limit for limit in limits if limit is not None]
    if sys.platform != "win32":
        import resource

        limits_set = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
        bounds += [limit for limit in limits_set if limit != resource.RLIM_INFINITY]
    return min(bounds)


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


def tokens_that_fit(n_free: int, bytes_per_token: float, slots: int = 1) -> int:
    """Padded tokens of a batch for which half of the free memory is enough, `slots` of them at once; at least 1.

    The other half is for the texts in flight, and for what neighbours take in the meantime.
    """
    return max(1, int(n_free / (2 * slots * bytes_per_token)))


def available_bytes() -> int:
    """Bytes that can still be taken, by the machine's account or the cgroup's, whichever is smaller."""
    machine = int(psutil.virtual_memory().available)
    cgroup = cgroup_available()
    return machine if cgroup is None else min(machine, cgroup)


class MemoryBudget:
    """The bytes that texts in flight may take."""

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes if max_bytes is not None else max(1, min(available_bytes() // 4, DEFAULT_BUDGET_CAP))
        self._process = psutil.Process()
        self._baseline: int | None = None

    def __repr__(self) -> str:
        return f"<MemoryBudget max_bytes={self.max_bytes} baseline={self._baseline}>"

    def rss(self) -> int:
        """Resident bytes of this process."""
        return int(self._process.memory_info().rss)

    def set_baseline(self, n_reserved: int = 0) -> None:
        """Measure growth from here: the model is loaded now, and `n_reserved` bytes are texts in flight."""
        self._baseline = max(0, self.rss() - n_reserved)

    def exceeded(self) -> bool:
        """True if the process has grown by more than the budget since the model was loaded."""
        return self._baseline is not None and self.rss() - self._baseline > self.max_bytes
