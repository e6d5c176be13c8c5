"""Texts that nobody wants and everybody gets, and what becomes of each with all-MiniLM-L6-v2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from asyncembed.encoders import FloatMatrix
from asyncembed.records import Batch

UNKNOWN = "vocabulary knows none"
NO_TOKENS = "no tokens"

HUGE = "x" * 10_000_000
"""Ten megabytes without a blank: fails as unknown."""

FAILING: dict[str, str] = {
    "x" * 300_000: UNKNOWN,
    "😀" * 100_000: UNKNOWN,
    "w" * 5_000: UNKNOWN,
    " ".join(["w" * 200] * 500): UNKNOWN,
    "e\u0301\u0323" * 30_000: UNKNOWN,
    "\x01\x02\x7f" * 50: NO_TOKENS,
    "\0\0": NO_TOKENS,
    "\u0301" * 1_000: NO_TOKENS,
    "\ufeff": NO_TOKENS,
    "\u200b" * 1_000: NO_TOKENS,
    "a MARK-NAN text": "NaN",
    "a MARK-INF text": "infinity",
    "a MARK-ZERO text": "zeros",
    "a MARK-RAISE text": "ValueError: it does not like this one",
}
"""Texts that fail, by the words of their reason; a file can hold them all."""

BLANK = ("", " \t\n ", "\u00a0\u3000\u2028")
"""Fail with no tokens where a program gives them; a file's blank rows are passed over and counted."""

SURROGATES = ("a lone \ud800 half", "\udfff", "reversed \udc00\ud800 halves")
"""Fail where a program or JSON gives them; no UTF-8 holds them."""

GOOD: tuple[str, ...] = (
    "a heron on the river",
    "שלום עולם, הספינה יוצאת מחר",
    "\u202eright to left by force\u202c",
    "مرحبا بالعالم " * 60,
    "a NUL\0in the middle",
    "a BOM \ufeff inside",
    "\ufeffa BOM in front",
    "re\u0301sume\u0301 in combining marks",
    "a" + "\u0301" * 10_000 + " zalgo",
    "bells \x07 and \x1b[31m escapes \x7f\x85",
    "carriage\rreturns\r\n\r\nand \u2028 line \u2029 separators",
    "known words and " + "y" * 100_000,
    "one, \"two\", 'three'; four\\ \\u0041 {} [] <b>",
    "../../etc/passwd",
    "noncharacters \uffff and \U0010ffff beside words",
)
"""Odd texts that can be embedded."""

DEAD = ("CUDA error: an illegal memory access was encountered", "device-side assert triggered",
        "UR_RESULT_ERROR_DEVICE_LOST")  # fmt: skip


class Poisonable:
    """The real model behind a wrapper that spoils marked rows, as an overflow or a bad kernel would."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        for name in ("name", "device", "backend", "dtype", "dim", "max_tokens", "prompt", "slots"):
            setattr(self, name, getattr(encoder, name))
        self.batches: list[Batch] = []

    def tokenizer(self) -> Any:
        return self._encoder.tokenizer()

    def start(self, batch: Batch) -> Any:
        if any("MARK-RAISE" in chunk.text for chunk in batch.chunks):
            raise ValueError("it does not like this one")
        if any("MARK-DEAD" in chunk.text for chunk in batch.chunks):
            raise RuntimeError(next(chunk.text for chunk in batch.chunks if "MARK-DEAD" in chunk.text))
        self.batches.append(batch)
        return batch, self._encoder.start(batch)

    def finish(self, handle: Any) -> FloatMatrix:
        batch, running = handle
        vectors = np.array(self._encoder.finish(running))
        for row, chunk in enumerate(batch.chunks):
            for mark, value in (("MARK-NAN", np.nan), ("MARK-INF", -np.inf)):
                if mark in chunk.text:
                    vectors[row, 7] = value
            if "MARK-ZERO" in chunk.text:
                vectors[row] = 0
        return vectors

    def free_memory(self) -> None:
        self._encoder.free_memory()

    def fingerprint(self) -> Mapping[str, Any]:
        return self._encoder.fingerprint()

    def made_with(self) -> Mapping[str, Any]:
        return self._encoder.made_with()
