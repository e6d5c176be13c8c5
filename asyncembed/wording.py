"""Numbers, kinds of things and errors as messages put them."""

from __future__ import annotations


def plural(number: int, one: str, many: str | None = None) -> str:
    """A number and its noun: 1 text, 2,000 texts; `many` where an s is not enough."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def kind_of(value: object) -> str:
    """What something is: `an int`, `a list`; `None` and `bytes` have no article."""
    name = type(value).__name__
    if value is None or name == "bytes":
        return "None" if value is None else name
    return f"{'an' if name[:1].lower() in tuple('aeio') else 'a'} {name}"


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip()


def why_no_text(place: str, value: object) -> str:
    """What is wrong with something that stands where a `str` belongs."""
    hint = "; decode it first" if isinstance(value, bytes | bytearray | memoryview) else ""
    if hasattr(value, "as_py"):  # a cell of Arrow
        hint = "; pass the column's to_pylist()"
    return f"{place} is {kind_of(value)}, not a str{hint}"
