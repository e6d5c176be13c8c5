"""Results put back into the order of the input."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncembed.job.delivery import OrderBuffer


@given(order=st.integers(0, 40).flatmap(lambda n: st.permutations(range(n))), data=st.data())
def test_push_any_order_gives_the_order_of_the_input(order: list[int], data: st.DataObject) -> None:
    buffer: OrderBuffer[str] = OrderBuffer()
    out: list[str] = []
    came: set[int] = set()
    at = 0
    while at < len(order):
        size = data.draw(st.integers(0, 5)) if len(order) - at < 30 else 3
        part = order[at : at + size]
        out += buffer.push([(index, f"item {index}") for index in part])
        came |= set(part)
        at += size
        first_missing = next(index for index in range(len(order) + 1) if index not in came)
        assert len(out) == first_missing == buffer.next_index  # nothing is held that could go
        assert len(buffer) == len(came) - len(out)
    assert out == [f"item {index}" for index in range(len(order))]


def test_push_in_order_holds_nothing() -> None:
    buffer: OrderBuffer[int] = OrderBuffer()
    for index in range(10):
        assert buffer.push([(index, index)]) == [index]
        assert len(buffer) == 0


@pytest.mark.parametrize("again", [0, 2])
def test_push_position_twice_is_a_bug(again: int) -> None:
    buffer: OrderBuffer[int] = OrderBuffer()
    buffer.push([(0, 0), (2, 2)])
    with pytest.raises(AssertionError, match=f"position {again} came twice: this is a bug"):
        buffer.push([(again, 9)])
