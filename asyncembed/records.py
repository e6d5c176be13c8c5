"""The records that travel through the pipeline, and the numbers of a run."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil


@dataclass(slots=True)
class Summary:
    """The numbers of a run, live while it goes on; `texts == embedded + cached + duplicates + failed`.

    Attributes:
        texts: Texts taken from the input.
        embedded: Computed by this run.
        cached: Saved by an earlier run, not computed again.
        duplicates: Repeats within this run of a text it had computed.
        failed: Without a vector; the reasons are in `EmbedStream.failures` and `errors.jsonl`.
        others: Texts in the folder that are none of this run's input; None if they were not counted.
        skipped: Rows of a file that could not be a text, skipped on request, and blank ones.
        blank: How many of the skipped rows were only blank.
        chunks: Chunks of the embedded texts.
        tokens: Their tokens, without special tokens and prompt.
        dropped_tokens: Tokens cut off by `long_texts="truncate"`.
        unknown_tokens: Tokens that the model's vocabulary does not know.
        padding: Padded tokens that carried nothing, over those that did.
        batches: Batches that ran.
        ooms: Batches that ran out of memory and were retried in parts.
        token_limit: The limit of a batch at the end, in padded tokens.
        seconds: From the model being ready to the last record saved.
        total_seconds: From the start of the process, never more than a stopwatch outside says.
        tokens_per_second: `tokens / seconds`.
        peak_rss_bytes: Most resident memory of the process so far.
        device, backend, dtype, model: What computed.
        save_path: Where the results are; None if nothing was written.
        stopped: The run was stopped before its input ended; the same call goes on with it.
    """

    texts: int = 0
    embedded: int = 0
    cached: int = 0
    duplicates: int = 0
    failed: int = 0
    others: int | None = None
    skipped: int = 0
    blank: int = 0
    chunks: int = 0
    tokens: int = 0
    dropped_tokens: int = 0
    unknown_tokens: int = 0
    padding: float = 0.0
    batches: int = 0
    ooms: int = 0
    token_limit: int = 0
    seconds: float = 0.0
    total_seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_rss_bytes: int = 0
    device: str = ""
    backend: str = ""
    dtype: str = ""
    model: str = ""
    save_path: str | None = None
    stopped: bool = False

    def as_dict(self) -> dict[str, Any]:
        """All numbers by name, as `--json` prints them."""
        return asdict(self)


def process_seconds() -> float:
    """Seconds since this process was started, never more than passed."""
    if sys.platform != "linux":
        return max(0.0, time.time() - psutil.Process().create_time())
    # There psutil counts from the time of the boot in whole seconds. The 22nd field counts ticks, cut off, since then.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - (int(fields[19]) + 1) / os.sysconf("SC_CLK_TCK"))


FloatVector = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int32]


def text_id(text: str) -> str:
    """The name of a text: SHA-256 of its UTF-8 bytes in hex, 64 characters.

    Lone surrogates are encoded as they stand (`surrogatepass`), so every `str` has an id.
    """
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class TokenText:
    """A text given as token ids of the model's own vocabulary; make it with `of`. Equal ids are equal texts.

    Attributes:
        packed: The ids as int32 in the machine's order.
    """

    packed: bytes

    def __len__(self) -> int:
        return len(self.packed) // 4

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.ids[:8]))
        return f"<TokenText [{shown}{', …' if len(self) > 8 else ''}]>"

    @property
    def ids(self) -> TokenIds:
        """Shape `(n,)` int32."""
        return np.frombuffer(self.packed, np.int32)

    @classmethod
    def of(cls, ids: Sequence[int]) -> TokenText:
        """A text of these ids.

        Raises:
            OverflowError: One does not fit into 32 bits.
            TypeError: One is no whole number.
        """
        return cls(array("i", ids).tobytes())


AnyText = str | TokenText
"""What an app may ask for: a text as it is, or as token ids."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text as a source gives it.

    Attributes:
        text: What to embed.
        key: The caller's own name for it; kept in the index, many keys may lead to one text. A whole number is kept
            as its digits.
        line: The line of the input file it begins at, counted from 1; None outside files.
    """

    text: str
    key: str | None = None
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """An item of the input that cannot be a text.

    Attributes:
        reason: Why, for a person.
        key: The caller's own name for it, where there is one.
        line: The line of the input file it begins at, counted from 1; None outside files.
        content: What was read of it, for `errors.jsonl`.
        skipped: True for a row of a file that the user asked to skip: counted, never a record.
            False for an item of an iterable: it becomes a failed record.
    """

    reason: str
    key: str | None = None
    line: int | None = None
    content: str | None = None
    skipped: bool = False


SourceItem = Text | Rejected


@dataclass(slots=True, eq=False)
class Chunk:
    """A piece of a text that the model takes in one row. Made for every text, so not frozen, which takes longer.

    Attributes:
        work: The `Work` it is a piece of; None of one that only tries the model.
        ordinal: Position among the chunks of its text, from 0.
        text: The piece itself, without the prompt.
        start: Where it begins in the text, in characters.
        ids: Token ids with prompt and special tokens, shape `(length,)` int32: exactly a row of the model's input.
        n_tokens: Tokens without prompt and special tokens: the chunk's weight in the average.
        prompt: What stands before the piece in `ids`.
        task: Which of its routes or adapters the model takes; None for its default.
        is_cut: `ids` hold the beginning of `text` only, its first `n_tokens` tokens.
        length: Tokens of the row, prompt and special tokens included.
    """

    work: Any
    ordinal: int
    text: str
    start: int
    ids: TokenIds
    n_tokens: int
    prompt: str = ""
    task: str | None = None
    is_cut: bool = False
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = max(1, len(self.ids))  # a blank text of a model without special tokens has none


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedChunk:
    """A chunk with its vector, as it is stored.

    Attributes:
        text: The piece of the text.
        start: Where it begins in the text, in characters.
        n_tokens: Its tokens without prompt and special tokens.
        embedding: Shape `(dim,)` float32. For the only chunk of a text it is the text's own vector.
    """

    text: str
    start: int
    n_tokens: int
    embedding: FloatVector


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedText:
    """One result: every text of the input gives exactly one.

    Attributes:
        id: `text_id` of the text; empty for an item that is no text.
        index: Position in the input, from 0.
        key: The caller's own name for it.
        text: The text; empty for an item that is no text.
        embedding: Shape `(dim,)` float32, or None: it could not be made (`error` says why), or was not asked
            for (a job that only fills its folder does not read back what is there).
        chunks: The pieces it was embedded in, in order; one for most texts.
        n_tokens: Tokens of the text without prompt and special tokens, as embedded.
        error: Why there is no embedding, for a person; None if all went well.
        cached: True if an earlier run had made it.
        place: Where it stood in the input (`file.csv:12`), for failed texts of files.
    """

    id: str
    index: int
    key: str | None
    text: str
    embedding: FloatVector | None
    chunks: tuple[EmbeddedChunk, ...] = ()
    n_tokens: int = 0
    error: str | None = None
    cached: bool = False
    place: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Chunks that run together, padded to the longest of them.

    Attributes:
        chunks: The rows.
        is_small: It was cut for less than the limit of the time, and says nothing about that.
        pads: Rows are padded to the longest; if not, they cost no more than their own tokens.
    """

    chunks: tuple[Chunk, ...]
    is_small: bool = False
    pads: bool = True

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(chunk.length for chunk in self.chunks)

    @property
    def padded_tokens(self) -> int:
        """Rows × longest: what the device computes; without padding the tokens of the rows."""
        return len(self.chunks) * self.longest if self.pads else self.row_tokens

    @property
    def row_tokens(self) -> int:
        """Tokens of all rows without padding, prompt and special tokens included."""
        return sum(chunk.length for chunk in self.chunks)

    def halves(self) -> tuple[Batch, Batch]:
        """The batch in two, each with at least one row; its rows must be two or more."""
        middle = len(self.chunks) // 2
        if middle == 0:
            raise AssertionError("a batch of one chunk has no halves: this is a bug")
        return self.part(range(middle)), self.part(range(middle, len(self.chunks)))

    def part(self, rows: Sequence[int]) -> Batch:
        """Some of the rows, in a batch that is small."""
        return Batch(tuple(self.chunks[row] for row in rows), is_small=True, pads=self.pads)
