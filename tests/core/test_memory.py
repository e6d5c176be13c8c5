"""How much memory there is: read from folders laid out like the kernel's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from asyncembed.engine.memory import DEFAULT_BUDGET_CAP, MemoryBudget, available_bytes, cgroup_available, memory_bound

MIB = 1 << 20


LAYOUTS: dict[str, tuple[list[str], dict[str, Any], int | None]] = {
    "no cgroups": ([], {}, None),
    "v2: limit less usage": (["0::/user/job"], {"user/job": (500, 200)}, 300),
    "v2: cache that the kernel drops is free": (["0::/job"], {"job": (500, 400, 150)}, 250),
    "v2: a tighter parent counts": (["0::/a/b/c"], {"a/b/c": (900, 100), "a/b": ("max", 200), "a": (300, 250)}, 50),
    "v2: a sibling does not count": (["0::/a/b"], {"a/b": (900, 100), "a/x": (10, 10)}, 800),
    "v2: a namespace of its own reads the root": (["0::/"], {"": (64, 4)}, 60),
    "v2: no limit anywhere": (["0::/a"], {"a": ("max", 5)}, None),
    "v2: over the limit": (["0::/a"], {"a": (10, 12)}, 0),
    "v2: usage missing is no limit": (["0::/a"], {"a": (10, None)}, None),
    "own path unreadable reads the root": ([], {"": (64, 4)}, 60),
    "v1: limit less usage with cache that the kernel drops": (
        ["5:cpu,cpuacct:/elsewhere", "4:memory:/docker/abc"],
        {"memory/docker/abc": (700, 600, 50)},
        150,
    ),
    "v1: a huge number is no limit": (["4:memory:/docker/abc"], {"memory/docker/abc": (1 << 43, 600)}, None),
    # Without a namespace of its own a container sees the host's path, and its own files at the top.
    "v1: a path outside the container reads the root": (["4:memory:/docker/abc"], {"memory": (100, 30)}, 70),
    "hybrid: the memory controller of v1": (
        ["4:memory:/box", "1:name=systemd:/init", "0::/init/scope"],
        {"unified/init/scope": (None, None), "memory/box": (80, 30)},
        50,
    ),
}
"""Lines of this process's own cgroups, folders with limit, usage and cache in MiB, and the MiB that are available."""


def lay_out(tmp_path: Path, own: list[str], folders: dict[str, Any]) -> tuple[Path, Path]:
    """Two folders that stand where `/sys/fs/cgroup` and `/proc` do."""
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    (proc / "self").mkdir(parents=True, exist_ok=True)
    if own:
        (proc / "self/cgroup").write_text("".join(f"{line}\n" for line in own))
    for path, (limit, usage, *cache) in folders.items():
        folder = root / path
        folder.mkdir(parents=True, exist_ok=True)
        is_v1 = path.startswith("memory")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if is_v1 else ("memory.max", "memory.current")
        for name, amount in zip(names, (limit, usage), strict=True):
            if amount is not None:
                (folder / name).write_text(f"{amount * MIB if isinstance(amount, int) else amount}\n")
        if cache:
            counts = (1, cache[0] * MIB) if is_v1 else (cache[0] * MIB, 1)
            lines = ["anon 111", "file 5000", "inactive_file {}", "active_file 7", "total_inactive_file {}"]
            (folder / "memory.stat").write_text("\n".join(lines).format(*counts) + "\n")
    return root, proc


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cgroup_available_is_the_least_that_any_of_them_allows(layout: str, tmp_path: Path) -> None:
    own, folders, n_mib = LAYOUTS[layout]
    assert cgroup_available(*lay_out(tmp_path, own, folders)) == (None if n_mib is None else n_mib * MIB)


def test_cgroup_available_this_machine_is_a_number_or_none() -> None:
    found = cgroup_available()
    assert found is None or found >= 0
    assert 0 <= available_bytes() <= psutil.virtual_memory().total


def test_memory_budget_given_is_taken_as_it_is() -> None:
    assert MemoryBudget(12345).max_bytes == 12345


def test_memory_budget_default_is_a_quarter_of_what_is_free_and_two_gigabytes_at_most() -> None:
    budget = MemoryBudget().max_bytes
    assert 1 <= budget <= DEFAULT_BUDGET_CAP
    assert budget <= psutil.virtual_memory().total // 4


@pytest.mark.parametrize(("free", "budget"), [(400 * MIB, 100 * MIB), (64 << 30, DEFAULT_BUDGET_CAP), (0, 1)])
def test_memory_budget_default_follows_what_is_free(free: int, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncembed.engine.memory.available_bytes", lambda: free)
    assert MemoryBudget().max_bytes == budget


def test_memory_budget_growth_counts_from_the_baseline() -> None:
    budget = MemoryBudget(32 * MIB)
    assert not budget.exceeded()  # no baseline yet: the model is still loading
    budget.set_baseline()
    assert not budget.exceeded()
    grown = bytearray(b"x" * (96 * MIB))
    assert budget.exceeded()
    assert len(grown) == 96 * MIB


def test_memory_bound_is_the_tightest_limit_on_the_way_up(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    own = ["0::/a/b", "4:memory:/box"]
    assert memory_bound(*lay_out(tmp_path, own, {"a/b": ("max", 0)})) <= total
    assert memory_bound(*lay_out(tmp_path, own, {"a": (64, 0)})) == 64 * MIB
    assert memory_bound(*lay_out(tmp_path, own, {"memory/box": (32, 0)})) == 32 * MIB


_IN_A_CGROUP = """
import os, sys
from pathlib import Path
(Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))
from asyncembed.engine.memory import available_bytes, memory_bound
print(available_bytes(), memory_bound())
"""


def test_memory_of_a_real_cgroup_is_read() -> None:
    """A process in a cgroup of this machine, version 1 or 2, with a limit of 256 MiB."""
    root = Path("/sys/fs/cgroup")
    layouts = ((root / "memory", "memory.limit_in_bytes"), (root, "memory.max"))
    base, name = next(((base, name) for base, name in layouts if (base / "cgroup.procs").exists()), (None, ""))
    if base is None:
        pytest.skip("there is no cgroup hierarchy of memory here")
    folder = base / f"asyncembed-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        try:
            (folder / name).write_text(str(256 * MIB))
        except OSError as error:
            pytest.skip(f"a cgroup's memory cannot be limited here: {error}")
        done = subprocess.run(
            [sys.executable, "-c", _IN_A_CGROUP, str(folder)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        available, bound = map(int, done.stdout.split())
        assert bound == 256 * MIB
        assert 0 < available < 256 * MIB
    finally:
        folder.rmdir()


def test_peak_of_a_process_is_not_that_of_the_one_which_started_it() -> None:
    ballast = b"x" * (256 << 20)
    program = "from asyncembed.engine.memory import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert 0 < int(done.stdout) < len(ballast)
