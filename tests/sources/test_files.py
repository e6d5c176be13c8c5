"""Reading files: what is the same for every format, and what is refused at once."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncembed.errors import ClosedError, OptionsError, SourceError
from asyncembed.records import Rejected, Text
from asyncembed.sources import read_texts

UNREADABLE = [
    ("missing.txt", "there is no such file"),
    ("folder", "is a directory"),
    ("folder.txt", "is a directory"),
    ("notes.md", r"cannot tell the format \(known: \.txt, \.csv, \.json\); name it with --input-format"),
    ("empty.txt", "no texts in .*empty.txt: it is empty"),
    ("empty.csv", "it is empty"),
    ("empty.json", "it is empty"),
    ("mark.txt", "it is empty"),
    ("nul\0.txt", "cannot be opened"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("folder", "folder.txt"):
        (tmp_path / name).mkdir()
    for name in ("empty.txt", "empty.csv", "empty.json"):
        (tmp_path / name).touch()
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "notes.md").write_text("a text\n")
    return tmp_path


@pytest.mark.parametrize(("name", "message"), UNREADABLE)
def test_read_texts_unreadable_source_raises_at_once(folder, name, message):
    with pytest.raises(SourceError, match=message):
        read_texts(folder / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_read_texts_without_permission_raises_at_once(folder):
    path = folder / "secret.txt"
    path.write_text("a\n")
    path.chmod(0)
    with pytest.raises(SourceError, match="Permission denied"):
        read_texts(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"column": "text"}, "--column goes with CSV only"),
        ({"header": True}, "--header goes with CSV only"),
        ({"input_format": "xml"}, "'auto', 'txt', 'csv', 'json'"),
        ({"on_bad_row": "ignore"}, "'stop', 'skip'"),
        ({"limit": 0}, "at least 1"),
        ({"limit": True}, "at least 1"),
    ],
)
def test_read_texts_impossible_options_raise_at_once(tmp_path, options, message):
    path = tmp_path / "a.txt"
    path.write_text("a\n")
    with pytest.raises(OptionsError, match=message):
        read_texts(path, **options)


@pytest.mark.parametrize("name", ["a.CSV", "a.Csv"])
def test_read_texts_extension_in_any_case_is_known(tmp_path, name):
    (tmp_path / name).write_text('"a,b",c\n')
    assert list(read_texts(tmp_path / name)) == [Text("a,b", line=1)]


def test_read_texts_input_format_overrides_extension(tmp_path):
    path = tmp_path / "a.md"
    path.write_text('{"k": "v"}')
    assert list(read_texts(str(path), input_format="json")) == [Text("v", "k", 1)]


def test_read_texts_limit_stops_without_reading_on(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntwo\n\xff\n")
    texts = read_texts(path, limit=2)
    assert [item.text for item in texts] == ["one", "two"]
    assert (texts.n_texts, texts.n_blank) == (2, 1)


def test_read_texts_progress_ends_at_the_size_of_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    texts = read_texts(path)
    assert list(texts) == [Text("one", line=1), Text("two", line=2)]
    assert texts.bytes_read == texts.bytes_total == 11


def test_read_texts_second_pass_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a\n")
    texts = read_texts(path)
    assert len(list(texts)) == 1
    assert next(texts, None) is None
    with pytest.raises(ClosedError, match="read_texts again"):
        iter(texts)
    assert "ended" in repr(texts)


def test_read_texts_close_is_idempotent_and_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a\nb\n")
    with read_texts(path) as texts:
        assert next(texts).text == "a"
    texts.close()
    assert next(texts, None) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", "\n \n\t\n"), ("a.csv", '\n"",\n , \n'), ("a.json", '["", " "]'), ("a.json", "[]"), ("b.json", " \n ")],
)
def test_read_texts_nothing_but_blanks_raises_at_the_end(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    texts = read_texts(tmp_path / name)
    with pytest.raises(SourceError, match=f"no texts in .*{name}"):
        list(texts)


def test_read_texts_nothing_but_skipped_rows_does_not_raise(tmp_path):
    (tmp_path / "a.json").write_text("[1, 2]")
    texts = read_texts(tmp_path / "a.json", on_bad_row="skip")
    assert [type(item) for item in texts] == [Rejected, Rejected]
    assert texts.n_bad == 2


@pytest.mark.parametrize("suffix", ["txt", "csv", "json"])
def test_read_texts_utf16_is_named(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes('["text"]\n'.encode("utf-16"))
    with pytest.raises(SourceError, match=f"a.{suffix}: this is UTF-16, not UTF-8; --encoding utf-16 reads it"):
        list(read_texts(path, on_bad_row="skip"))


def test_read_texts_open_binary_file_is_read_from_its_position_and_left_open(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"passed over\none\n")
    with path.open("rb") as file:
        file.readline()
        texts = read_texts(file)
        assert texts.bytes_total == 4
        assert list(texts) == [Text("one", line=1)]
        assert not file.closed
    with pytest.raises(SourceError, match="closed already"):
        read_texts(file)


def test_read_texts_buffer_in_memory_is_read():
    texts = read_texts(io.BytesIO(b"x"))
    assert texts.bytes_total == 1
    assert list(texts) == [Text("x", line=1)]
    with pytest.raises(SourceError, match="it is empty"):
        read_texts(io.BytesIO())


@pytest.mark.parametrize(
    ("source", "message"),
    [(io.StringIO("a"), "binary mode"), (b"bytes", "bytes cannot be read"), (None, "None cannot be read")],
)
def test_read_texts_what_is_no_binary_file_is_refused(source, message):
    with pytest.raises(OptionsError, match=message):
        read_texts(source)


def test_read_texts_unbuffered_file_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a\n")
    with path.open("rb", buffering=0) as file, pytest.raises(OptionsError, match="buffering=0"):
        read_texts(file)


def test_read_texts_file_closed_meanwhile_is_one_clear_error():
    file = io.BytesIO(b"a\n" * 200_000)
    texts = read_texts(file)
    assert next(texts) == Text("a", line=1)
    file.close()
    with pytest.raises(SourceError, match=r"the open file:\d+: cannot be read further"):
        list(texts)


def run_script(script: str, **standard_input) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, **standard_input)


READ_STANDARD_INPUT = """
from asyncembed.errors import AsyncEmbedError
from asyncembed.sources import read_texts
try:
    texts = read_texts("-")
    print([item.text for item in texts], texts.name, texts.bytes_total, texts.bytes_read)
except AsyncEmbedError as error:
    print(error)
"""


def test_read_texts_pipe_as_standard_input_has_no_known_size():
    done = run_script(READ_STANDARD_INPUT, input=b"one\ntwo")
    assert done.stdout.decode().strip() == "['one', 'two'] standard input None 7", done.stderr


def test_read_texts_file_as_standard_input_has_a_size(tmp_path):
    path = tmp_path / "a"
    path.write_text("one\n")
    with path.open("rb") as file:
        done = run_script(READ_STANDARD_INPUT, stdin=file)
    assert done.stdout.decode().strip() == "['one'] standard input 4 4", done.stderr


def test_read_texts_empty_standard_input_has_no_texts():
    assert run_script(READ_STANDARD_INPUT, input=b"").stdout.decode().strip() == "no texts in standard input"


def test_read_texts_pipe_of_csv_reads_its_header_only_when_asked():
    script = """
from asyncembed.sources import read_texts
texts = read_texts("-", input_format="csv", column="b")
print("made", flush=True)
print([item.text for item in texts])
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().strip() == b"made"
        rest, _ = process.communicate(b"a,b\n1,2\n", timeout=60)
    assert rest.strip() == b"['2']"
