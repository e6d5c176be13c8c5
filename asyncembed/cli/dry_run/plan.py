"""The numbers of a dry run, and their words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from asyncembed.cli.progress import in_words
from asyncembed.wording import plural


@dataclass(slots=True)
class Plan:
    """What a run would have to do.

    Attributes:
        texts: Texts of the input.
        blank: Blank rows, which are passed over.
        bad_rows: Rows that could not be a text.
        repeats: Texts that repeat another of the input.
        cached: Texts that the folder holds already, repeats not counted.
        to_embed: Texts to compute.
        would_fail: Texts that cannot be embedded, as far as can be seen without the model.
        chunks, tokens: Of the texts to compute; tokens without special tokens and prompt.
        dropped_tokens: Tokens that `long_texts="truncate"` would cut off.
        unknown_tokens: Tokens that the model's vocabulary does not know.
        load_seconds: What loading the model took.
        seconds: Estimate for the texts to compute; None if nothing could be measured.
        tokens_per_second: The measured speed, in the same tokens.
        measured_tokens: Tokens it was measured on, special ones and prompt included.
        bytes, files: Estimate of what the results take of the file system; 0 if nothing is saved.
        free_bytes, free_files: What the file system has left; None where it does not say or nothing is saved.
        fits: Whether the results will fit.
        first_failure: Why the first of those that would fail would.
        refused: Why the folder would refuse this model or these options; None if it would not.
        model, device, backend, dtype, dim: What would compute, and the length of a vector.
        save_path: Where the results would be.
    """

    texts: int = 0
    blank: int = 0
    bad_rows: int = 0
    repeats: int = 0
    cached: int = 0
    to_embed: int = 0
    would_fail: int = 0
    chunks: int = 0
    tokens: int = 0
    dropped_tokens: int = 0
    unknown_tokens: int = 0
    load_seconds: float = 0.0
    seconds: float | None = None
    tokens_per_second: float | None = None
    measured_tokens: int = 0
    bytes: int = 0
    files: int = 0
    free_bytes: int | None = None
    free_files: int | None = None
    fits: bool = True
    refused: str | None = None
    model: str = ""
    device: str = ""
    backend: str = ""
    dtype: str = ""
    dim: int = 0
    save_path: str | None = None
    first_failure: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """All numbers by name, as `--json` prints them."""
        return {"dry_run": True, **asdict(self)}

    def lines(self, source: str) -> Iterator[str]:
        """The numbers in words."""
        yield "Dry run: nothing was embedded or written."
        passed_over = [plural(self.repeats, "repeat")] * bool(self.repeats)
        passed_over += [plural(self.blank, "blank row")] * bool(self.blank)
        passed_over += [plural(self.bad_rows, "bad row")] * bool(self.bad_rows)
        yield _row("input", f"{source}: {plural(self.texts, 'text')}" + "".join(f", {part}" for part in passed_over))
        if self.save_path is not None:
            already = f"{self.cached:,} of them are" if self.cached else "nothing is"
            yield _row("saved", f"{already} in {self.save_path} so far")
        work = f"{plural(self.to_embed, 'text')}: {plural(self.chunks, 'chunk')}, {plural(self.tokens, 'token')}"
        yield _row("to embed", work)
        yield _row("model", f"{self.model}, {self.dim} dimensions, on {self.device} ({self.backend}, {self.dtype})")
        if self.to_embed:
            yield _row("time", self._time())
        if self.to_embed and self.free_bytes is not None:
            yield _row("disk", self._disk())

    def warnings(self) -> Iterator[str]:
        """What stands in the way of the run, or of its being complete."""
        if not self.fits:
            yield (
                f"the results will not fit: they need {in_bytes(self.bytes)} and {self.files:,} files; there is room "
                f"for {in_bytes(self.free_bytes or 0)}" + self._and_files() + ". Choose another save path"
            )
        if self.would_fail:
            yield f"{plural(self.would_fail, 'text')} would fail, the first because {self.first_failure}"
        if self.dropped_tokens:
            yield f"{plural(self.dropped_tokens, 'token')} of long texts would be cut off"

    def _time(self) -> str:
        loading = f"after {in_words(self.load_seconds)} of loading"
        if self.seconds is None:
            return f"unknown: the model failed on the sample ({loading})"
        speed = f"{self.tokens_per_second:,.0f} tokens/s, measured on {plural(self.measured_tokens, 'token')} here"
        return f"about {in_words(self.seconds)} {loading}: {speed}"

    def _disk(self) -> str:
        need = f"about {in_bytes(self.bytes)} in {plural(self.files, 'file')}"
        return f"{need}; free: {in_bytes(self.free_bytes or 0)}{self._and_files()}"

    def _and_files(self) -> str:
        return "" if self.free_files is None else f" and {plural(self.free_files, 'file')}"


def in_bytes(number: int) -> str:
    """An amount for a person: 512 bytes, 1.6 MB, 12 GB."""
    amount = float(number)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if amount < 999.5 or unit == "TB":
            break
        amount /= 1000
    return f"{amount:,.0f} {unit}" if unit == "bytes" or amount >= 9.95 else f"{amount:.1f} {unit}"


def _row(name: str, words: str) -> str:
    return f"  {name:<9} {words}"
