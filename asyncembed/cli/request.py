"""What the user asked for."""

from __future__ import annotations

from dataclasses import dataclass

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
