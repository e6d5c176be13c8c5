"""A run: the job, its progress, its stop by a signal, and its end in words."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

from asyncembed.cli.console import TICK_S, Console, Exit, in_words
from asyncembed.cli.options import Request
from asyncembed.cli.signals import CTRL_C, Signals, leave
from asyncembed.errors import ClosedError
from asyncembed.job import JobParts
from asyncembed.records import Summary
from asyncembed.sources import FileTexts
from asyncembed.stream import EmbedStream
from asyncembed.wording import plural

MANY_UNKNOWN = 0.05
FEW_TOKENS = 20
"""Above this share and this number of unknown tokens the model is probably not made for the texts."""


LONG_S = 60.0
"""Seconds of a job from which on it is worth saying that another precision would be faster."""


def is_complete(summary: Summary) -> bool:
    """Whether every text has its vector and no bad row was passed over; blank ones do not count."""
    return not summary.failed and summary.skipped == summary.blank


def summary_lines(summary: Summary, source: str, texts: str | None = None) -> Iterator[str]:
    """The numbers in words."""
    yield _headline(summary, source)
    if summary.chunks:
        yield (
            f"  {plural(summary.tokens, 'token')} in {plural(summary.chunks, 'chunk')} and "
            f"{plural(summary.batches, 'batch', 'batches')}, {in_words(summary.seconds)} "
            f"({summary.tokens_per_second:,.0f} tokens/s), {summary.padding:.1%} padding; "
            f"{summary.model} on {summary.device} ({summary.backend}, {summary.dtype})"
        )
    if summary.ooms:
        yield f"  memory ran out {plural(summary.ooms, 'time')}; those batches were run again in parts"
    if summary.skipped:
        bad = summary.skipped - summary.blank
        parts = [plural(summary.blank, "blank row")] * bool(summary.blank) + [plural(bad, "bad row")] * bool(bad)
        yield f"  {' and '.join(parts)} skipped"
    if summary.save_path is not None and summary.embedded + summary.cached:
        yield from _way_back(summary, texts)
    if summary.stopped:
        yield "  stopped before the end of the input; the same command goes on from there"


def advice(summary: Summary) -> Iterator[str]:
    """What the user should know about, one line each."""
    bad = summary.skipped - summary.blank
    if summary.failed or bad:
        parts = [f"{plural(summary.failed, 'text')} failed"] * bool(summary.failed)
        parts += [f"{plural(bad, 'bad row')} skipped"] * bool(bad)
        where = f"{summary.save_path}/errors.jsonl" if summary.save_path is not None else "errors.jsonl"
        again = "; the same command tries failed texts again" if summary.failed else ""
        yield f"{' and '.join(parts)}: {where} says which and why{again}"
    if summary.dropped_tokens:
        yield (
            f"{plural(summary.dropped_tokens, 'token')} of long texts were cut off; "
            "--long-texts average (into another folder) embeds them"
        )
    # Those of texts that failed are counted as unknown, and not among the tokens.
    if summary.chunks and summary.unknown_tokens > max(FEW_TOKENS, MANY_UNKNOWN * summary.tokens):
        yield (
            f"{plural(summary.unknown_tokens, 'token')} unknown to the model, beside {summary.tokens:,} embedded: "
            "it is probably not made for these texts"
        )
    if summary.seconds >= LONG_S and (summary.backend, summary.dtype) == ("openvino", "float32"):
        from asyncembed.encoders.openvino_encoder import supported_dtypes

        able = supported_dtypes()
        # 1. a precision that changes next to nothing   2. one that changes a little
        if "bfloat16" in able:
            yield "--dtype bfloat16 (into another folder) would take two thirds of the time here, at a cosine of 0.9998"
        elif "int8" in able:
            yield "--dtype int8 (into another folder) would take half of the time here, at a cosine of 0.998 on average"


def _headline(summary: Summary, source: str) -> str:
    """What became of the texts."""
    # 1. Stopped at once. 2. Nothing new: say so plainly. 3. All else.
    if not summary.texts:
        return f"{source}: no text was done"
    if summary.cached and summary.texts == summary.cached + summary.duplicates:
        repeats = f" ({plural(summary.duplicates, 'repeat')} among them)" if summary.duplicates else ""
        return f"{source}: all {plural(summary.texts, 'text')} were there already{repeats}; nothing was computed again"
    parts = [f"{summary.embedded:,} embedded"]
    if summary.cached:
        parts.append(f"{summary.cached:,} already there")
    if summary.duplicates:
        parts.append(plural(summary.duplicates, "repeat"))
    if summary.failed:
        parts.append(f"{summary.failed:,} failed")
    return f"{source}: {plural(summary.texts, 'text')}: {', '.join(parts)}"


def _way_back(summary: Summary, texts: str | None) -> Iterator[str]:
    """How to read the results in Python: all that the folder holds, or those of this run's input alone."""
    folder = f"open_embeddings({summary.save_path!r})"
    # 1. Nothing else is there, or all of the input is not. 2. It can be read again. 3. It came through a pipe.
    if not summary.others or summary.stopped:
        yield f"  saved in {summary.save_path}; to read them back in Python:"
        yield f"    from asyncembed import open_embeddings; ids, vectors = {folder}.to_numpy()"
        return
    beside = f"  saved in {summary.save_path}, beside {plural(summary.others, 'text')} of other runs"
    if texts is not None:
        missing = ", missing='nan'" if summary.failed else ""
        yield f"{beside}; to read back these alone in Python, in the order of the input:"
        yield "    from asyncembed import open_embeddings, read_texts"
        yield f"    ids, vectors = {folder}.to_numpy({texts}, order='input'{missing})"
    else:
        yield f"{beside}: an input that is to be read back alone needs a folder of its own (-o); all of them in Python:"
        yield f"    from asyncembed import open_embeddings; ids, vectors = {folder}.to_numpy()"


ABANDON_S = 1.0
"""How long closing the folder may take when a run is stopped before its model is loaded."""


class Run:
    """One run, executed once."""

    def __init__(self, request: Request, texts: FileTexts, console: Console, signals: Signals) -> None:
        self._request = request
        self._texts = texts
        self._console = console
        self._signals = signals
        self._is_loaded = False
        self._abandoning: asyncio.Task[None] | None = None
        self._has_results = False
        self._ticking: asyncio.TimerHandle | None = None
        parts = JobParts(want_results=False, on_loaded=self._loaded, on_progress=self._results)
        self._stream = EmbedStream(texts, request.options, parts)

    def execute(self) -> int:
        """Run to the end, report, and return the exit code."""
        try:
            summary = asyncio.run(self._run())
        except Exception as error:
            summary = self._stream.summary
            self._report(summary, error)
            if summary.embedded and summary.save_path is not None and os.path.isdir(summary.save_path):
                self._console.say(f"saved before that: {plural(summary.embedded, 'text')}")
            raise
        self._report(summary, None)
        code = Exit.DONE if is_complete(summary) else Exit.INCOMPLETE
        return self._signals.exit_code or code

    async def _run(self) -> Summary:
        loop = asyncio.get_running_loop()
        try:
            with self._signals.stopping(loop, self._stop):
                self._console.display.loading(f"the model {self._request.options.model}")
                self._tick()
                return await self._stream.run()
        except (asyncio.CancelledError, ClosedError):
            if self._abandoning is None:
                raise
            summary = self._stream.summary
            summary.stopped = True
            return summary
        finally:
            if self._ticking is not None:
                self._ticking.cancel()
            self._console.display.close()

    def _tick(self) -> None:
        """By the clock, not by results: it costs the same however fast those come, and moves on while none come."""
        self._ticking = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        self._show_progress()

    def _loaded(self) -> None:
        self._is_loaded = True
        summary = self._stream.summary
        where = f"{summary.device}, {summary.backend}, {summary.dtype}"
        self._console.display.started(
            f"loaded {summary.model} ({where}); embedding {self._texts.name} into {self._request.options.save_path}"
        )

    def _results(self) -> None:
        """After each micro-batch. The display has a clock of its own."""
        if not self._has_results:
            self._has_results = True
            self._console.tell("the first results are saved")

    def _show_progress(self) -> None:
        display = self._console.display
        if not display.due():
            return
        if not self._is_loaded:
            display.update(None, f"still loading the model {self._request.options.model}")
            return
        summary = self._stream.summary
        words = f"{summary.texts:,} texts, {summary.tokens_per_second:,.0f} tokens/s, limit {summary.token_limit:,}"
        share = share_done(self._texts, summary.texts, self._request.limit)
        display.update(share, f"{words}, {summary.failed:,} failed")

    def _stop(self) -> None:
        """The first signal, on the event loop."""
        who = self._signals.name
        if self._is_loaded:
            again = "press again to leave at once" if who == CTRL_C else "a second one leaves at once"
            self._console.say(f"{who}: finishing the batch in hand; {again}")
            self._stream.stop()
            return
        self._console.say(f"{who}: leaving; nothing was computed yet")
        self._abandoning = asyncio.get_running_loop().create_task(self._abandon(), name="asyncembed-abandon")

    async def _abandon(self) -> None:
        """Leave while the model is being loaded.

        Closing cancels the job, which gives the folder back first and then waits for the thread that loads: that
        cannot be interrupted and has nothing to save, so it is not waited for.
        """
        closing = asyncio.get_running_loop().create_task(self._stream.aclose(), name="asyncembed-close")
        await asyncio.wait([closing], timeout=ABANDON_S)
        summary = self._stream.summary
        summary.stopped = True
        self._report(summary, None)
        leave(self._signals.exit_code or Exit.CANNOT)

    def _report(self, summary: Summary, error: Exception | None) -> None:
        console = self._console
        console.display.close()
        if self._request.as_json:
            console.result({**summary.as_dict(), "error": None if error is None else str(error)})
        elif error is None:
            console.results(summary_lines(summary, self._texts.name, self._request.texts_in_python()))
        if error is None:
            for line in advice(summary):
                console.warn(line)


def share_done(texts: FileTexts, n_done: int, limit: int | None) -> float | None:
    """How much of the input is done, from 0 to 1; None if its length is not known.

    The file is read ahead, so the share of its bytes that was read is scaled down to the texts that have their result.
    """
    done_of_read = n_done / texts.n_texts if texts.n_texts else 0.0
    shares = []
    if texts.bytes_total:
        shares.append(texts.bytes_read / texts.bytes_total * done_of_read)
    if limit is not None:
        shares.append(n_done / limit)
    return min(1.0, max(shares)) if shares else None
