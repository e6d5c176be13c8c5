"""What each format makes of good and of bad input, with the exact line."""

import csv
import json
import logging
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from asyncembed.errors import SourceError
from asyncembed.records import Rejected, Text
from asyncembed.sources import lines, read_texts

ADVICE = "; fix it, or go on without such rows with --on-bad-row skip"
BAD_E9 = "the byte 0xe9 is not UTF-8; was the file saved in another encoding? --encoding names it"
OBJECT = "an object where a text should be; jq 'map(.text)' FILE > texts.json makes texts of a list of objects"
NOT_JSON_ADVICE = "; expected one list of texts, or one object whose values are texts"

# Name, bytes of the file, options, what is read, its line, the reason, the content kept, the texts beside it.
BAD_ROWS = [
    ("a.txt", b"one\r\ncaf\xe9\ntwo\n", {}, 2, BAD_E9, "caf\ufffd", ["one", "two"]),
    ("a.csv", b'one,1\n"x\ny\xe9\n",2\ntwo\n', {}, 3, BAD_E9, "x\ny\ufffd\n,2", ["one", "two"]),
    ("a.csv", b'one,1\n"a "x" b",2\ntwo\n', {}, 2, "a quote inside a quoted cell is not doubled", None, ["one", "two"]),
    (
        "a.csv",
        b"one,1\na, b,2\ntwo,3\n",
        {},
        2,
        "3 cells, but the first row has 2: quote a cell that holds a delimiter; --input-format txt takes whole lines",
        "a, b,2",
        ["one", "two"],
    ),
    (
        "a.csv",
        b"id,text\n1,one\n2\n3,two\n",
        {"column": "text"},
        3,
        "1 cells, but the texts are in column 2",
        "2",
        ["one", "two"],
    ),
    ("a.json", b'["one",\n 12,\n"two"]', {}, 2, "a number where a text should be", "12", ["one", "two"]),
    ("a.json", b'["one",\n true,\n"two"]', {}, 2, "true or false where a text should be", "true", ["one", "two"]),
    ("a.json", b'["one",\n null,\n"two"]', {}, 2, "null where a text should be", "null", ["one", "two"]),
    ("a.json", b'["one",\n\n[["x"\n]],"two"]', {}, 3, "a list where a text should be", "…", ["one", "two"]),
    ("a.json", b'["one",\n{"k": ["x"]},"two"]', {}, 2, OBJECT, "…", ["one", "two"]),
    ("a.json", b'["one",\n"caf\xe9","two"]', {}, 2, BAD_E9, "caf\ufffd", ["one", "two"]),
]


@pytest.mark.parametrize(("name", "raw", "options", "line", "reason", "content", "texts"), BAD_ROWS)
def test_bad_row_stop_names_file_and_line(tmp_path, name, raw, options, line, reason, content, texts):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(SourceError) as caught:
        read_texts(path, **options)
    assert str(caught.value) == f"{path}:{line}: {reason}{ADVICE}"


@pytest.mark.parametrize(("name", "raw", "options", "line", "reason", "content", "texts"), BAD_ROWS)
def test_bad_row_skip_gives_it_and_goes_on(tmp_path, name, raw, options, line, reason, content, texts):
    path = tmp_path / name
    path.write_bytes(raw)
    reader = read_texts(path, on_bad_row="skip", **options)
    items = list(reader)
    assert [item.text for item in items if isinstance(item, Text)] == texts
    assert items[1] == Rejected(reason, line=line, content=content, skipped=True)
    assert (reader.n_bad, reader.n_texts) == (1, 2)


FATAL = [
    ("a.csv", b'one,1\n"a"b,2\ntwo\n', 2, "a quote inside a quoted cell is not doubled, and where the row ends cannot"),
    ("a.csv", b'one\nx,"never\nclosed\n', 2, "the row that begins here has a quote that is never closed"),
    ("a.json", b'["one",\n"two"\n', 2, "not JSON: the file ends in the middle"),
    ("a.json", b'["one",\n"tw', 2, "not JSON: the file ends in the middle"),
    ("a.json", b'["one"\n]\n["two"]', 3, "not JSON: something follows the end of the list or object"),
    ("a.json", b'{"a":\n"one"}\n{"b": "two"}\n', 3, "not JSON: something follows the end of the list or object"),
    ("a.json", b'["one",\n]', 2, "not JSON: "),
    ("a.json", b'["one"\n"two"]', 2, "not JSON: "),
    ("a.json", b'["one",\n"a\nb"]', 2, "not JSON: invalid character inside string"),
    ("a.json", b'["one",\nNaN]', 2, "not JSON: "),
    ("a.json", b'["one",\n\xe9]', 2, f"not JSON: {BAD_E9}"),
    ("a.json", b'["one",\n"\\\xe9"]', 2, "not JSON: "),
    ("a.json", b'["one",\n1' + b"0" * 5000 + b"]", 2, "not JSON: a number with too many digits"),
]


@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
@pytest.mark.parametrize(("name", "raw", "line", "message"), FATAL)
def test_broken_file_stops_even_with_skip(tmp_path, name, raw, line, message, on_bad_row):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(SourceError) as caught:
        read_texts(path, on_bad_row=on_bad_row)
    assert str(caught.value).startswith(f"{path}:{line}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'\n"one"', "2: a string alone"),
        (b"12", "1: a number alone"),
        (b"null", "1: null alone"),
        (b"tru", "1: not JSON"),
    ],
)
def test_json_scalar_at_the_top_is_refused(tmp_path, raw, message):
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    with pytest.raises(SourceError, match=f"a.json:{message}.*{NOT_JSON_ADVICE}"):
        list(read_texts(path))


def test_txt_lines_are_not_stripped_and_blanks_are_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf one \r\n\n \t\r\ntwo\rstill\x0btwo\x00\n\nthree\r")
    reader = read_texts(path)
    assert list(reader) == [Text(" one ", line=1), Text("two\rstill\x0btwo\0", line=4), Text("three\r", line=6)]
    assert reader.n_blank == 3


def test_csv_row_over_many_lines_has_the_line_where_it_begins(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbf"a ""b"", c\r\nd\0",x\r\n\r\n,y\r\nlast\r\n')
    reader = read_texts(path)
    assert list(reader) == [Text('a "b", c\r\nd\0', line=1), Text("last", line=5)]
    assert reader.n_blank == 2


def test_csv_cell_above_the_csv_module_s_limit_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"{'x' * 200_000},1\n")
    assert [len(item.text) for item in read_texts(path)] == [200_000]
    assert csv.field_size_limit() == 131_072  # which is everybody's, and stays as it is


@pytest.mark.parametrize("row", ["text", "id,title", "my_id,body,x"])
def test_csv_first_row_like_names_warns_once_and_is_a_text(tmp_path, caplog, row):
    path = tmp_path / "a.csv"
    path.write_text(f"{row}\na heron\n{row}\n")
    with caplog.at_level(logging.WARNING, "asyncembed"):
        assert len(list(read_texts(path))) == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: row 1 looks like column names and is taken as a text; --header skips it"
    ]


@pytest.mark.parametrize(
    ("row", "options"), [("A text.", {}), ("1 heron,2", {}), ("text", {"header": True}), ("hello", {})]
)
def test_csv_first_row_otherwise_does_not_warn(tmp_path, caplog, row, options):
    path = tmp_path / "a.csv"
    path.write_text(f"{row}\na boat\n")
    list(read_texts(path, **options))
    assert not caplog.records


def test_csv_header_skips_row_1_and_column_selects_by_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("\nid,text\nn1,one\n")
    assert list(read_texts(path, header=True)) == [Text("n1", line=3)]
    assert list(read_texts(path, column="text")) == [Text("one", line=3)]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"id,text\n1,2\n", "a.csv:1: no column 'body'; there are 'id', 'text'"),
        (b"\nbody,body\n1,2\n", "a.csv:2: more than one column 'body'; there are 'body', 'body'"),
        (b"id,t\xe9xt\n1,2\n", f"a.csv:1: {BAD_E9.split('?')[0]}"),
        (b"\n\n", "no texts in .*a.csv: it has not even a header row"),
    ],
)
def test_csv_unusable_header_raises_at_once(tmp_path, raw, message):
    path = tmp_path / "a.csv"
    path.write_bytes(raw)
    with pytest.raises(SourceError, match=message):
        read_texts(path, column="body", on_bad_row="skip")


def test_json_nested_without_end_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'["one",\n' + b"[" * 100_000)
    with pytest.raises(SourceError, match=r"a\.json:2: nested deeper than 100"):
        list(read_texts(path, on_bad_row="skip"))


def test_json_object_keeps_keys_and_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(
        b'\xef\xbb\xbf{"a": "one",\r\n"b":\n"two", "a": "three", "c": " ",\n"d": {"x": "y"}, "e": "four"}\n'
    )
    reader = read_texts(path, on_bad_row="skip")
    assert list(reader) == [
        Text("one", "a", 1),
        Text("two", "b", 3),
        Text("three", "a", 3),
        Rejected("an object where a text should be", "d", 4, "…", skipped=True),
        Text("four", "e", 4),
    ]
    assert reader.n_blank == 1


def test_json_line_longer_than_a_piece_with_escapes_everywhere(tmp_path):
    texts = ["\\" * n + "😀\ud83d\ude00"[: n % 4] + "é\udc00" for n in range(400)] * 20
    path = tmp_path / "a.json"
    path.write_text(json.dumps(texts))
    assert path.stat().st_size > 10 * 2**16
    # A high half followed by a low half in the JSON is one character: json.loads has the last word.
    assert [item.text for item in read_texts(path)] == json.loads(path.read_text())


def test_json_key_with_a_bad_byte_is_a_bad_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"k\xe9": "one", "b": "two"}')
    items = list(read_texts(path, on_bad_row="skip"))
    assert items == [Rejected(BAD_E9, "k\ufffd", 1, "one", skipped=True), Text("two", "b", 1)]


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(lines, "MAX_TEXT_BYTES", 10)


@pytest.mark.usefixtures("small_limit")
class TestTooLong:
    REASON = "more than 10 bytes in one text; split it, or look for a missing line end or quote"

    @pytest.mark.parametrize("end", ["\n", "\r\n", "", "x\n", "x" * 200_000 + "\r\n"])
    def test_txt_line_at_and_above_the_limit(self, tmp_path, end):
        path = tmp_path / "a.txt"
        path.write_bytes(b"x" * 10 + end.encode() + (b"after\n" if end.endswith("\n") else b""))
        items = list(read_texts(path, on_bad_row="skip"))
        if end.startswith("x"):
            assert isinstance(items[0], Rejected)
            assert (items[0].reason, items[0].line, items[0].content[:11]) == (self.REASON, 1, "x" * 11)
        else:
            assert items[0] == Text("x" * 10, line=1)
        assert items[1:] == ([Text("after", line=2)] if end.endswith("\n") else [])

    @pytest.mark.parametrize("row", [b"x" * 11 + b"\n", b'"12345\n67890\n"\n', b'"1\n2\n3\n4\n5\n6\n'])
    def test_csv_row_above_the_limit_stops_at_its_line(self, tmp_path, row):
        path = tmp_path / "a.csv"
        path.write_bytes(b"one\n" + row)
        with pytest.raises(SourceError, match=f"a.csv:2: {self.REASON}"):
            read_texts(path, on_bad_row="skip")

    @pytest.mark.parametrize("value", ["x" * 11, "x" * 200_000])
    def test_json_text_above_the_limit_stops(self, tmp_path, value):
        path = tmp_path / "a.json"
        path.write_text(f'["one",\n"{value}"]')
        with pytest.raises(SourceError, match=f"a.json:2: {self.REASON}"):
            read_texts(path, on_bad_row="skip")


def test_json_text_with_a_bad_byte_and_half_a_pair_is_a_bad_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'["a \\ud800 \\udfff \xff b", "after"]')
    bad, after = read_texts(path, on_bad_row="skip")
    assert (bad.content, after.text) == ("a \ufffd \ufffd \ufffd b", "after")


def test_bad_row_content_is_cut(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 20_000 + b"\xff\n")
    (item,) = read_texts(path, on_bad_row="skip")
    assert item.content == "x" * 10_000


every_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
any_text = st.text(st.characters(exclude_categories=["Cs"]))


def read_or_error(path: Path, on_bad_row: str) -> list[Text | Rejected] | SourceError:
    try:
        return list(read_texts(path, on_bad_row=on_bad_row))
    except SourceError as error:
        return error


def not_blank(texts: list[str]) -> list[str]:
    return [text for text in texts if text.strip()]


@every_folder
@given(rows=st.lists(st.tuples(any_text, any_text), min_size=1), all_quoted=st.booleans())
def test_csv_round_trip(tmp_path: Path, rows, all_quoted):
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        # With "\n" as its line end csv leaves "\r" unquoted, which no reader can take for a part of the cell.
        dialect = {"quoting": csv.QUOTE_ALL, "lineterminator": "\n"} if all_quoted else {}
        writer = csv.writer(file, **dialect)
        writer.writerow(("first", "a text"))
        writer.writerows([cell.replace("\0", "") for cell in row] for row in rows)
    wanted = not_blank([row[1].replace("\0", "") for row in rows])
    if wanted:
        assert [item.text for item in read_texts(path, column="a text")] == wanted


@every_folder
@given(texts=st.dictionaries(st.text(), st.text()), ascii_only=st.booleans(), indent=st.sampled_from([None, 1]))
def test_json_round_trip(tmp_path: Path, texts, ascii_only, indent):
    path = tmp_path / "a.json"
    kept = {key: text for key, text in texts.items() if text.strip()}
    if not ascii_only:
        kept = {key: text for key, text in kept.items() if (key + text).isprintable()}
    kept["last"] = "text"
    path.write_text(json.dumps(kept, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
    assert {item.key: item.text for item in read_texts(path)} == kept
    path.write_text(json.dumps(list(kept.values()), ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
    assert [item.text for item in read_texts(path)] == list(kept.values())


@every_folder
@given(texts=st.lists(any_text), end=st.sampled_from(["\n", "\r\n"]))
def test_txt_round_trip(tmp_path: Path, texts, end):
    texts = [text.replace("\n", " ").rstrip("\r").lstrip("\ufeff") for text in [*texts, "last"]]
    path = tmp_path / "a.txt"
    path.write_bytes("".join(text + end for text in texts).encode())
    reader = read_texts(path)
    assert [item.text for item in reader] == not_blank(texts)
    assert reader.n_blank == len(texts) - len(not_blank(texts))


@every_folder
@given(raw=st.binary(min_size=1, max_size=200), suffix=st.sampled_from(["txt", "csv", "json"]), skip=st.booleans())
def test_any_bytes_give_texts_or_one_clear_error(tmp_path: Path, raw, suffix, skip):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(raw)
    items = read_or_error(path, "skip" if skip else "stop")
    if isinstance(items, SourceError):
        assert str(path) in str(items)
        assert "\n" not in str(items)
        return
    for item in items:
        assert item.line is not None
        if isinstance(item, Rejected):
            assert skip
            (item.content or "").encode()  # fit for a UTF-8 file


@pytest.mark.parametrize("rest", ['"', '"b', ' "]', '\n\n"\\', "n", "nul", "-", "1", "[", "]", "x", ',"b"', '"\\ud8'])
@pytest.mark.parametrize("whole", ['["a"]', '{"k": "a"}'])
def test_json_whatever_follows_the_end_is_refused(tmp_path, whole, rest):
    path = tmp_path / "a.json"
    path.write_text(whole + rest)
    with pytest.raises(SourceError, match="not JSON"):
        list(read_texts(path, on_bad_row="skip"))
    path.write_text(whole + " \n\t\r ")
    assert [item.text for item in read_texts(path)] == ["a"]


@every_folder
@example(raw='0]"', head="[")
@given(raw=st.text('[]{}",:\\ud8c01e\n \0é-t', max_size=60), head=st.sampled_from(["[", '["', '{"a":"', ""]))
def test_any_json_like_input_agrees_with_the_json_module(tmp_path: Path, raw, head):
    path = tmp_path / "a.json"
    path.write_text(head + raw, encoding="utf-8", newline="")
    try:
        value = json.loads(head + raw, parse_constant=refuse)
    except ValueError:
        value = None
    items = read_or_error(path, "skip")
    if isinstance(items, SourceError):
        assert not isinstance(value, (list, dict)) or "no texts in" in str(items)
    elif isinstance(value, list):
        texts = [item.text for item in items if isinstance(item, Text)]
        assert texts == [text for text in value if isinstance(text, str) and text.strip()]
    else:
        assert isinstance(value, dict)


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
