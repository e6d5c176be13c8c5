"""The asynchronous engine: clients hand texts in, threads chunk and embed them, and each client gets its own back.

A job is a client and so are the requests of an app, also at the same time. What one does ends with it: stopped,
cancelled or full, it takes nothing of the others with it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol
from weakref import WeakSet

from asyncembed.encoders.base import Encoder
from asyncembed.engine.client import ChunkTexts, EngineClient
from asyncembed.engine.dispatch import Dispatcher
from asyncembed.engine.heap import HeapStatistics
from asyncembed.engine.model_thread import EncoderStatistics, EncoderThread
from asyncembed.options import EmbedOptions


class EngineStatistics(NamedTuple):
    """What the engine did, and what waits in it."""

    encoders: EncoderStatistics
    heap: HeapStatistics
    n_open: int
    token_limit: int


class Engine:
    """One scheduler, the encoders that it feeds, and the clients whose texts these embed.

    Args:
        encoders: At least one.
    """

    def __init__(self, *encoders: EncoderThread) -> None:
        self._dispatcher = Dispatcher(encoders)
        self._clients: WeakSet[EngineClient] = WeakSet()  # each lives as long as its user keeps it
        self._error: Exception | None = None

    def __repr__(self) -> str:
        return f"<Engine {list(self._clients)!r} {self._dispatcher!r}>"

    @property
    def encoder(self) -> Encoder:
        """The model."""
        return self._dispatcher.encoders[0].encoder

    def statistics(self) -> EngineStatistics:
        """What was done and what waits, of all clients."""
        found = [encoder.statistics for encoder in self._dispatcher.encoders]
        return EngineStatistics(
            EncoderStatistics(
                batches=sum(one.batches for one in found),
                ooms=sum(one.ooms for one in found),
                row_tokens=sum(one.row_tokens for one in found),
                padded_tokens=sum(one.padded_tokens for one in found),
                model_seconds=sum(one.model_seconds for one in found),
            ),
            self._dispatcher.scheduler.heap.statistics(),
            sum(map(len, self._clients)),
            self._dispatcher.encoders[0].state.limit,
        )

    def open_client(
        self,
        chunk: ChunkTexts,
        *,
        chunk_long: ChunkTexts | None = None,
        normalize: bool = False,
        truncate_dim: int | None = None,
        max_unsaved: int | None = None,
    ) -> EngineClient:
        """A way in for one user of the engine, who has to `run` it.

        Args:
            chunk: Cuts texts into chunks, in a thread of the client's own.
            chunk_long: The same for long texts, in another thread; None leaves them to `chunk`.
            normalize: Scale vectors to length 1.
            truncate_dim: Keep only the first dimensions.
            max_unsaved: Computed texts that may wait to be saved before no more are computed.
        """
        client = EngineClient(
            self._dispatcher,
            chunk,
            chunk_long=chunk_long,
            normalize=normalize,
            truncate_dim=truncate_dim,
            max_unsaved=max_unsaved,
        )
        self._clients.add(client)
        if self._error is not None:
            client.fail(self._error)
        return client

    async def run(self) -> None:
        """Embeds what is pushed until closed and done."""
        await self._dispatcher.run()

    def close(self) -> None:
        """No more texts will come: `run` ends when all is done. Idempotent."""
        self._dispatcher.close()

    def break_clients(self, error: Exception, *, but: EngineClient | None = None) -> None:
        """The engine ends, while clients are still open: their own `run` raises this, all but one's."""
        self._error = error
        for client in list(self._clients):
            if client is not but:
                client.fail(error)


class EngineHost(Protocol):
    """Who owns an engine that others may use as well."""

    @property
    def options(self) -> EmbedOptions:
        """What its model was loaded with."""
        ...

    async def engine(self) -> Engine:
        """The engine, when the model is loaded."""
        ...
