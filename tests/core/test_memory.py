"""How much memory there is: read from folders laid out like the kernel's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from asyncembed.memory import DEFAULT_BUDGET_CAP, MemoryBudget, available_bytes, cgroup_available, memory_bound

MIB = 1 << 20


class Kernel:
    """Two folders that stand where `/sys/fs/cgroup` and `/proc` do."""

    def __init__(self, folder: Path) -> None:
        self.root, self.proc = folder / "cgroup", folder / "proc"
        self.root.mkdir()
        (self.proc / "self").mkdir(parents=True)

    def own(self, *lines: str) -> None:
        (self.proc / "self/cgroup").write_text("".join(f"{line}\n" for line in lines))

    def v2(self, path: str, limit: object, usage: object, inactive: int | None = None) -> None:
        folder = self.root / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{usage}\n")
        if inactive is not None:
            lines = ["anon 111", "file 5000", f"inactive_file {inactive}", "active_file 7", "total_inactive_file 1"]
            (folder / "memory.stat").write_text("\n".join(lines) + "\n")

    def v1(self, path: str, limit: object, usage: object, inactive: int | None = None) -> None:
        folder = self.root / "memory" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
        if inactive is not None:
            (folder / "memory.stat").write_text(f"cache 9\ninactive_file 1\ntotal_inactive_file {inactive}\n")

    def available(self) -> int | None:
        return cgroup_available(self.root, self.proc)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def test_cgroup_available_no_cgroups_is_none(kernel: Kernel) -> None:
    assert kernel.available() is None


def test_cgroup_available_v2_is_limit_less_usage(kernel: Kernel) -> None:
    kernel.own("0::/user/job")
    kernel.v2("user/job", 500 * MIB, 200 * MIB)
    assert kernel.available() == 300 * MIB


def test_cgroup_available_v2_page_cache_the_kernel_can_drop_is_free(kernel: Kernel) -> None:
    kernel.own("0::/job")
    kernel.v2("job", 500 * MIB, 400 * MIB, inactive=150 * MIB)
    assert kernel.available() == 250 * MIB


def test_cgroup_available_v2_tighter_parent_counts(kernel: Kernel) -> None:
    kernel.own("0::/a/b/c")
    kernel.v2("a/b/c", 900 * MIB, 100 * MIB)
    kernel.v2("a/b", "max", 200 * MIB)
    kernel.v2("a", 300 * MIB, 250 * MIB)
    assert kernel.available() == 50 * MIB


def test_cgroup_available_v2_sibling_does_not_count(kernel: Kernel) -> None:
    kernel.own("0::/a/b")
    kernel.v2("a/b", 900 * MIB, 100 * MIB)
    kernel.v2("a/x", 10 * MIB, 10 * MIB)
    assert kernel.available() == 800 * MIB


def test_cgroup_available_v2_own_namespace_reads_the_root(kernel: Kernel) -> None:
    kernel.own("0::/")
    kernel.v2("", 64 * MIB, 4 * MIB)
    assert kernel.available() == 60 * MIB


def test_cgroup_available_v2_max_everywhere_is_none(kernel: Kernel) -> None:
    kernel.own("0::/a")
    kernel.v2("a", "max", 5 * MIB)
    assert kernel.available() is None


def test_cgroup_available_v2_over_the_limit_is_zero(kernel: Kernel) -> None:
    kernel.own("0::/a")
    kernel.v2("a", 10 * MIB, 12 * MIB)
    assert kernel.available() == 0


def test_cgroup_available_v2_usage_missing_is_no_limit(kernel: Kernel) -> None:
    kernel.own("0::/a")
    kernel.v2("a", 10 * MIB, 2 * MIB)
    (kernel.root / "a/memory.current").unlink()
    assert kernel.available() is None


def test_cgroup_available_own_path_unreadable_reads_the_root(kernel: Kernel) -> None:
    kernel.v2("", 64 * MIB, 4 * MIB)
    assert kernel.available() == 60 * MIB


def test_cgroup_available_v1_is_limit_less_usage_with_droppable_cache(kernel: Kernel) -> None:
    kernel.own("5:cpu,cpuacct:/elsewhere", "4:memory:/docker/abc")
    kernel.v1("docker/abc", 700 * MIB, 600 * MIB, inactive=50 * MIB)
    assert kernel.available() == 150 * MIB


def test_cgroup_available_v1_huge_number_is_no_limit(kernel: Kernel) -> None:
    kernel.own("4:memory:/docker/abc")
    kernel.v1("docker/abc", 9223372036854771712, 600 * MIB)
    assert kernel.available() is None


def test_cgroup_available_v1_path_outside_the_container_reads_the_root(kernel: Kernel) -> None:
    """Without a namespace of its own a container sees the host's path, and its own files at the top."""
    kernel.own("4:memory:/docker/abc")
    kernel.v1("", 100 * MIB, 30 * MIB)
    assert kernel.available() == 70 * MIB


def test_cgroup_available_hybrid_reads_the_memory_controller_of_v1(kernel: Kernel) -> None:
    kernel.own("4:memory:/box", "1:name=systemd:/init", "0::/init/scope")
    (kernel.root / "unified/init/scope").mkdir(parents=True)
    kernel.v1("box", 80 * MIB, 30 * MIB)
    assert kernel.available() == 50 * MIB


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
    monkeypatch.setattr("asyncembed.memory.available_bytes", lambda: free)
    assert MemoryBudget().max_bytes == budget


def test_memory_budget_growth_counts_from_the_baseline() -> None:
    budget = MemoryBudget(32 * MIB)
    assert not budget.exceeded()  # no baseline yet: the model is still loading
    budget.set_baseline()
    assert not budget.exceeded()
    grown = bytearray(b"x" * (96 * MIB))
    assert budget.exceeded()
    assert len(grown) == 96 * MIB


def test_memory_bound_is_the_tightest_limit_on_the_way_up(kernel: Kernel) -> None:
    total = psutil.virtual_memory().total
    kernel.own("0::/a/b")
    kernel.v2("a/b", "max", 0)
    assert memory_bound(kernel.root, kernel.proc) <= total
    kernel.v2("a", 64 * MIB, 0)
    assert memory_bound(kernel.root, kernel.proc) == 64 * MIB
    kernel.own("4:memory:/box")
    kernel.v1("box", 32 * MIB, 0)
    assert memory_bound(kernel.root, kernel.proc) == 32 * MIB


_IN_A_CGROUP = """
import os, sys
import os
import subprocess
import sys
from pathlib import Path
(Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))
from asyncembed.memory import available_bytes, memory_bound
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
    program = "from asyncembed.memory import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert 0 < int(done.stdout) < len(ballast)
