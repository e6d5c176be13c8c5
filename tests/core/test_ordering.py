"""Results put back into the order of the input."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncembed import Text
from asyncembed.job.job import Delivered, OrderBuffer
from asyncembed.job.lookup import Entry


def result(index: int) -> Delivered:
    entry = Entry(Text(f"item {index}"), index, 0)
    return entry, entry.record()


@given(order=st.integers(0, 40).flatmap(lambda n: st.permutations(range(n))), data=st.data())
def test_push_any_order_gives_the_order_of_the_input(order: list[int], data: st.DataObject) -> None:
    buffer = OrderBuffer()
    out: list[int] = []
    came: set[int] = set()
    at = 0
    while at < len(order):
        size = data.draw(st.integers(0, 5)) if len(order) - at < 30 else 3
        part = order[at : at + size]
        out += [record.index for _, record in buffer.push([result(index) for index in part])]
        came |= set(part)
        at += size
        first_missing = next(index for index in range(len(order) + 1) if index not in came)
        assert len(out) == first_missing == buffer.next_index  # nothing is held that could go
    assert out == list(range(len(order)))


def test_rest_gives_what_came_early_in_order() -> None:
    buffer = OrderBuffer()
    assert buffer.push([result(3), result(1)]) == []
    assert [record.index for _, record in buffer.rest()] == [1, 3]
    assert buffer.rest() == []
