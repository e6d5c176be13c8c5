"""Any bytes give the texts that are in them, or one clear error: held against parsers written for the test alone."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncembed import SourceError, read_texts
from tests.fuzzing import REFERENCES, SEEDS, check_reader, mutated

_forms = st.sampled_from(list(SEEDS))
_seeded = st.builds(
    lambda form, number: (form, mutated(random.Random(number).choice(SEEDS[form]), random.Random(number))),
    _forms,
    st.integers(0, 1 << 40),
)
_any = st.tuples(_forms, st.binary(max_size=80))
_letters = st.tuples(_forms, st.text('[]{}",:\\\n\r ud80a1é', max_size=40).map(str.encode))


@settings(deadline=None, max_examples=400)
@given(found=st.one_of(_seeded, _any, _letters), as_pipe=st.booleans())
def test_damaged_input_gives_its_texts_or_one_clear_error(found: tuple[str, bytes], as_pipe: bool) -> None:
    check_reader(*found, as_pipe=as_pipe)


@settings(deadline=None, max_examples=100)
@given(number=st.integers(0, 1 << 40), options=st.sampled_from([{"header": True}, {"column": "text"}, {"column": "x"}]))
def test_damaged_csv_with_a_header_never_breaks_the_reader(number: int, options: dict[str, Any]) -> None:
    rng = random.Random(number)
    try:
        for _ in read_texts(_file(mutated(SEEDS["csv"][0], rng)), input_format="csv", on_bad_row="skip", **options):
            pass
    except SourceError as error:
        assert "the open file" in str(error)  # noqa: PT017  # an error may come, and need not


def _file(raw: bytes) -> Any:
    import io

    return io.BytesIO(raw)


@pytest.mark.parametrize("form", SEEDS)
def test_seeds_are_read_whole_and_a_missing_text_is_seen(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail."""
    for raw in SEEDS[form]:
        assert REFERENCES[form](raw)
        check_reader(form, raw)
    reference = REFERENCES[form]
    monkeypatch.setitem(REFERENCES, form, lambda raw: [*(reference(raw) or []), "one more"])
    with pytest.raises(AssertionError, match="one more"):
        check_reader(form, SEEDS[form][-1])


@pytest.mark.parametrize(
    "beginning", [b"[", b'{"a":', b'["text", ', b'["a", {"b": '], ids=["lists", "objects", "in a list", "in an object"]
)
def test_nested_or_endless_json_is_refused_in_little_memory(tmp_path: Path, beginning: bytes) -> None:
    path = tmp_path / "deep.json"
    path.write_bytes(beginning * 3_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match=r"deep\.json:1: nested deeper than 100"):
            list(read_texts(path, on_bad_row="skip"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8_000_000
