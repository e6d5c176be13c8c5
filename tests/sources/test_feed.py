"""The feed: any iterable as micro-batches, without blocking the loop."""

import asyncio
import collections
import enum
import io
import logging
import subprocess
import sys
import threading
from collections.abc import AsyncIterator

import pytest

from asyncembed.errors import ClosedError, OptionsError
from asyncembed.records import Rejected, Text
from asyncembed.sources import TextFeed, read_texts

THREAD = "asyncembed-source"


def feed_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


async def read_into(texts: list[str], feed: TextFeed) -> list[str]:
    async for batch in feed:
        texts += [item.text for item in batch]
    return texts


async def read_all(feed: TextFeed) -> list[str]:
    return await read_into([], feed)


async def agenerate(n: int):
    for i in range(n):
        yield str(i)


class Color(str, enum.Enum):
    RED = "red"


class Unprintable:
    def __repr__(self) -> str:
        raise ValueError("no")


class BySequence:
    def __getitem__(self, position: int) -> str:
        return ["a", "b"][position]


SOURCES = {
    "list": lambda: [str(i) for i in range(1000)],
    "tuple": lambda: tuple(str(i) for i in range(1000)),
    "generator": lambda: (str(i) for i in range(1000)),
    "iterator": lambda: map(str, range(1000)),
    "async generator": lambda: agenerate(1000),
}


@pytest.mark.parametrize("kind", SOURCES)
async def test_feed_any_iterable_gives_every_item_in_order(kind):
    async with TextFeed(SOURCES[kind](), max_items=64) as feed:
        batches = [batch async for batch in feed]
        assert [item.text for batch in batches for item in batch] == [str(i) for i in range(1000)]
        assert all(0 < len(batch) <= 64 for batch in batches)
        assert "ended pulled=1000 <Handoff items=0" in repr(feed)
        assert not feed_threads()  # gone at the end already, not only when closed
    assert "closed" in repr(feed)


async def test_feed_works_without_a_context_and_over_sequences():
    assert await read_all(TextFeed(BySequence())) == ["a", "b"]
    assert await read_all(TextFeed([])) == []
    assert not feed_threads()


async def test_feed_reads_a_file_and_closes_it_when_closed_early(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a\nb\nc\n")
    texts = read_texts(path)
    async with TextFeed(texts, max_items=1) as feed:
        assert await anext(feed) == [Text("a", line=1)]
    assert next(texts, None) is None
    assert not feed_threads()


async def test_feed_does_not_close_what_is_not_its_own():
    file = io.StringIO("a\nb\n")
    assert await read_all(TextFeed(file)) == ["a", "b"]
    assert not file.closed


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_feed_items_that_are_no_text_become_rejected_with_their_position(asynchronous):
    passed = Rejected("a bad row", line=3)
    given = ["a", b"b", None, 3, Text("t", "k"), Text(None, "key"), passed, Color.RED, Unprintable(), 10**5000]

    async def source():
        for item in given:
            yield item

    feed = TextFeed(source() if asynchronous else given)
    items = [item async for batch in feed for item in batch]
    assert items[0] == Text("a")
    assert items[1] == Rejected("item 1 of the input is bytes, not a str; decode it first", content="b'b'")
    assert items[2] == Rejected("item 2 of the input is None, not a str", content="None")
    assert items[3] == Rejected("item 3 of the input is an int, not a str", content="3")
    assert items[4] is given[4]
    assert items[5] == Rejected("item 5 of the input is None, not a str", key="key", content="None")
    assert items[6] is passed
    assert items[7] == Text("red")
    assert type(items[7].text) is str
    assert items[8] == Rejected("item 8 of the input is a Unprintable, not a str", content=items[8].content)
    assert items[9].reason == "item 9 of the input is an int, not a str"


def test_feed_of_a_dict_is_refused_as_its_keys_are_seldom_its_texts():
    with pytest.raises(OptionsError, match=r"gives its keys, not its texts; pass its values\(\), or Text"):
        TextFeed({"key": "a heron"})


@pytest.mark.parametrize("source", ["text", b"text", bytearray(b"text"), memoryview(b"text")])
def test_feed_of_a_single_text_is_refused(source):
    with pytest.raises(OptionsError, match=r"is one text, not an iterable of texts; pass \[text\], or read_texts"):
        TextFeed(source)


@pytest.mark.parametrize("source", [None, 5, Text("a"), object()])
def test_feed_of_no_iterable_is_refused(source):
    with pytest.raises(OptionsError, match="is no iterable of texts"):
        TextFeed(source)


@pytest.mark.parametrize("bounds", [{"max_items": 0}, {"max_bytes": 0}])
def test_feed_without_room_is_refused(bounds):
    with pytest.raises(OptionsError, match="at least 1"):
        TextFeed([], **bounds)


class Gate:
    """A source that stands still, and tells the loop that it does, before the items in `stops`."""

    def __init__(self, n: int, stops: set[int]) -> None:
        self.loop = asyncio.get_running_loop()
        self.n = n
        self.stops = stops
        self.reached = asyncio.Event()
        self.go_on = threading.Semaphore(0)
        self.pulled = 0
        self.closed_in: threading.Thread | None = None
        self.closed = threading.Event()

    def __call__(self):
        try:
            for i in range(self.n):
                if i in self.stops:
                    self.loop.call_soon_threadsafe(self.reached.set)
                    self.go_on.acquire()
                self.pulled += 1
                yield str(i)
        finally:
            self.closed_in = threading.current_thread()
            self.closed.set()


async def test_feed_blocking_source_does_not_block_the_loop_and_its_items_come_at_once():
    gate = Gate(2, stops={1})
    beats = 0
    released = asyncio.Event()

    async def heartbeat():
        nonlocal beats
        await gate.reached.wait()
        for _ in range(100):
            await asyncio.sleep(0)
            beats += 1
        released.set()
        gate.go_on.release()

    async with TextFeed(gate()) as feed:
        beating = asyncio.create_task(heartbeat())
        assert await anext(feed) == [Text("0")]  # the source stands still now, or soon
        assert not released.is_set()
        assert await anext(feed) == [Text("1")]
        assert beats == 100
        await beating


async def test_feed_fast_source_comes_in_full_batches():
    gate = Gate(21, stops={20})
    async with TextFeed(gate(), max_items=10) as feed:
        sizes = []
        while sum(sizes) < 20:
            sizes.append(len(await anext(feed)))
        gate.go_on.release()
        assert len(await anext(feed)) == 1
        assert sum(sizes) == 20
    gate = Gate(11, stops={10})
    async with TextFeed(gate(), max_items=100) as feed:
        await gate.reached.wait()
        assert len(await anext(feed)) == 10  # all there is, in one batch
        gate.go_on.release()


async def test_feed_reads_ahead_no_further_than_its_bounds():
    gate = Gate(1000, stops={6})
    async with TextFeed(gate(), max_items=5) as feed:
        for first in (0, 1):
            assert len(await anext(feed)) >= 1
            assert gate.pulled <= (first + 1) * 5 + 5
        gate.go_on.release()
    assert gate.pulled <= 15


async def test_feed_never_pulls_beyond_max_items_while_nobody_reads():
    full = threading.Event()
    pulled = 0

    def source():
        nonlocal pulled
        for i in range(100):
            pulled += 1
            if pulled == 5:
                full.set()
            yield str(i)

    async with TextFeed(source(), max_items=5) as feed:
        await asyncio.to_thread(full.wait)
        for _ in range(100):
            await asyncio.sleep(0)
        assert pulled == 5
        assert len(await anext(feed)) == 5
    assert pulled <= 10


async def test_feed_async_source_reads_ahead_no_further_than_its_bounds():
    pulled = 0

    async def source():
        nonlocal pulled
        while True:
            pulled += 1
            yield "x" * 10

    async with TextFeed(source(), max_items=1000, max_bytes=35) as feed:
        for _ in range(20):
            await asyncio.sleep(0)
        assert pulled == 4  # three held, one in hand
        assert [len(await anext(feed)), pulled] == [3, 4]


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_feed_batch_is_bounded_in_characters_and_a_larger_item_comes_alone(asynchronous):
    texts = ["a" * 4] * 5 + ["b" * 50] + ["c" * 4] * 5

    async def source():
        for text in texts:
            yield text

    async with TextFeed(source() if asynchronous else texts, max_bytes=10) as feed:
        batches = [[item.text for item in batch] async for batch in feed]
    assert [text for batch in batches for text in batch] == texts
    assert ["b" * 50] in batches
    assert all(len("".join(batch)) <= 10 for batch in batches if batch != ["b" * 50])


ERRORS = [ValueError("broken"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_feed_error_of_the_source_is_raised_unchanged_after_the_items_before_it(error):
    class Source(collections.abc.Iterator):
        left = 3

        def __next__(self):
            if not self.left:
                raise error
            self.left -= 1
            return "a"

    feed = TextFeed(Source())
    got: list[str] = []
    with pytest.raises(type(error)) as caught:
        await read_into(got, feed)
    assert caught.value is error
    assert got == ["a"] * 3
    assert await anext(feed, None) is None  # raised once, then at its end
    assert not feed_threads()


@pytest.mark.parametrize("error", [ValueError("broken"), LookupError("gone")], ids=lambda error: type(error).__name__)
async def test_feed_error_of_an_async_source_is_raised_unchanged_after_the_items_before_it(error):
    async def source():
        yield "a"
        yield "b"
        raise error

    feed = TextFeed(source())
    got: list[str] = []
    with pytest.raises(type(error)) as caught:
        await read_into(got, feed)
    assert caught.value is error
    assert got == ["a", "b"]
    assert await anext(feed, None) is None


class StopsStrangely:
    """Stops with the wrong kind of stop, in `iter` or in `next`."""

    def __init__(self, error: BaseException, *, at_once: bool) -> None:
        self.error = error
        self.at_once = at_once

    def __iter__(self):
        if self.at_once:
            raise self.error
        return self

    def __next__(self):
        raise self.error


class AsyncStopsStrangely(StopsStrangely):
    def __aiter__(self):
        return self.__iter__()

    async def __anext__(self):
        raise self.error


@pytest.mark.parametrize(
    "source",
    [
        StopsStrangely(StopIteration(), at_once=True),
        StopsStrangely(StopAsyncIteration(), at_once=True),
        StopsStrangely(StopAsyncIteration(), at_once=False),
        AsyncStopsStrangely(StopIteration(), at_once=True),
        AsyncStopsStrangely(StopAsyncIteration(), at_once=True),
    ],
)
async def test_feed_stop_raised_where_it_means_nothing_is_an_error(source):
    with pytest.raises(RuntimeError, match=r"Stop(Async)?Iteration"):
        await read_all(TextFeed(source))


async def test_feed_stop_iteration_in_an_async_next_is_an_error():
    with pytest.raises(RuntimeError, match="StopIteration"):
        await read_all(TextFeed(AsyncStopsStrangely(StopIteration(), at_once=False)))


async def test_feed_generator_is_iterated_and_closed_in_one_thread():
    ran_in: list[threading.Thread] = []
    gate = Gate(100, stops=set())

    def source():
        ran_in.append(threading.current_thread())
        yield from gate()

    async with TextFeed(source(), max_items=2) as feed:
        await anext(feed)
    assert gate.closed_in is ran_in[0]
    assert ran_in[0].name == THREAD
    assert ran_in[0].daemon
    assert not ran_in[0].is_alive()


async def test_feed_error_while_the_generator_is_closed_early_is_logged(caplog):
    def source():
        try:
            while True:
                yield "a"
        finally:
            raise ValueError("cursor lost")

    with caplog.at_level(logging.WARNING, "asyncembed"):
        async with TextFeed(source()) as feed:
            await anext(feed)
    assert [record.getMessage() for record in caplog.records] == [
        "the source of texts failed while it was closed: ValueError('cursor lost')"
    ]


async def test_feed_source_hanging_in_next_is_left_alone_and_closed_when_it_returns():
    gate = Gate(5, stops={1})
    feed = TextFeed(gate())
    async with feed:
        assert await anext(feed) == [Text("0")]
        await gate.reached.wait()
    (thread,) = feed_threads()
    with pytest.raises(ClosedError, match="has been closed"):
        await anext(feed)
    await feed.aclose()
    gate.go_on.release()
    await asyncio.to_thread(thread.join)
    assert gate.closed_in is thread
    assert gate.pulled == 2  # what it was about to give, and nothing more


def test_feed_source_that_returns_after_the_loop_has_closed_ends_quietly():
    gates: list[Gate] = []

    async def main():
        gates.append(Gate(5, stops={1}))
        async with TextFeed(gates[0]()) as feed:
            await anext(feed)
            await gates[0].reached.wait()

    asyncio.run(main())
    (thread,) = feed_threads()
    gates[0].go_on.release()
    thread.join()
    assert gates[0].closed.is_set()


async def test_feed_cancelled_reader_loses_nothing():
    gate = Gate(3, stops={1})
    async with TextFeed(gate()) as feed:
        assert await anext(feed) == [Text("0")]
        await gate.reached.wait()
        for _ in range(3):
            reader = asyncio.create_task(anext(feed))
            await asyncio.sleep(0)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
        gate.go_on.release()
        assert await read_all(feed) == ["1", "2"]


async def test_feed_closed_while_a_reader_waits_wakes_it():
    gate = Gate(3, stops={0})
    feed = TextFeed(gate())
    reader = asyncio.create_task(anext(feed))
    await gate.reached.wait()
    gate.go_on.release()
    await feed.aclose()
    with pytest.raises(ClosedError):
        await reader


async def test_feed_closed_before_it_began_never_touches_the_source():
    gate = Gate(3, stops=set())
    feed = TextFeed(gate())
    assert "not started" in repr(feed)
    await feed.aclose()
    with pytest.raises(ClosedError):
        await anext(feed)
    assert gate.pulled == 0


async def test_feed_async_source_is_closed_in_its_own_task_when_closed_early():
    tasks = []

    async def source():
        tasks.append(asyncio.current_task())
        try:
            yield "a"
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            tasks.append(asyncio.current_task())

    async with TextFeed(source()) as feed:
        assert await anext(feed) == [Text("a")]
    assert tasks[0] is tasks[1]
    assert tasks[0] is not asyncio.current_task()
    assert tasks[0].done()


async def test_feed_async_source_waiting_for_room_is_closed_at_once():
    closed = False

    async def source():
        nonlocal closed
        try:
            while True:
                yield "a"
        finally:
            closed = True

    async with TextFeed(source(), max_items=1) as feed:
        await anext(feed)
    assert closed


HANGING = """
import asyncio, sys, threading
from asyncembed.sources import TextFeed, read_texts

def hanging():
    yield "a"
    threading.Event().wait()

async def main():
    async with TextFeed({source}) as feed:
        print([item.text for item in await anext(feed)], flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("source", ["hanging()", 'read_texts("-")'])
def test_feed_source_that_hangs_does_not_hold_up_the_exit(source):
    script = HANGING.format(source=source)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as process:
        process.stdin.write(b"a\n")
        process.stdin.flush()  # and never closed: reading on hangs
        assert process.stdout.readline().strip() == b"['a']"
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == b""


async def test_error_of_the_source_outlives_a_cancelled_wait_for_its_end() -> None:
    async def source() -> AsyncIterator[str]:
        yield "a"
        raise ValueError("the source broke")

    feed = TextFeed(source())
    assert await anext(feed) == [Text("a")]
    stop, stopping = feed._stop, asyncio.Event()

    async def slow_stop() -> None:
        stopping.set()
        await asyncio.Event().wait()

    feed._stop = slow_stop  # type: ignore[method-assign]  # as long as a source's thread takes to end
    waiting = asyncio.ensure_future(feed.__anext__())
    await stopping.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    feed._stop = stop  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="the source broke"):
        await anext(feed)
