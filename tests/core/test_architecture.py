"""The house: imports go down one list, nothing heavy is imported early, and no forbidden call is made."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import asyncembed

PACKAGE = Path(asyncembed.__file__).parent

# From top to bottom: a room imports from rooms below its own line, or from within itself. Rooms on one line do not
# know each other. A new room gets its line here.
ROOMS = [
    ["__main__"],
    ["server"],
    ["cli"],
    ["generator", "langchain"],
    ["steps"],
    ["stream"],
    ["job"],
    ["embedder"],
    ["engine"],
    ["sources", "store"],
    ["encoders"],
    ["cache", "threads"],
    ["records", "iterables"],
    ["options"],
    ["errors", "wording"],
]
LEVEL = {room: level for level, line in enumerate(ROOMS) for room in line}

HEAVY = {"torch", "sentence_transformers", "transformers", "langchain", "langchain_core", "langchain_text_splitters"}

WRITTEN_FOR = {"langchain.py": {"langchain_core"}}
"""Modules that nothing else imports, for those who have that library."""

# Calls that leave a task without an owner, poll, or write past the program's own console.
FORBIDDEN_CALLS = {"create_task", "ensure_future", "gather", "sleep", "print", "new_event_loop", "run_in_executor"}
EXCEPTIONS = {
    ("stream.py", "create_task"): "the driver of the job: kept, awaited and cancelled by the stream",
    ("embedder/embedder.py", "create_task"): "the driver of the engine: kept, awaited and cancelled by the embedder",
    ("sources/feed.py", "create_task"): "the puller of an async source: kept, awaited and cancelled by its owner",
    ("store/store.py", "ensure_future"): "a commit outlives the cancellation of the task that waits for it",
    ("cli/run.py", "create_task"): "the way out while the model is being loaded: kept, and ends with the process",
    ("threads.py", "new_event_loop"): "the loop of a thread of its own: closed there",
    ("cli/console.py", "print"): "the program's output",
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The path inside the package, with slashes."""
    return path.relative_to(PACKAGE).as_posix()


def dotted(path: Path) -> str:
    parts = ("asyncembed", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """The room that a module of the package belongs to; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports(node: ast.AST, *, into_functions: bool, into_type_checking: bool = True) -> Iterator[str]:
    """Dotted names of what is imported; `from a import b` gives `a` and `a.b`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
            continue
        if isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports hide where an arrow goes"
            yield from (child.module or "", *(f"{child.module}.{alias.name}" for alias in child.names))
            continue
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if (into_functions or not is_function) and (into_type_checking or not is_type_checking(child)):
            yield from imports(child, into_functions=into_functions, into_type_checking=into_type_checking)


def own_imports(path: Path) -> set[str]:
    """Modules of this package that a module imports, wherever it does so."""
    tree = ast.parse(path.read_text())
    known = {dotted(module) for module in MODULES}
    found = imports(tree, into_functions=True, into_type_checking=path != PACKAGE / "__init__.py")
    return {name for name in found if name in known and name != "asyncembed"}


def upward(path: Path, imported: set[str]) -> list[str]:
    """Imports of a module that do not go down."""
    room = room_of(dotted(path))
    if room is None:
        return []  # the package's own file names modules, and imports them when first used
    return [
        name
        for name in sorted(imported)
        if (target := room_of(name)) is not None and target != room and LEVEL[target] <= LEVEL[room]
    ]


def test_rooms_every_module_is_on_the_list_once() -> None:
    rooms = {room for path in MODULES if (room := room_of(dotted(path))) is not None}
    assert rooms - set(LEVEL) == set(), "a new module needs its place in ROOMS"
    assert len(LEVEL) == sum(map(len, ROOMS))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down_the_list_only(path: Path) -> None:
    assert upward(path, own_imports(path)) == []


def test_imports_of_one_line_or_going_up_are_seen() -> None:
    """The test above can fail."""
    base = PACKAGE / "encoders" / "base.py"
    assert upward(base, {"asyncembed.engine.heap", "asyncembed.encoders.failures", "asyncembed.records"}) == [
        "asyncembed.engine.heap",
    ]


def test_imports_form_no_circle() -> None:
    graph = {dotted(path): own_imports(path) - {dotted(path)} for path in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


MOST_ROOMS = 9
"""Rooms in a row, each of which imports the next: whoever follows a text passes no more of them."""


def test_longest_chain_of_imports_between_rooms_is_short() -> None:
    below: dict[str, set[str]] = {}
    for path in MODULES:
        room = room_of(dotted(path))
        if room is not None:
            targets = {target for name in own_imports(path) if (target := room_of(name)) is not None}
            below.setdefault(room, set()).update(targets - {room})

    @functools.cache
    def longest(room: str) -> tuple[str, ...]:
        return (room, *max(map(longest, below.get(room, ())), key=len, default=()))

    chain = max(map(longest, below), key=len)
    assert len(chain) <= MOST_ROOMS, " → ".join(chain)


def test_no_small_module_has_one_importer() -> None:
    """It belongs into that one."""
    importers = Counter(name for path in MODULES for name in own_imports(path))
    small = [path for path in MODULES if path.read_text(encoding="utf-8").count("\n") < 40]
    names = {dotted(path) for path in small if not path.name.startswith("__")}
    assert {name for name in names if importers[name] < 2} == set()


def test_package_itself_imports_nothing_of_its_own() -> None:
    assert own_imports(PACKAGE / "__init__.py") == set()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_imports_a_heavy_library_at_its_top(path: Path) -> None:
    tree = ast.parse(path.read_text())
    found = imports(tree, into_functions=False, into_type_checking=False)
    assert ({name.split(".")[0] for name in found} & HEAVY) - WRITTEN_FOR.get(name_of(path), set()) == set()


def test_import_of_the_package_loads_no_heavy_library() -> None:
    script = "import sys, asyncembed; sys.stdout.write(' '.join(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert "asyncembed" in loaded
    assert set(loaded) & (HEAVY | {"numpy", "tokenizers", "anyio"}) == set()


def calls(tree: ast.AST) -> set[str]:
    """Last names of what is called."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func
            found.add(name.attr if isinstance(name, ast.Attribute) else name.id if isinstance(name, ast.Name) else "")
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_forbidden_call(path: Path) -> None:
    found = calls(ast.parse(path.read_text())) & FORBIDDEN_CALLS
    assert {name for name in found if (name_of(path), name) not in EXCEPTIONS} == set()


@pytest.mark.parametrize(
    "source", ["import time\ntime.sleep(1)", "async def f():\n await asyncio.gather(a())", "print('x')"]
)
def test_forbidden_call_is_seen(source: str) -> None:
    assert calls(ast.parse(source)) & FORBIDDEN_CALLS


@pytest.mark.parametrize(("module", "name"), EXCEPTIONS)
def test_exceptions_are_still_needed(module: str, name: str) -> None:
    assert name in calls(ast.parse((PACKAGE / module).read_text()))


MOST_LINES, MOST_FILES = 17_170, 80
"""The package may shrink; whoever makes it grow raises these, and says in the commit who needs what was added."""


def test_house_is_no_larger_than_it_was_and_no_module_is_too_long() -> None:
    lines = {name_of(path): path.read_text(encoding="utf-8").count("\n") for path in MODULES}
    assert sum(lines.values()) <= MOST_LINES
    assert len(lines) <= MOST_FILES
    assert {name: n_lines for name, n_lines in lines.items() if n_lines > 480} == {}
