"""Help, version and mistakes of the server's command line: answered at once, in one line, without anything heavy."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from asyncembed.server.program import parse
from asyncembed.server.settings import ServerSettings
from tests.cli.running import ENVIRONMENT

from .running import PROGRAM

NOT_FOR_PARSING = ("torch", "transformers", "sentence_transformers", "numpy", "starlette", "uvicorn", "anyio")

PROBE = """
import sys
from asyncembed.server import main
sys.argv = ["asyncembed-server", *sys.argv[1:]]
try:
    code = main()
except SystemExit as end:
    code = end.code
print("code", code, "modules", *sorted(sys.modules))
"""

WITHOUT_EXTRA = "import sys; sys.modules['uvicorn'] = None\nfrom asyncembed.server import main\nsys.exit(main())"


def python(code: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--no-such-option"], ["--port", "x"]])
def test_parsing_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    done = python(PROBE, *arguments, folder=tmp_path)
    _, code, _, *modules = done.stdout.splitlines()[-1].split()
    assert code == ("0" if arguments[0] in ("--help", "--version") else "2")
    assert set(modules).isdisjoint(NOT_FOR_PARSING)


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    done = python(WITHOUT_EXTRA, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "asyncembed-server: error: uvicorn not installed; pip install 'asyncembed[server]' brings what is needed"
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--colour"], "--colour"),
        (["--max-body-bytes", "much"], "no amount of memory"),
        (["--api-key", " "], "the API key is empty"),
        (["--api-key", ""], "the API key is empty"),
        (["--dtype", "int3"], "int3"),
        (["--root-path", "https://example.org/embed"], "is no path"),
        (["--cors-origin", "app.example.org"], "is no origin"),
        (["--cors-origin", "https://app.example.org/page"], "is no origin"),
    ],
)
def test_mistake_is_one_line_and_exit_2(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [*PROGRAM, *arguments], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("asyncembed-server: error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_empty_key_in_the_environment_is_not_no_key(tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "ASYNCEMBED_API_KEY": ""}
    done = subprocess.run(PROGRAM, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the API key is empty; without --api-key and ASYNCEMBED_API_KEY everyone" in done.stderr
    assert done.stderr.count("\n") == 1


def test_every_option_reaches_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCEMBED_API_KEY", "of-the-environment")
    line = (
        "--model m --host 0.0.0.0 --port 9 --alias a --alias b --max-body-bytes 1KiB --max-inputs 3 "
        "--max-pending-bytes 1MB --cache-bytes 2MB --drain-s 4.5 --device cpu --backend torch --dtype float32 "
        "--long-texts error --truncate-dim 8 --token-limit 77 --allow-pickle --accept-token-ids "
        "--cors-origin https://App.example.org:8443/ --cors-origin '*' --root-path embed/ "
        "--task query --query-prompt 'query: ' --document-prompt ''"
    )
    found = parse(shlex.split(line))
    assert isinstance(found, ServerSettings)
    assert (found.model, found.host, found.port, found.aliases) == ("m", "0.0.0.0", 9, ("a", "b"))
    assert (found.max_body_bytes, found.max_inputs, found.drain_s) == (1024, 3, 4.5)
    assert found.api_key == "of-the-environment"
    assert (found.accept_token_ids, found.root_path) == (True, "/embed")
    assert found.cors_origins == ("https://app.example.org:8443", "*")
    expected = {
        "max_pending_bytes": 10**6, "cache_bytes": 2 * 10**6, "device": "cpu", "backend": "torch", "dtype": "float32",
        "long_texts": "error", "truncate_dim": 8, "token_limit": 77, "prompt": None,
        "allow_pickle": True, "task": "query", "query_prompt": "query: ", "document_prompt": "",
    }  # fmt: skip
    assert expected.items() <= dict(found.options).items()


def test_defaults_bind_to_this_machine_only_and_need_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASYNCEMBED_API_KEY", raising=False)
    found = parse([])
    assert isinstance(found, ServerSettings)
    assert (found.host, found.port, found.api_key) == ("127.0.0.1", 8000, None)
    assert (found.cors_origins, found.root_path, found.accept_token_ids) == ((), "", False)
    assert found.names == ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2")
