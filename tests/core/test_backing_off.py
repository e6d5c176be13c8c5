"""Memory that runs out while texts are tokenised costs the texts that do not fit, and no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncembed import embed_stream
from asyncembed.encoders import Tokenized
from asyncembed.engine.chunking import Chunker, chunk_backing_off
from asyncembed.engine.work import Client, Work
from tests.fakes import FakeEncoder, WordTokenizer


class NarrowTokenizer(WordTokenizer):
    """Has memory for so many characters in one call; each of the errors is one that a library raises."""

    def __init__(self, room: int, error: Exception | None = None) -> None:
        self.room = room
        self.error = error or MemoryError()
        self.sizes: list[int] = []

    def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
        self.sizes.append(sum(map(len, texts)))
        if self.sizes[-1] > self.room:
            raise self.error
        return super().tokenize(texts)


def chunker_with(tokenizer: NarrowTokenizer) -> Chunker:
    room, tokenizer.room = tokenizer.room, 10**9  # it also tokenises a probe or two when it is made
    made = Chunker(tokenizer, 64)
    tokenizer.room = room
    tokenizer.sizes.clear()
    return made


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), room=st.integers(1, 200))
def test_chunk_backing_off_only_texts_that_do_not_fit_alone_fail(lengths: list[int], room: int) -> None:
    tokenizer = NarrowTokenizer(room)
    works = [Work(Client(), "a" * length) for length in lengths]
    chunk_backing_off(chunker_with(tokenizer).chunk, works)
    for work in works:
        if len(work.text) > room:
            assert work.error is not None
            assert "does not fit into memory" in work.error
        else:
            assert work.error is None
            assert [chunk.work for chunk in work.chunks] == [work]
    assert len(tokenizer.sizes) <= 3 * len(works)  # halves, and each once more alone at most


def test_chunk_backing_off_memory_that_comes_back_fails_nothing() -> None:
    tokenizer = NarrowTokenizer(0)
    chunker = chunker_with(tokenizer)

    class Relenting(MemoryError):
        def __init__(self) -> None:
            tokenizer.room = 100  # a neighbour ended

    tokenizer.error = MemoryError()
    original = tokenizer.tokenize

    def tokenize(texts: Sequence[str]) -> list[Tokenized]:
        try:
            return original(texts)
        except MemoryError:
            raise Relenting() from None

    tokenizer.tokenize = tokenize  # type: ignore[method-assign]  # the memory changes between two calls
    work = Work(Client(), "a b c")
    chunk_backing_off(chunker.chunk, [work])
    assert work.error is None


def test_chunk_backing_off_another_error_is_not_hidden() -> None:
    def broken(_: Sequence[Work]) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        chunk_backing_off(broken, [Work(Client(), "a"), Work(Client(), "b")])


async def test_job_memory_that_runs_out_in_the_tokenizer_fails_the_large_text_alone(no_leftovers: None) -> None:
    tokenizer = NarrowTokenizer(10**9)

    class Narrow(FakeEncoder):
        def tokenizer(self) -> NarrowTokenizer:
            return tokenizer

    def texts() -> Iterator[str]:
        tokenizer.room = 60  # the chunker has been made by now, or will be: its own probes are shorter
        yield from ["short one", "x" * 70, "another", "word " * 9, "y" * 61]

    async with embed_stream(texts(), model=Narrow(), save_path=None, ordered=True) as stream:
        records = [record async for record in stream]
    assert [record.error is None for record in records] == [True, False, True, True, False]
    assert all("does not fit into memory" in record.error for record in records if record.error is not None)
