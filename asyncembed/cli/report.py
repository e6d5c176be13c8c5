"""The end of a run in words."""

from __future__ import annotations

from collections.abc import Iterator

from asyncembed.cli.progress import in_words
from asyncembed.records import Summary
from asyncembed.wording import plural

MANY_UNKNOWN = 0.05
FEW_TOKENS = 20
"""Above this share and this number of unknown tokens the model is probably not made for the texts."""


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
