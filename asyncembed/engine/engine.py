"""The engine: one scheduler feeds the encoders, and each client gets back what they make of its texts.

A job is a client and so are the requests of an app, also at the same time. What one does ends with it: stopped,
cancelled or full, it takes nothing of the others with it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakSet

import anyio

from asyncembed.encoders.base import Encoder
from asyncembed.encoders.failures import FailureKind
from asyncembed.engine.model_thread import EncoderThread, Outcome
from asyncembed.engine.scheduler import Scheduler
from asyncembed.engine.work import Client, Work
from asyncembed.options import EmbedOptions

logger = logging.getLogger("asyncembed")


@dataclass(slots=True)
class EngineStatistics:
    """Totals since the start; tokens include prompt and special tokens."""

    batches: int = 0
    ooms: int = 0
    row_tokens: int = 0
    padded_tokens: int = 0
    model_seconds: float = 0.0


class Engine:
    """One scheduler, the encoders that it feeds (at least one), and the clients whose texts these embed."""

    def __init__(self, *encoders: EncoderThread, is_interactive: bool = False) -> None:
        self.encoders = encoders
        self.scheduler = Scheduler(is_interactive=is_interactive)
        self.statistics = EngineStatistics()
        self._clients: WeakSet[Client] = WeakSet()  # each lives as long as its user keeps it
        self._closed = False
        self._error: Exception | None = None

    def __repr__(self) -> str:
        return f"<Engine {self.scheduler!r} {self.encoders!r} {list(self._clients)!r}>"

    @property
    def encoder(self) -> Encoder:
        """The model."""
        return self.encoders[0].encoder

    @property
    def token_limit(self) -> int:
        """The limit of a batch in padded tokens."""
        return self.encoders[0].state.limit

    def add(self, client: Client) -> None:
        """One more whose texts come here; it fails at once if the engine has."""
        self._clients.add(client)
        if self._error is not None:
            client.fail(self._error)

    async def run(self) -> None:
        """Embeds what is pushed until closed and done.

        Raises:
            ModelError: The model or its device cannot go on.
        """
        try:
            if len(self.encoders) == 1:
                await self._drive(self.encoders[0])
                return
            async with anyio.create_task_group() as group:
                for encoder in self.encoders:
                    group.start_soon(self._drive, encoder)
        finally:
            self.scheduler.heap.clear()

    def close(self) -> None:
        """No more texts will come: `run` ends when all is done. Idempotent."""
        self._closed = True
        self.wake()

    def push(self, works: Sequence[Work]) -> None:
        """Enqueues the chunks of texts."""
        if works:
            self.scheduler.push(works)
            self.wake()

    def hasten(self, work: Work) -> None:
        """Puts a text's chunks into the next batch."""
        if self.scheduler.heap.hasten(work):
            self.wake()

    def drop(self, works: Sequence[Work]) -> None:
        """Drops texts of one client that nobody waits for any more."""
        self.scheduler.drop(works)
        self._withdraw_unwanted()

    def stop(self, client: Client) -> None:
        """Drops all of a client's texts but those in a batch in hand."""
        self.scheduler.stop(client)
        self._withdraw_unwanted()

    def holds(self, client: Client) -> bool:
        """Whether chunks of a client are in a batch in hand."""
        return any(encoder.holds(client) for encoder in self.encoders)

    def break_clients(self, error: Exception, *, but: Client | None = None) -> None:
        """The engine ends, while clients are still open: their own `run` raises this, all but one's."""
        self._error = error
        for client in list(self._clients):
            if client is not but:
                client.fail(error)

    def wake(self) -> None:
        """Re-evaluates what may run."""
        for encoder in self.encoders:
            encoder.wake.set()

    def _withdraw_unwanted(self) -> None:
        for encoder in self.encoders:
            encoder.withdraw_unwanted()

    def _is_done(self) -> bool:
        return self._closed and not self.scheduler and not any(encoder.n_in_hand for encoder in self.encoders)

    async def _drive(self, encoder: EncoderThread) -> None:
        """Keeps one encoder busy until all is done."""
        while True:
            encoder.submit_more(self.scheduler)
            if self._is_done():
                self.wake()  # those that drive the other encoders
                return
            outcome = await encoder.next_outcome()
            if outcome is not None:
                self._settle(encoder, outcome)

    def _settle(self, encoder: EncoderThread, outcome: Outcome) -> None:
        batch, totals = outcome.batch, self.statistics
        totals.model_seconds += outcome.seconds
        if outcome.vectors is not None:
            is_probe = batch is encoder.state.probe
            done = self.scheduler.succeeded(encoder.state, batch, outcome.vectors)
            if not is_probe:
                # A small batch is no sample of the speed of the size in use.
                encoder.state.estimator.succeed(batch.padded_tokens, None if batch.is_small else outcome.seconds)
                totals.batches += 1
                totals.row_tokens += batch.row_tokens
                totals.padded_tokens += batch.padded_tokens
        elif outcome.error is None or outcome.kind is None:
            raise AssertionError("a batch without vectors has an error: this is a bug")
        else:
            done = self.scheduler.failed(encoder.state, batch, outcome.kind, outcome.error)
            if outcome.kind is FailureKind.OUT_OF_MEMORY:
                totals.ooms += 1
                logger.info(
                    "out of memory at %d padded tokens; the limit is %d now", batch.padded_tokens, encoder.state.limit
                )
            if len(self.encoders) > 1:
                self.wake()  # what is tried again may run on any of them
        of_clients: dict[Client, list[Work]] = {chunk.work.client: [] for chunk in batch.chunks}
        for work in done:
            of_clients[work.client].append(work)
        for client, works in of_clients.items():
            client.settled(works)


class EngineHost(Protocol):
    """Who owns an engine that others may use as well."""

    @property
    def options(self) -> EmbedOptions:
        """What its model was loaded with."""
        ...

    async def engine(self) -> Engine:
        """The engine, when the model is loaded."""
        ...
