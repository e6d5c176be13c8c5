"""Feeds encoders from one scheduler, and gives what they finish to the clients whose texts it is."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import anyio

from asyncembed.encoders.failures import FailureKind
from asyncembed.engine.model_thread import EncoderThread, Outcome
from asyncembed.engine.scheduler import BULK, Scheduler
from asyncembed.engine.work import Client, Work

logger = logging.getLogger("asyncembed")


class Dispatcher:
    """One scheduler and the encoders that it feeds.

    Args:
        encoders: At least one.
    """

    def __init__(self, encoders: Sequence[EncoderThread]) -> None:
        self.encoders = encoders
        self.scheduler = Scheduler(interactive_below=BULK)
        self._closed = False

    def __repr__(self) -> str:
        return f"<Dispatcher {self.scheduler!r} {self.encoders!r}>"

    async def run(self) -> None:
        """Embeds what is pushed until closed and done."""
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
            self._notify()

    def hasten(self, work: Work) -> None:
        """Puts a text's chunks into the next batch."""
        if self.scheduler.heap.hasten(work):
            self._notify()

    def reprioritise(self, work: Work, priority: int) -> None:
        """Puts a text's chunks into another class."""
        if self.scheduler.heap.reprioritise(work, priority):
            self._notify()

    def drop(self, works: Sequence[Work]) -> None:
        """Drops texts of one client that nobody waits for any more."""
        self.scheduler.drop(works)
        for encoder in self.encoders:
            encoder.withdraw_unwanted(self.scheduler)

    def stop(self, client: Client) -> None:
        """Drops all of a client's texts but those in a batch in hand."""
        self.scheduler.stop(client)
        for encoder in self.encoders:
            encoder.withdraw_unwanted(self.scheduler)

    def holds(self, client: Client) -> bool:
        """Whether chunks of a client are in a batch in hand."""
        return any(encoder.holds(client) for encoder in self.encoders)

    def wake(self) -> None:
        """Re-evaluates what may run."""
        for encoder in self.encoders:
            encoder.wake.set()

    def _notify(self) -> None:
        for encoder in self.encoders:
            encoder.notify(self.scheduler)

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
        batch, totals = outcome.batch, encoder.statistics
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
                encoder.withdraw(self.scheduler)
            if len(self.encoders) > 1:
                self.wake()  # what is tried again may run on any of them
        of_clients: dict[Client, list[Work]] = {chunk.work.client: [] for chunk in batch.chunks}
        for work in done:
            of_clients[work.client].append(work)
        for client, works in of_clients.items():
            client.settled(works)
