"""The index: merged like a dict, opened by its first and last line, read as far as it goes when damaged."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncembed.errors import StoreError
from asyncembed.records import text_id
from asyncembed.sinks import index
from asyncembed.sinks.entries import completed_line, failed_line, key_line
from asyncembed.sinks.header import Header
from asyncembed.sinks.index import index_entries, index_state, write_index
from asyncembed.sinks.journal import Journal

HEADER = Header.of({"weights": "abc", "prompt": "query: é\n"}, {"backend": "torch"})
_numbers = st.integers(0, 12)
_keys = st.none() | st.text(max_size=4)
_events = st.lists(
    st.tuples(st.just("completed"), _numbers, _keys)
    | st.tuples(st.just("failed"), _numbers, _keys)
    | st.tuples(st.just("key"), _numbers, st.text(max_size=4))
    | st.tuples(st.just("torn"), _numbers, st.none()),
    max_size=15,
)


def _line(event: tuple[str, int, str | None]) -> bytes:
    kind, number, key = event
    identity = text_id(str(number))
    if kind == "completed":
        return completed_line(identity, number, 1, 100 + number, key)
    if kind == "failed":
        return failed_line(identity, 0, 0, "why", key)
    return key_line(identity, key or "") if kind == "key" else completed_line(identity, 9, 9, 9, None)[:-4] + b"\n"


def _apply(model: dict[str, dict[str, object]], keys: dict[str, list[str]], event: tuple[str, int, str | None]) -> None:
    kind, number, key = event
    identity = text_id(str(number))
    if key is not None and kind != "torn" and key not in keys.setdefault(identity, []):
        keys[identity].append(key)
    if kind == "completed":
        model[identity] = {"status": "completed", "n_tokens": number, "n_chunks": 1, "size": 100 + number}
    elif kind == "failed":
        model[identity] = {"status": "failed", "n_tokens": 0, "n_chunks": 0, "error": "why"}


@given(rounds=st.lists(_events, max_size=4), gone=st.sets(_numbers), block=st.sampled_from([1, 3, 4096]))
@settings(deadline=None)
def test_write_index_rounds_of_events_like_a_dict(rounds, gone: set[int], block: int) -> None:
    gone_ids = {text_id(str(number)) for number in gone}
    model: dict[str, dict[str, object]] = {}
    keys: dict[str, list[str]] = {}
    before, index._BLOCK = index._BLOCK, block
    try:
        with tempfile.TemporaryDirectory() as folder:
            path, journal = f"{folder}/i.json", Journal(f"{folder}/i.journal")
            for events in rounds:
                journal.start(HEADER)
                journal.append(b"".join(map(_line, events)))
                old = path if index_state(path).intact else None
                state = write_index(path, HEADER, old, journal.path, lambda ids: [i not in gone_ids for i in ids])
                journal.remove()
                for event in events:
                    _apply(model, keys, event)
                for identity in [i for i in model if model[i]["status"] == "completed" and i in gone_ids]:
                    del model[identity]
                keys = {identity: value for identity, value in keys.items() if identity in model}
                expected = dict(model)
                for identity, value in keys.items():
                    expected[identity] = {**model[identity], "key": value[0] if len(value) == 1 else value}
                written = json.loads(Path(path).read_bytes())
                assert written["texts"] == expected
                assert list(written["texts"]) == sorted(expected)
                assert dict(index_entries(path)) == expected
                assert state == index_state(path)
                assert state.header == HEADER
                assert written["n_completed"] == sum(e["status"] == "completed" for e in expected.values())
    finally:
        index._BLOCK = before


def _written(folder: Path, n: int = 5) -> Path:
    journal = Journal(str(folder / "i.journal"))
    journal.start(HEADER)
    journal.append(b"".join(_line(("completed", number, None)) for number in range(n)))
    write_index(str(folder / "i.json"), HEADER, None, journal.path, lambda ids: [True] * len(ids))
    journal.remove()
    return folder / "i.json"


def test_index_state_cut_at_any_byte_is_noticed_and_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = _written(tmp_path)
    whole = path.read_bytes()
    entries = dict(index_entries(str(path)))
    seen = set()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        state = index_state(str(path))
        assert not state.intact
        assert state.header in (None, HEADER, Header(HEADER.fingerprint, {}))
        read = dict(index_entries(str(path)))
        assert read.items() <= entries.items()
        seen.add(len(read))
    assert seen == set(range(6))


def test_index_state_reformatted_is_read_entry_by_entry(tmp_path: Path) -> None:
    path = _written(tmp_path)
    entries = dict(index_entries(str(path)))
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=4, sort_keys=True))
    state = index_state(str(path))
    assert (state.exists, state.intact, state.header) == (True, False, HEADER)
    assert dict(index_entries(str(path))) == entries


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 300, b"[1, 2]", b'{"texts": 5}', b"\xff\xfe", b'{"version":1,"texts":{\n']
)
def test_index_state_other_content_is_no_header(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "i.json"
    path.write_bytes(content)
    assert index_state(str(path)).header is None
    assert list(index_entries(str(path))) == []


def test_index_state_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = _written(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"version":1', b'"version":2', 1))
    with pytest.raises(StoreError, match="update asyncembed"):
        index_state(str(path))


def test_index_lines_damaged_line_is_passed_over(tmp_path: Path) -> None:
    path = _written(tmp_path)
    lines = path.read_bytes().split(b"\n")
    lines[2] = b"\0" * len(lines[2])
    path.write_bytes(b"\n".join(lines))
    assert index_state(str(path)).intact
    assert len(dict(index_entries(str(path)))) == 4
