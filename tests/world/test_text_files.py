"""Files as other programs write them: read as they are meant, or refused with the option that reads them."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from asyncembed import OptionsError, SourceError, embed_stream, open_embeddings, read_texts
from asyncembed.records import Rejected, Text
from tests.cli.running import ENVIRONMENT, PROGRAM, run

SEMICOLONS = 'id;body\n7;"Dear harbour office, the crane squeaks; come"\n8;A boat\n'
LETTER = "Dear harbour office, the crane squeaks; come"


def texts_of(path: Path, **options: Any) -> list[str]:
    return [item.text for item in read_texts(path, **options) if isinstance(item, Text)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.csv"


# --- whole runs -------------------------------------------------------------------------------------------------------

REFUSED = [
    ("semicolons.csv", SEMICOLONS.encode(), [], "--delimiter ';'"),
    (
        "ids.csv",
        b"id,body\n7,Dear harbour office\n8,A boat\n",
        ["--header"],
        "--column NAME, by its name in the first row ('id', 'body')",
    ),
    ("wider.csv", b"id,text\n1,A boat\n2,Dear Sir, the crane squeaks\n", ["--column", "text"], "wider.csv:3: 3 cells"),
    ("returns.txt", b"one\rtwo\rthree\r", [], "carriage returns alone"),
    ("wide.txt", "one\ntwo\n".encode("utf-16-le"), [], "--encoding utf-16-le"),
    ("sheet.xlsx", b"PK\3\4", [], "save the sheet as CSV"),
    ("rows.json", b'{"id": "7", "body": "A boat"}\n{"id": "8", "body": "A crane"}\n', [], "jq -s 'map(.text)'"),
]


@pytest.mark.parametrize(("name", "raw", "options", "words"), REFUSED, ids=[row[0] for row in REFUSED])
def test_command_line_a_file_of_another_form_exits_2_with_nothing_saved(
    tmp_path: Path, name: str, raw: bytes, options: list[str], words: str
) -> None:
    (tmp_path / name).write_bytes(raw)
    done = run(name, *options, folder=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr
    assert not (tmp_path / "data").exists()


def test_command_line_options_of_files_read_what_they_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(('text;id\n"Größe \\"M\\", rot";7\nand, so on;8\n').encode("cp1252"))
    options = ["--delimiter", ";", "--escape", "\\", "--encoding", "cp1252", "--header"]
    done = run("a.csv", *options, "--quiet", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert {stored.text for stored in open_embeddings(tmp_path / "data")} == {'Größe "M", rot', "and, so on"}


def test_command_line_sentences_cut_at_commas_are_said_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("The crane squeaks, and the harbour sleeps.\nDear Sir, it is late.\nGo.\n")
    done = run("a.csv", "--dry-run", folder=tmp_path)
    assert done.returncode == 0
    assert done.stderr.count("warning") == 1
    assert "--input-format txt takes whole lines" in done.stderr


async def test_embed_stream_a_warning_of_the_file_is_logged_once(
    path: Path, caplog: pytest.LogCaptureFixture, encoder: Any
) -> None:
    path.write_text("doc-1,A boat\ndoc-2,A crane\n")
    with caplog.at_level(logging.WARNING, "asyncembed"):
        await embed_stream(read_texts(path), model=encoder, save_path=None)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "looks like ids, such as 'doc-1'" in said
    assert "--column" in said


# --- CSV: cells -------------------------------------------------------------------------------------------------------


def test_csv_row_with_more_cells_than_the_first_is_a_bad_row(path: Path) -> None:
    path.write_text("id,text\n1,A boat\n2,Dear Sir, the crane squeaks\n3,A heron\n")
    _, bad, _ = read_texts(path, column="text", on_bad_row="skip")
    assert isinstance(bad, Rejected)
    assert (bad.line, bad.content) == (3, "2,Dear Sir, the crane squeaks")
    assert "3 cells, but the first row has 2" in bad.reason


@pytest.mark.parametrize("row", ['x, "a, b"', ' "a",b', 'x,  "a"'])
def test_csv_quote_after_a_blank_is_a_bad_row(path: Path, row: str) -> None:
    path.write_text(f"text,n\nfirst,1\n{row}\nlast,2\n")
    items = list(read_texts(path, header=True, on_bad_row="skip"))
    assert [item.text for item in items if isinstance(item, Text)] == ["first", "last"]
    assert isinstance(items[1], Rejected)
    assert (items[1].line, items[1].reason[:19]) == (3, "a quote after a bla")


@pytest.mark.parametrize("cell", ['" ""a"""', '"a, ""b"""', '" x"', '"said "', 'he said "no"'])
def test_csv_blanks_and_quotes_that_are_right_are_read(path: Path, cell: str) -> None:
    path.write_text(f"text,n\n{cell},1\n")
    with path.open(newline="") as file:
        assert texts_of(path, header=True) == [list(csv.reader(file))[1][0]]


@pytest.mark.parametrize(
    "broken",
    [
        '"He said "hi", then\nleft",2\n',  # the cell goes on in the next line
        '"a 5" pipe",2\n"two\nlines",3\n',
        '"a 5" pipe\nmiddle",2\n',
        '"a "b" and "c\nmiddle\nd" e",2\n',
        'x, "a\nmiddle, b"\n',
    ],
)
def test_csv_skip_never_goes_on_within_a_broken_cell(path: Path, broken: str) -> None:
    path.write_text(f"text,n\nfirst,1\n{broken}last,4\n")
    with pytest.raises(SourceError, match=r"a.csv:3: .*where the row ends cannot be told|quote that is never closed"):
        read_texts(path, header=True, on_bad_row="skip")


def test_csv_skip_goes_on_after_a_broken_cell_that_surely_ended(path: Path) -> None:
    path.write_text('text,n\n"He said "hi", then left",2\nlast,4\n')
    assert texts_of(path, header=True, on_bad_row="skip") == ["last"]


def test_csv_carriage_return_in_an_unquoted_cell_is_text(path: Path) -> None:
    path.write_bytes(b"text,n\none\rtwo,1\nthree,2\n")  # as pandas writes it
    assert texts_of(path, column="text") == ["one\rtwo", "three"]


@pytest.mark.parametrize("end", [b"\r\n", b"\r\r\n", b"\n"])  # the second: text mode on Windows, without newline=""
def test_csv_line_ends_of_all_systems_end_rows(path: Path, end: bytes) -> None:
    path.write_bytes(end.join([b"n,text", b'1,"a, b"', b"2,c", b""]))
    assert texts_of(path, column="text") == ["a, b", "c"]


def test_csv_escape_reads_quotes_after_backslashes_and_is_named_where_they_stand(path: Path) -> None:
    path.write_text('text,n\n"He said \\"hi\\", then left",2\n')
    with pytest.raises(SourceError, match=r"--escape .* is for quotes after a backslash"):
        read_texts(path, header=True)
    assert texts_of(path, header=True, escape="\\") == ['He said "hi", then left']


# --- CSV: dialects ----------------------------------------------------------------------------------------------------

STOPS = [
    (SEMICOLONS, {}, "--delimiter ';'"),
    (SEMICOLONS, {"column": "body"}, "--delimiter ';'"),
    (SEMICOLONS, {"header": True}, "--delimiter ';'"),
    (SEMICOLONS.split("\n", 1)[1], {}, "--delimiter ';'"),
    ("id\tbody\n7\tA boat, moored\n8\tA crane\n", {}, "--delimiter tab"),
    ("7|A boat, moored\n8|A crane\n", {}, "--delimiter '|'"),
    ("id,body\n7,A boat\n", {}, "nothing but numbers, such as '7'.*--column"),
    ("7,A boat\n8,A crane\n", {}, "nothing but numbers"),
    (",body\n0,A boat\n1,A crane\n", {}, r"--column NAME, by its name in the first row \('', 'body'\)"),
    ("2024-01-31,A boat\n2024-02-01,A crane\n", {}, "nothing but numbers"),
    ("date;amount;text\n1.2.24;12,5;A boat\n2.2.24;13,5;A crane\n", {}, "--delimiter ';'"),
]


@pytest.mark.parametrize(("content", "options", "words"), STOPS)
def test_csv_rows_that_speak_for_another_form_stop(path: Path, content: str, options: Any, words: str) -> None:
    path.write_text(content)
    with pytest.raises(SourceError, match=words):
        read_texts(path, **options)


WARNINGS = [
    ("A boat; moored\nA crane; rusty\nA heron\n", "may be divided by ';'"),
    ("A boat, moored.\nA crane, rusty.\n", "--input-format txt"),
    ("doc-7,A boat\ndoc-8,A crane\n", "looks like ids"),
    ("7\n8\n", "nothing but numbers"),
    ("body,n\nA boat,7\n", "--header skips it"),
]


@pytest.mark.parametrize(("content", "words"), WARNINGS)
def test_csv_rows_that_may_be_meant_otherwise_warn_once(
    path: Path, caplog: pytest.LogCaptureFixture, content: str, words: str
) -> None:
    path.write_text(content)
    with caplog.at_level(logging.WARNING, "asyncembed"):
        assert len(texts_of(path)) == content.count("\n")
    (said,) = [record.getMessage() for record in caplog.records]
    assert words in said


SOUND = [
    ("A boat\nA crane\n", {}),
    ('"A boat, moored","a;b"\n"A crane; rusty","c;d"\n', {}),
    ("A boat,7\nA crane,8\n", {}),
    ("12 boats\n13 cranes\n", {}),
    ("id,body\n7,A boat\n", {"column": "id"}),
    ("7;A boat\n8;A crane\n", {"delimiter": ","}),
    ("数学 2,1\n物理 3,2\n", {}),
    ("👍,1\n👎,2\n", {}),
]


@pytest.mark.parametrize(("content", "options"), SOUND)
def test_csv_sound_rows_say_nothing(path: Path, caplog: pytest.LogCaptureFixture, content: str, options: Any) -> None:
    path.write_text(content, encoding="utf-8")
    with caplog.at_level(logging.WARNING, "asyncembed"):
        assert texts_of(path, **options)
    assert not caplog.records


@pytest.mark.parametrize("first", ["sep=;\r\n", '"sep=;"\n', "\ufeffSEP=;\r\n"])
def test_csv_sep_line_of_excel_names_the_delimiter(path: Path, first: str) -> None:
    path.write_text(first + SEMICOLONS, encoding="utf-8", newline="")
    items = list(read_texts(path, column="body"))
    assert items[0] == Text(LETTER, line=3)


@pytest.mark.parametrize("delimiter", ["tab", "\t", "\\t"])
def test_csv_delimiter_tab_goes_by_its_names(path: Path, delimiter: str) -> None:
    path.write_text(SEMICOLONS.replace(";", "\t"))
    assert texts_of(path, column="body", delimiter=delimiter)[1] == "A boat"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"delimiter": "||"}, "one character"),
        ({"delimiter": '"'}, "one character"),
        ({"escape": ""}, "one character"),
        ({"delimiter": ";", "escape": ";"}, "or the delimiter"),
        ({"escape": ","}, "or the delimiter"),
        ({"encoding": "rot13"}, "not known"),
        ({"encoding": "nope"}, "not known"),
        ({"input_format": "txt", "delimiter": ";"}, "--delimiter goes with CSV only"),
    ],
)
def test_read_texts_file_options_that_cannot_be_are_refused(path: Path, options: Any, words: str) -> None:
    path.write_text(SEMICOLONS)
    with pytest.raises(OptionsError, match=words):
        read_texts(path, **options)


def test_csv_from_a_pipe_or_a_plain_reader_is_looked_at_as_well(tmp_path: Path) -> None:
    class OnlyReads:
        """As a response of an object store: neither a peek nor a seek."""

        def __init__(self) -> None:
            file = io.BytesIO(SEMICOLONS.encode())
            self.read, self.readline = file.read, file.readline

    with pytest.raises(SourceError, match="--delimiter ';'"):
        read_texts(OnlyReads(), input_format="csv").__next__()  # type: ignore[arg-type]
    done = subprocess.run(
        [*PROGRAM, "-", "--input-format", "csv"],
        cwd=tmp_path, env=ENVIRONMENT, input=SEMICOLONS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--delimiter ';'" in done.stderr
    assert not list((tmp_path / "data").glob("embeddings_data/*"))


def test_csv_delimiter_that_no_row_has_is_said(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_text("id,body\n7,A boat\n")
    with caplog.at_level(logging.WARNING, "asyncembed"):
        assert texts_of(path, delimiter=";") == ["id,body", "7,A boat"]
    assert ["no row has the delimiter ';'" in record.getMessage() for record in caplog.records] == [True]


def test_read_texts_torn_gzip_and_text_mode_wrappers_are_one_clear_error() -> None:
    packed = gzip.compress(b"A boat\n" * 100_000 + bytes(range(256)) * 99)
    with pytest.raises(SourceError, match=r"the open file:\d+: cannot be read further"):
        list(read_texts(gzip.GzipFile(fileobj=io.BytesIO(packed[:-40])), on_bad_row="skip"))  # type: ignore[arg-type]
    with tempfile.NamedTemporaryFile("w+") as file, pytest.raises(OptionsError, match="binary mode"):
        read_texts(file)  # type: ignore[arg-type]


# --- encodings and line ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json"])
def test_wide_encodings_are_told_and_read(tmp_path: Path, encoding: str, name: str) -> None:
    content = {"a.txt": "A boat\n数学 2\n", "a.csv": '"A boat",1\n数学 2,2\n', "a.json": '["A boat",\n"数学 2"]\n'}[
        name
    ]
    path = tmp_path / name
    path.write_bytes(content.encode(encoding))
    with pytest.raises(SourceError, match=f"--encoding {encoding} reads it"):
        read_texts(path, on_bad_row="skip")
    reader = read_texts(path, encoding=encoding)
    assert list(reader) == [Text("A boat", line=1), Text("数学 2", line=2)]
    assert reader.bytes_read == reader.bytes_total


@pytest.mark.parametrize("encoding", ["cp1252", "shift_jis", "gb18030", "latin-1", "koi8-r"])
def test_encoding_reads_files_larger_than_a_block(tmp_path: Path, encoding: str) -> None:
    letter = {"cp1252": "ü", "latin-1": "é", "koi8-r": "ж"}.get(encoding, "数")
    path = tmp_path / "a.txt"
    wanted = [f"{letter * (n % 50 + 1)} {n}" for n in range(8000)]
    path.write_bytes("\n".join(wanted).encode(encoding))
    assert texts_of(path, encoding=encoding) == wanted


def test_encoding_a_byte_that_is_not_of_it_is_a_bad_row_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\nca\x81\x8df\xe9\ntwo\n")
    one, bad, two = read_texts(path, encoding="cp1252", on_bad_row="skip")
    assert isinstance(bad, Rejected)
    assert (one.line, bad.line, two.line) == (1, 2, 3)  # type: ignore[union-attr]
    assert "not cp1252" in bad.reason


@pytest.mark.parametrize("raw", [b"one\rtwo", b"one\r", b"\xef\xbb\xbfone\rtwo\r"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
def test_carriage_returns_alone_stop_with_the_cure(tmp_path: Path, raw: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(SourceError, match=r"tr '\\r' '\\n'"):
        read_texts(tmp_path / name)


def test_carriage_return_within_a_line_of_txt_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\rtwo\nthree\rfour\n")
    with caplog.at_level(logging.WARNING, "asyncembed"):
        assert texts_of(path) == ["one\rtwo", "three\rfour"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}:1: a carriage return within the line is taken as part of the text"
    ]


@pytest.mark.parametrize(
    ("content", "option"),
    [
        ("id,body\n7,A boat\n", "csv"),
        ('["A boat",\n"A crane"]\n', "json"),
        ('{"body": "A boat"}\n{"body": "A crane"}\n', "json"),
        ("7\tA boat\n8\tA crane\n", "csv --delimiter tab"),
        ("one, two\n", None),
        ("A boat,\nA crane\n", None),
        ("one\ttwo\n", None),
    ],
)
def test_txt_that_looks_like_another_format_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str, option: str | None
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(content)
    with caplog.at_level(logging.WARNING, "asyncembed"):
        assert texts_of(path) == content.splitlines()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (option is not None)
    assert all(f"--input-format {option} reads it so" in words for words in said)


# --- other kinds of files ---------------------------------------------------------------------------------------------

BY_NAME = [
    ("a.xlsx", "a spreadsheet; save the sheet as CSV"),
    ("a.XLS", "a spreadsheet"),
    ("a.docx", "a document; save it as plain text"),
    ("a.pdf", "pdftotext"),
    ("a.csv.gz", "gzip -dc"),
    ("a.txt.zst", "zstd -dc"),
    ("a.zip", "unpack it"),
    ("a.parquet", "pandas"),
    ("a.jsonl", "jq -s 'map"),
    ("a.tsv", "--delimiter tab"),
    ("a.sqlite", "rows of a query"),
]


@pytest.mark.parametrize(("name", "words"), BY_NAME)
def test_read_texts_another_kind_of_file_by_its_name_is_refused_with_the_cure(
    tmp_path: Path, name: str, words: str
) -> None:
    (tmp_path / name).write_text("A boat\n")
    with pytest.raises(SourceError, match=words):
        read_texts(tmp_path / name)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "A boat")
    return file.getvalue()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (gzip.compress(b"A boat\n", mtime=0), "gzip -dc"),
        (bz2.compress(b"A boat\n"), "bzip2 -dc"),
        (zipped(), "zip archive"),
        (b"%PDF-1.7\n%\xe2\xe3\n", "PDF"),
        (b"PAR1\x15\x04\x15", "Parquet"),
        (b"SQLite format 3\0\x10", "database"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    ],
)
@pytest.mark.parametrize("form", ["txt", "csv", "json"])
def test_read_texts_another_kind_of_file_by_its_bytes_is_refused_with_the_cure(
    raw: bytes, words: str, form: Any
) -> None:
    with pytest.raises(SourceError, match=words):
        read_texts(io.BytesIO(raw), input_format=form, on_bad_row="skip")


# --- the first rows ---------------------------------------------------------------------------------------------------

ROWS = [{"id": "7", "body": "A boat"}, {"id": "8", "body": "A crane"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("\n".join(map(json.dumps, ROWS)), "jq -s 'map"),
        ("\n\n".join(json.dumps(row, indent=1) for row in ROWS), "something follows"),
        (json.dumps(ROWS), "jq 'map"),
        (json.dumps({"title": "A boat", "tags": ["a"]}), "a list where a text should be"),
        ('["A boat", "A crane"', "the file ends in the middle"),
    ],
)
def test_json_of_another_form_gives_no_text_before_it_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(SourceError, match=words):
        read_texts(path)


@pytest.mark.parametrize(
    ("name", "line", "raw"),
    [
        ("a.txt", b"A boat\n", b"caf\xe9\n"),
        ("a.csv", b"A boat,1\n", b"a,b,c\n"),
        ("a.json", b'"A boat",\n', b"12]"),
    ],
)
def test_bad_row_after_the_first_rows_stops_with_the_texts_before_it_given(
    tmp_path: Path, name: str, line: bytes, raw: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes((b"[" if name == "a.json" else b"") + line * 30_000 + raw)
    reader = read_texts(path)
    with pytest.raises(SourceError, match=f"{name}:30001: "):
        list(reader)
    assert reader.n_texts == 30_000


def test_csv_with_more_carriage_returns_than_lines_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file of an old Mac with one line feed in a cell is read as two rows."""
    path = tmp_path / "mac.csv"
    path.write_bytes(b'text\r"A\nheron"\rboat here\r')
    list(read_texts(path))
    assert "carriage returns are taken as parts of cells; if the lines end in carriage returns alone" in caplog.text
