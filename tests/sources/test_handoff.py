"""What waits between two threads is bounded in number and in characters."""

from __future__ import annotations

import threading

import pytest

from asyncembed import Text
from asyncembed.records import Rejected
from asyncembed.sources.feed import Handoff


def test_room_is_bounded_in_characters() -> None:
    handoff = Handoff(max_chars=10)
    assert handoff.put("x" * 8)
    assert handoff.has_room(2)
    assert not handoff.has_room(3)
    assert handoff.put(Text("yy", key="k"))
    assert handoff.n_chars == 10
    assert not handoff.has_room(1)
    assert handoff.take() == [Text("x" * 8), Text("yy", key="k")]
    assert handoff.n_chars == 0


def test_room_by_default_is_a_mebibyte() -> None:
    handoff = Handoff()
    handoff.put("x" * (1 << 19))
    assert handoff.has_room(1 << 19)
    assert not handoff.has_room((1 << 19) + 1)


def test_room_is_bounded_in_number() -> None:
    handoff = Handoff(max_items=2)
    handoff.put("")
    assert handoff.has_room(0)
    handoff.put("")
    assert not handoff.has_room(0)


def test_item_larger_than_the_bound_waits_alone() -> None:
    handoff = Handoff(max_chars=10)
    assert handoff.has_room(1000)
    handoff.put("x" * 1000)
    assert not handoff.has_room(1)


def test_item_that_is_no_text_is_held_as_a_short_description() -> None:
    handoff = Handoff()
    handoff.put("a")
    handoff.put(list(range(100_000)))
    handoff.finish()
    assert handoff.n_chars < 100
    _, rejected = handoff.take() or []
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "item 1 of the input is a list, not a str"
    assert handoff.take() is None


@pytest.mark.parametrize("size", [1, 7, 40])
def test_items_pass_between_threads_in_order_and_within_the_bound(size: int) -> None:
    handoff = Handoff(max_items=5, max_chars=20)
    given = [f"{number:0{size}d}" for number in range(500)]

    def fill() -> None:
        for item in given:
            handoff.put(item)
        handoff.finish()

    woken = threading.Event()
    handoff.attach(woken.set)
    thread = threading.Thread(target=fill)
    thread.start()
    found: list[str] = []
    while True:
        woken.clear()
        assert handoff.n_chars <= max(20, size)
        assert len(handoff) <= 5
        items = handoff.take()
        if items is None:
            break
        found += [item.text for item in items if isinstance(item, Text)]
        if not items:
            assert woken.wait(30)
    thread.join()
    assert found == given


def test_put_that_waits_for_room_ends_when_the_reader_closes() -> None:
    handoff = Handoff(max_chars=10)
    handoff.put("x" * 10)
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(handoff.put("y")))
    thread.start()
    handoff.close()
    thread.join()
    assert answers == [False]
    assert handoff.n_chars == 0


def test_end_wakes_the_reader_whom_an_interrupted_put_left_asleep() -> None:
    handoff, woken = Handoff(), threading.Event()

    def interrupted() -> None:
        handoff.attach(woken.set)
        raise TimeoutError  # as a signal handler may, between two steps of `put`

    handoff.attach(interrupted)
    assert handoff.take() == []
    with pytest.raises(TimeoutError):
        handoff.put("a")
    handoff.finish()
    assert woken.is_set()
