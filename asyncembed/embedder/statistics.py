"""What an embedder says of itself in numbers."""

from __future__ import annotations

from typing import Literal, NamedTuple

State = Literal["new", "loading", "open", "closing", "closed", "broken"]


class EmbedderStatistics(NamedTuple):
    """What an embedder did, and what waits in it.

    Attributes:
        state: `new`, `loading`, `open`, `closing`, `closed` or `broken`.
        requests: Calls so far.
        texts: Texts of these calls that were let in.
        pending_requests: Calls without an answer.
        waiting_texts: Texts that wait for room.
        pending_bytes: What the texts under way have reserved.
        max_pending_bytes: What they may reserve.
        cache_bytes: What the cache holds.
        cache_hits: Texts answered from it.
        truncations: Texts that were computed without their end, by `long_texts="truncate"`.
        batches: Batches that ran, those of jobs on the same model included, as in all that follows.
        ooms: Batches that ran out of memory and were run again in parts.
        row_tokens: Tokens of all rows, without padding.
        padded_tokens: Tokens of all batches, with padding.
        waiting_chunks: Chunks that wait for the model.
        token_limit: The present limit of a batch in padded tokens.
        model_seconds: How long batches took, added up.
    """

    state: State
    requests: int = 0
    texts: int = 0
    pending_requests: int = 0
    waiting_texts: int = 0
    pending_bytes: int = 0
    max_pending_bytes: int = 0
    cache_bytes: int = 0
    cache_hits: int = 0
    truncations: int = 0
    batches: int = 0
    ooms: int = 0
    row_tokens: int = 0
    padded_tokens: int = 0
    waiting_chunks: int = 0
    token_limit: int = 0
    model_seconds: float = 0.0
