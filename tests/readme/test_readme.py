"""Every command and every block of code in the README and in docs/ runs, page by page, in the order it stands there.

Each page has a folder of its own, which looks like a checkout.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from asyncembed import EmbedOptions
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [
    (name, number, kind, code)
    for name, text in TEXTS.items()
    for number, (kind, code) in enumerate(re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S))
    if kind != "text"
]
IS_THIS_RUN = "bin/test"  # the command that runs this very test


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each page that looks like a checkout, so that what the commands write lands in it."""
    folders = {}
    for name in TEXTS:
        folders[name] = folder = tmp_path_factory.mktemp("checkout")
        for link in ("bin", "examples"):
            (folder / link).symlink_to(ROOT / link)
        (folder / ".venv").symlink_to(Path(sys.prefix))
    return folders


def test_readme_is_short_and_begins_with_its_two_commands() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 250
    assert [code.strip() for name, _, _, code in BLOCKS if name == "README.md"][:2] == [
        "bin/asyncembed examples/notes.csv",
        IS_THIS_RUN,
    ]


def test_blocks_are_of_kinds_that_run() -> None:
    assert {kind for _, _, kind, _ in BLOCKS} == {"bash", "python"}
    fences = sum(text.count("\n```") for text in TEXTS.values())
    assert fences == 2 * sum(len(re.findall(r"^```\w+$", text, re.M)) for text in TEXTS.values())


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "number", "kind", "code"), BLOCKS, ids=[f"{name}-{at}" for name, at, _, _ in BLOCKS])
def test_block_runs(checkouts: dict[str, Path], name: str, number: int, kind: str, code: str) -> None:
    if code.strip() == IS_THIS_RUN:
        assert (ROOT / IS_THIS_RUN).stat().st_mode & 0o111
        return
    if kind == "python":
        command = [sys.executable, "-W", "error", "-c", code]
    else:
        command = ["bash", "-e", "-o", "pipefail", "-c", code]
    done = subprocess.run(
        command, cwd=checkouts[name], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(300)
def test_first_command_a_second_time_computes_nothing_and_says_so(checkouts: dict[str, Path]) -> None:
    command = ["bash", "-c", next(code for _, _, kind, code in BLOCKS if kind == "bash")]
    subprocess.run(command, cwd=checkouts["README.md"], capture_output=True, check=True)
    again = subprocess.run(command, cwd=checkouts["README.md"], capture_output=True, text=True, check=True)
    assert "nothing was computed again" in again.stdout


def options_in(table: str) -> set[str]:
    rows = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    return set(re.findall(r"`(\w+)`", rows))


def test_every_option_stands_in_the_table() -> None:
    assert options_in(TEXTS["options.md"]) == {field.name for field in fields(EmbedOptions)}


def test_short_table_is_a_part_of_the_long_one() -> None:
    short = [line for line in TEXTS["README.md"].splitlines() if line.startswith("| `")]
    assert len(short) >= 5
    assert set(short) <= set(TEXTS["options.md"].splitlines())


def heading_ids(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page.name]):
        path, _, heading = target.partition("#")
        found = (page.parent / path).resolve()
        assert found.is_relative_to(ROOT), target
        assert found.exists(), target
        assert not heading or heading in heading_ids(found.read_text(encoding="utf-8")), target


def test_readme_links_every_page() -> None:
    linked = set(re.findall(r"\]\(docs/([^)#]+)", TEXTS["README.md"]))
    assert linked == set(TEXTS) - {"README.md"}
