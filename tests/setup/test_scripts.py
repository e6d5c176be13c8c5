"""bin/asyncembed and bin/test: real set-ups, of a tiny package without dependencies, which needs no network."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

NVIDIA = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg")

PYPROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "asyncembed"
version = "0"
"""

# A build backend in a page: a wheel that points to the tree, with fakes of the tools that bin/test runs.
BACKEND = """\
import os, pathlib, zipfile


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    if "FAKE_REACHED" in os.environ:  # a set-up that a test interrupts
        pathlib.Path(os.environ["FAKE_REACHED"]).write_text("reached")  # a pipe: the test reads it
        pathlib.Path(os.environ["FAKE_NEVER"]).read_text()  # a pipe: nobody writes to it
    files = {
        "asyncembed.pth": os.getcwd(),
        "asyncembed-0.dist-info/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        "asyncembed-0.dist-info/METADATA": "Metadata-Version: 2.1\\nName: asyncembed\\nVersion: 0\\n"
        + "Provides-Extra: test\\n",
        "asyncembed-0.dist-info/entry_points.txt": "[console_scripts]\\n"
        + "".join(f"{name} = asyncembed:main\\n" for name in ("asyncembed", "ruff", "mypy", "pytest")),
    }
    record = "".join(f"{name},,\\n" for name in (*files, "asyncembed-0.dist-info/RECORD"))
    files["asyncembed-0.dist-info/RECORD"] = record
    name = "asyncembed-0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(wheel_directory, name), "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
    return name


build_wheel = build_editable
"""

PACKAGE = """\
import json, os, sys


def main():
    name = os.path.basename(sys.argv[0])
    print(json.dumps({"name": name, "arguments": sys.argv[1:], "folder": os.getcwd()}))
    return 4 if name in os.environ.get("FAKE_FAILS", "").split() else 0
"""


def environment(**more: str) -> dict[str, str]:
    """The environment of a caller, without what the machine says about pip."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON", "FAKE_"))}
    return inherited | {
        "PIP_CONFIG_FILE": os.devnull,
        "PYTHON": sys.executable,
        "ASYNCEMBED_PIP_ARGS": "--no-index --no-build-isolation",
        **more,
    }


def make_tree(root: Path) -> Path:
    """A checkout in small, in a folder with a space in its name."""
    root = root / "a checkout"
    (root / "asyncembed").mkdir(parents=True)
    shutil.copytree(ROOT / "bin", root / "bin")
    (root / "constraints.txt").write_text("# nothing to pin\n")
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "backend.py").write_text(BACKEND)
    (root / "asyncembed" / "__init__.py").write_text(PACKAGE)
    return root


def call(program: Path, *arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *arguments], cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=110, check=False
    )


@pytest.fixture(scope="module")
def shared_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def tree(shared_tree: Path) -> Path:
    """A tree that is set up. Tests share it, for a set-up takes seconds; every test finds it made whole again."""
    assert call(shared_tree / "bin" / "asyncembed").returncode == 0
    return shared_tree


@pytest.mark.parametrize(
    "script", ["bin/asyncembed", "bin/asyncembed-server", "bin/bench", "bin/test", "bin/setup.sh", ".ci/run"]
)
def test_script_is_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True, timeout=30)
    assert script == "bin/setup.sh" or os.access(ROOT / script, os.X_OK)


# The first time ever it sets up this checkout for real, which takes minutes; under bin/test that has been done.
@pytest.mark.timeout(900)
def test_asyncembed_runs_from_another_folder_and_through_a_symlink(tmp_path: Path) -> None:
    link = tmp_path / "asyncembed"
    link.symlink_to(ROOT / "bin" / "asyncembed")
    direct, linked = (
        subprocess.run([program, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
        for program in (ROOT / "bin" / "asyncembed", link)
    )
    assert direct.stdout == linked.stdout
    assert "0.1" in direct.stdout


def test_first_call_sets_up_and_says_so_on_stderr_alone(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    first = call(tree / "bin" / "asyncembed", "notes.csv", "--column", "a b", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout) == {
        "name": "asyncembed",
        "arguments": ["notes.csv", "--column", "a b"],
        "folder": str(tmp_path.resolve()),
    }
    assert "NVIDIA" not in first.stderr  # pip was told what to take
    assert [line[:17] for line in first.stderr.splitlines() if "/3]" in line] == [
        f"asyncembed: [{step}/3]" for step in (1, 2, 3)
    ]


def test_first_call_without_the_right_to_write_says_so_in_one_sentence_and_makes_nothing(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("no right to mount a file system here")
    script = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; "$1/bin/asyncembed"'
    done = subprocess.run(
        [*unshare, "sh", "-ec", script, "sh", tree],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert done.stderr == (
        f"asyncembed: {tree} cannot be written to, and the set-up makes .venv there: let somebody who may write to it "
        "call this command once, or copy the checkout to a folder of your own.\n"
    )
    assert not (tree / ".venv").exists()


def test_first_call_without_an_nvidia_device_says_what_will_be_downloaded(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux") or any(map(os.path.exists, NVIDIA)):
        pytest.skip("there is an NVIDIA device, or no Linux")
    tree = make_tree(tmp_path)
    done = call(tree / "bin" / "asyncembed", ASYNCEMBED_PIP_ARGS="", PIP_NO_INDEX="1", PIP_NO_BUILD_ISOLATION="0")
    assert done.returncode == 0, done.stderr
    before, after = done.stderr.split("[1/3]")
    assert "there is no NVIDIA device here, yet pip will download PyTorch with CUDA" in before
    assert "PyTorch's Get Started page (https://pytorch.org/get-started/locally/)" in before
    assert "NVIDIA" not in after
    assert (
        "NVIDIA" not in call(make_tree(tmp_path / "other") / "bin" / "asyncembed").stderr
    )  # pip was told what to take


def test_second_call_says_nothing(tree: Path) -> None:
    second = call(tree / "bin" / "asyncembed")
    assert (second.returncode, second.stderr) == (0, "")


def test_call_through_symlinks_finds_the_tree(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "first").symlink_to(tree / "bin" / "asyncembed")
    (tmp_path / "second").symlink_to("bin/first")
    linked = call(tmp_path / "second", cwd=tmp_path)
    assert (linked.returncode, linked.stderr) == (0, "")
    assert json.loads(linked.stdout)["folder"] == str(tmp_path.resolve())


def test_modules_in_the_callers_folder_are_not_imported(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the folder of the caller')")
    assert call(tree / "bin" / "asyncembed", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("changed", ["constraints.txt", "pyproject.toml"])
def test_changed_file_installs_again_in_the_same_environment(tree: Path, changed: str) -> None:
    kept = tree / ".venv" / "kept"
    kept.touch()
    with (tree / changed).open("a") as file:
        file.write("# changed\n")
    again = call(tree / "bin" / "asyncembed")
    assert again.returncode == 0, again.stderr
    assert "setting up again" in again.stderr
    assert "[1/3] keeping" in again.stderr
    assert kept.exists()
    assert call(tree / "bin" / "asyncembed").stderr == ""


def test_missing_stamp_installs_again(tree: Path) -> None:
    (tree / ".venv" / ".stamp-run").unlink()
    again = call(tree / "bin" / "asyncembed")
    assert "[3/3] ready" in again.stderr
    assert call(tree / "bin" / "asyncembed").stderr == ""


@pytest.mark.parametrize("damage", ["python broken", "pip missing"])
def test_broken_environment_is_made_anew(tree: Path, damage: str) -> None:
    python = tree / ".venv" / "bin" / "python"
    if damage == "pip missing":
        shutil.rmtree(next((tree / ".venv" / "lib").glob("python*/site-packages/pip")))
        (tree / ".venv" / ".stamp-run").unlink()
    else:
        python.unlink()
        python.write_text("#!/bin/sh\nexit 1\n")
        python.chmod(0o755)
    again = call(tree / "bin" / "asyncembed")
    assert again.returncode == 0, again.stderr
    assert "removing .venv: its python or pip does not run" in again.stderr
    assert call(tree / "bin" / "asyncembed").stderr == ""


def test_moved_checkout_is_set_up_anew(tree: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tree, moved, symlinks=True)
    again = call(moved / "bin" / "asyncembed")
    assert again.returncode == 0, again.stderr
    assert f"removing .venv: it was made in {tree}" in again.stderr
    assert str(tree) not in (moved / ".venv" / "bin" / "asyncembed").read_text()


def test_interrupted_set_up_is_noticed_and_done_again(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    reached, never = tmp_path / "reached", tmp_path / "never"
    os.mkfifo(reached)
    os.mkfifo(never)
    with subprocess.Popen(
        [tree / "bin" / "asyncembed"],
        env=environment(FAKE_REACHED=str(reached), FAKE_NEVER=str(never)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
    ) as process:
        assert reached.read_text() == "reached"
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    assert "set-up interrupted; the next call starts it again" in stderr
    again = call(tree / "bin" / "asyncembed")
    assert again.returncode == 0, again.stderr
    assert "removing .venv: an earlier set-up was interrupted" in again.stderr


@pytest.mark.parametrize("lock", ["flock", "folder"])
def test_concurrent_first_calls_set_up_once(tmp_path: Path, lock: str) -> None:
    tree = make_tree(tmp_path)
    environ = environment()
    if lock == "folder":  # a machine without flock: a PATH of everything else
        (tmp_path / "path").mkdir()
        for folder in reversed(os.get_exec_path()):
            for program in Path(folder).glob("*"):
                link = tmp_path / "path" / program.name
                if program.name != "flock":
                    link.unlink(missing_ok=True)
                    link.symlink_to(program)
        environ["PATH"] = str(tmp_path / "path")
    calls = [
        subprocess.Popen(
            [tree / "bin" / "asyncembed"], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=110) for process in calls]
    assert [process.returncode for process in calls] == [0, 0, 0], outputs
    assert sum("[1/3] making" in stderr for _, stderr in outputs) == 1
    assert all(json.loads(stdout)["name"] == "asyncembed" for stdout, _ in outputs)
    assert not (tree / ".venv.lock.d").exists()


@pytest.mark.parametrize("python", ["/no/such/python", "false"])
def test_unsuitable_python_is_refused_by_name(tmp_path: Path, python: str) -> None:
    tree = make_tree(tmp_path)
    refused = call(tree / "bin" / "asyncembed", PYTHON=python)
    assert refused.returncode == 3
    assert refused.stdout == ""
    assert f"PYTHON={python} does not run; asyncembed needs python 3.10 or newer" in refused.stderr
    assert not (tree / ".venv").exists()


def test_failed_installation_ends_with_status_3_and_leaves_a_log(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    (tree / "pyproject.toml").write_text(PYPROJECT.replace('"backend"', '"no_such_backend"'))
    failed = call(tree / "bin" / "asyncembed")
    assert failed.returncode == 3
    assert failed.stdout == ""
    assert "setup.log" in failed.stderr
    assert "no_such_backend" in (tree / ".venv" / "setup.log").read_text()


def test_bin_test_runs_all_checks_though_one_fails(tree: Path, tmp_path: Path) -> None:
    failed = call(tree / "bin" / "test", "-k", "a b", cwd=tmp_path, FAKE_FAILS="ruff mypy")
    assert failed.returncode == 1
    runs = [json.loads(line) for line in failed.stdout.splitlines() if line.startswith("{")]
    assert [(run["name"], run["arguments"]) for run in runs] == [
        ("ruff", ["check", "."]),
        ("ruff", ["format", "--check", "."]),
        ("mypy", []),
        ("pytest", ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "-k", "a b"]),
    ]
    assert {run["folder"] for run in runs} == {str(tree)}
    assert "mypy (exit code 4)" in failed.stdout
    passed = call(tree / "bin" / "test")
    assert passed.returncode == 0
    assert passed.stderr == ""


def test_bin_test_set_up_serves_asyncembed_too(tree: Path) -> None:
    for stamp in (tree / ".venv").glob(".stamp-*"):
        stamp.unlink()
    assert call(tree / "bin" / "test").returncode == 0
    assert call(tree / "bin" / "asyncembed").stderr == ""
