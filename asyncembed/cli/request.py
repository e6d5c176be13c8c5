"""What the user asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from inspect import signature

from asyncembed.options import EmbedOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A command line, parsed.

    Attributes:
        input: A path, or `-` for standard input.
        options: The options of the job.
        limit: Stop after so many texts; None for no bound.
        dry_run: Count and estimate only.
        as_json: One JSON object on standard output instead of words.
        quiet: Neither progress nor summary.
        verbose: More messages, and tracebacks.
    """

    input: str
    options: EmbedOptions
    limit: int | None = None
    dry_run: bool = False
    as_json: bool = False
    quiet: bool = False
    verbose: bool = False

    def texts_in_python(self) -> str | None:
        """The call that reads the same texts in Python; None for what is gone: standard input, another pipe."""
        from asyncembed.sources import read_texts

        if not os.path.isfile(self.input):
            return None
        taken = signature(read_texts).parameters
        defaults = {field.name: field.default for field in fields(EmbedOptions)}
        chosen = {name: getattr(self.options, name) for name in defaults if name in taken}
        arguments = [f"{name}={value!r}" for name, value in chosen.items() if value != defaults[name]]
        arguments += [f"limit={self.limit}"] if self.limit is not None else []
        return f"read_texts({', '.join([repr(self.input), *arguments])})"
