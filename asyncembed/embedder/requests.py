"""Who asked for which text: requests, the texts they share, what each has reserved, and the answers used last.

On the event loop only.
"""

from __future__ import annotations

import asyncio
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from asyncembed.encoders import FloatMatrix, Instruction
from asyncembed.engine.admission import AdmissionQueue, life_bytes, token_life_bytes
from asyncembed.engine.client import EngineClient
from asyncembed.engine.scheduler import INTERACTIVE
from asyncembed.engine.work import Work
from asyncembed.errors import OverloadedError, TextError
from asyncembed.records import AnyText, EmbeddedText, FloatVector, text_id
from asyncembed.wording import plural

ENTRY_OVERHEAD = 400
"""Python objects of one entry besides text and vector, in bytes."""

Key = tuple[Instruction, AnyText]
"""What the model is told, and the text."""


class Answer(NamedTuple):
    """What is known of a text.

    Attributes:
        embedding: Shape `(dim,)` float32; None if `error` is set.
        n_tokens: Its tokens without prompt and special tokens.
        error: Why it cannot be embedded.
    """

    embedding: FloatVector | None
    n_tokens: int = 0
    error: str | None = None


class AnswerCache:
    """The answers used last, by instruction and text."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self.n_hits = 0
        self._answers: OrderedDict[Key, Answer] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def __repr__(self) -> str:
        return f"<AnswerCache texts={len(self)} {self.n_bytes}/{self.max_bytes} bytes>"

    def get(self, key: Key) -> Answer | None:
        """The answer, if it is kept; it is then the last to go."""
        answer = self._answers.get(key)
        if answer is not None:
            self.n_hits += 1
            self._answers.move_to_end(key)
        return answer

    def put(self, key: Key, answer: Answer) -> None:
        """Keep an answer; the least recently used go where room is short. A failure is not kept."""
        size = _size(key, answer)
        if answer.embedding is None or size > self.max_bytes:
            return
        replaced = self._answers.pop(key, None)
        self.n_bytes += size - (_size(key, replaced) if replaced is not None else 0)
        self._answers[key] = answer
        while self.n_bytes > self.max_bytes:
            oldest, gone = self._answers.popitem(last=False)
            self.n_bytes -= _size(oldest, gone)


def _size(key: Key, answer: Answer) -> int:
    (prompt, task, _), text = key
    n_bytes = _text_bytes(prompt) + _text_bytes(task or "") + _text_bytes(text)
    return ENTRY_OVERHEAD + n_bytes + (answer.embedding.nbytes if answer.embedding is not None else 0)


def _text_bytes(text: AnyText) -> int:
    if not isinstance(text, str):
        return len(text.packed)
    return len(text) if text.isascii() else 4 * len(text)


class Request:
    """One call of an app."""

    def __init__(
        self,
        texts: Sequence[AnyText],
        instruction: Instruction,
        priority: int,
        dim: int,
        *,
        takes_blanks: bool,
        keep_errors: bool,
        shape: Callable[[Request], Any],
    ) -> None:
        self.texts = texts
        self.instruction = instruction
        self.priority = priority
        self.vectors: FloatMatrix = np.empty((len(texts), dim), np.float32)
        self.n_tokens = [0] * len(texts)
        self.errors: dict[int, str] = {}
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.open: dict[int, tuple[Work, int]] = {}
        self.takes_blanks = takes_blanks
        self._keep_errors = keep_errors
        self._shape = shape
        self._missing = len(texts)
        if not texts:
            self.future.set_result(shape(self))

    def answer(self, index: int, answer: Answer) -> None:
        """What became of one of the texts."""
        if self.future.done():
            return
        if answer.embedding is not None:
            self.vectors[index] = answer.embedding
            self.n_tokens[index] = answer.n_tokens
        elif self._keep_errors:
            self.errors[index] = answer.error or "it has no vector"
        else:
            self.fail(TextError(index, str(self.texts[index]), answer.error or "it has no vector"))
            return
        self._missing -= 1
        if not self._missing:
            self.future.set_result(self._shape(self))

    def fail(self, error: Exception) -> None:
        """The request ends in an error."""
        if not self.future.done():
            self.future.set_exception(error)


class Requests:
    """Takes requests' texts in while there is room, has each computed once, and answers all who wait for it.

    Half of the budget is kept for the interactive class, so that a long list of another never stands in its way.
    """

    def __init__(
        self, client: EngineClient, dim: int, chunk_size: int, chunk_overlap: int, *, max_bytes: int, cache_bytes: int
    ) -> None:
        self.cache = AnswerCache(cache_bytes)
        self.urgent = AdmissionQueue(max(1, max_bytes - max_bytes // 2))
        self.later = AdmissionQueue(max(1, max_bytes // 2))
        self.n_requests = 0
        self.n_texts = 0
        self._client = client
        self._life = (dim, chunk_size, chunk_overlap)
        self._works: dict[Key, Work] = {}
        self._requests: set[Request] = set()
        self._new: list[Work] = []
        self._idle = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Requests requests={len(self._requests)} texts={len(self._works)}>"

    @property
    def n_pending(self) -> int:
        """Requests that have no answer yet, those that wait for room included."""
        return len(self._requests)

    def open(self, request: Request) -> None:
        """A request begins. It ends in `leave`, also by itself as soon as its future is done."""
        self.n_requests += 1
        self._requests.add(request)
        request.future.add_done_callback(lambda _: self.leave(request))

    def leave(self, request: Request) -> None:
        """The request has its answer, or nobody waits for it: what only it wanted is dropped. Idempotent."""
        self._requests.discard(request)
        unwanted: list[Work] = []
        for work in dict.fromkeys([self._release(request, index) for index in list(request.open)]):
            work.waiters = [waiter for waiter in work.waiters if waiter[0] is not request]
            if not work.waiters:
                self._forget(work)
                if work.is_open:
                    unwanted.append(work)
        if unwanted:
            self._client.discard(unwanted)
        if request.future.done():
            if not request.future.cancelled():
                request.future.exception()  # told to its caller, or to nobody: not to the loop's log
        else:
            request.future.cancel()
        if not self._requests:
            self._idle.set()

    async def admit(self, request: Request) -> None:
        """Take the request's texts in, in pieces, as room comes. Cancelled, those that are in are left to `leave`."""
        queue = self._queue(request)
        for index, text in enumerate(request.texts):
            n_bytes = self._life_bytes(text)
            if not queue.reserve_nowait(n_bytes):
                self.submit()  # those before it must go on, or the room would never come
                await queue.reserve(n_bytes)
            if request.future.done():  # one of its texts failed, or the embedder ends
                queue.release(n_bytes)
                break
            self._add(request, index, n_bytes)
            if not (index + 1) % 256:
                self.submit()
                await _next_turn()
        self.submit()

    def admit_nowait(self, request: Request) -> None:
        """Take all texts in at once, or none.

        Raises:
            OverloadedError: There is no room.
        """
        queue, reserved = self._queue(request), list[int]()
        sizes = [self._life_bytes(text) for text in request.texts]
        if len(sizes) > 1 and sum(sizes) > queue.max_bytes:
            raise OverloadedError(
                f"{len(sizes)} texts need {sum(sizes)} bytes until they are done, and {queue.max_bytes} is all there "
                "is for requests of their priority. Ask for fewer at once, await embed(), which lets them in piece by "
                "piece, or raise max_pending_bytes",
                can_fit=False,
            )
        for n_bytes in sizes:
            if not queue.reserve_nowait(n_bytes):
                for taken in reserved:
                    queue.release(taken)
                now = queue.statistics()
                raise OverloadedError(
                    f"no room for {plural(len(request.texts), 'text')}: {now.n_in_flight} with {now.reserved_bytes} of "
                    f"{now.max_bytes} bytes are under way and {now.n_waiting} wait. Try again later, await embed(), "
                    "which waits, or raise max_pending_bytes"
                )
            reserved.append(n_bytes)
        for index, n_bytes in enumerate(reserved):
            self._add(request, index, n_bytes)
        self.submit()

    def submit(self) -> None:
        """Hand what was added to the engine."""
        if self._new:
            new, self._new = self._new, []
            self._client.submit_nowait(new)

    def fail_all(self, make: Callable[[], Exception]) -> None:
        """Every request that waits gets an error of its own."""
        for request in list(self._requests):
            request.fail(make())

    async def wait_idle(self) -> None:
        """Wait until no request is left."""
        while self._requests:
            self._idle.clear()
            await self._idle.wait()

    def _life_bytes(self, text: AnyText) -> int:
        """What a text reserves."""
        if isinstance(text, str):
            return life_bytes(text, *self._life)
        return token_life_bytes(2 * len(text.packed), len(text), *self._life)

    def _queue(self, request: Request) -> AdmissionQueue:
        return self.urgent if request.priority <= INTERACTIVE else self.later

    def _add(self, request: Request, index: int, n_bytes: int) -> None:
        """A text that has room: answered from the cache, joined to one under way, or new."""
        self.n_texts += 1
        text, told = request.texts[index], request.instruction
        if request.takes_blanks and _may_be_blank(text):  # all others share their work with those who take no blanks
            told = told._replace(blanks="encode")
        key = (told, text)
        known = self.cache.get(key)
        if known is not None:
            self._queue(request).release(n_bytes)
            self._answer(request, index, known)
            return
        work = self._works.get(key)
        # 1. computed this moment   2. new   3. under way for others
        if work is not None and not work.is_pending:
            self._queue(request).release(n_bytes)
            self._answer(request, index, _answer_of(work))
            return
        if work is None:
            work = self._works[key] = Work(self._client, text, request.priority, told)
            self._new.append(work)
        elif request.priority < work.priority:
            self.submit()
            self._client.raise_priority(work, request.priority)
        work.waiters.append((request, index))
        request.open[index] = (work, n_bytes)

    async def run(self) -> None:
        """Answers all who wait, until the client has ended."""
        while waiters := await self._client.finished():
            last, answer = None, Answer(None)
            for request, index in waiters:
                if index not in request.open:
                    continue  # it left, or a failure ended the request at another place of the same text
                work = self._release(request, index)
                if work is not last:
                    last, answer = work, _answer_of(work)
                    self._forget(work)
                    self.cache.put((work.instruction, work.text), answer)
                self._answer(request, index, answer)

    def _forget(self, work: Work) -> None:
        key = (work.instruction, work.text)
        if self._works.get(key) is work:
            del self._works[key]

    def _answer(self, request: Request, index: int, answer: Answer) -> None:
        request.answer(index, answer)
        if request.future.done():
            self.leave(request)

    def _release(self, request: Request, index: int) -> Work:
        work, n_bytes = request.open.pop(index)
        self._queue(request).release(n_bytes)
        return work


def _answer_of(work: Work) -> Answer:
    return Answer(work.embedding, work.n_tokens, work.error)


MOST_LOOKED_AT = 200
"""Characters of the longest text whose characters are looked at one by one, on the event loop."""


def _may_be_blank(text: AnyText) -> bool:
    """Whether a text has nothing but blanks, control characters and marks; a long one: nothing but blanks."""
    if not isinstance(text, str):
        return False
    if len(text) > MOST_LOOKED_AT or text.isspace():
        return text.isspace()
    return all(unicodedata.category(character)[0] in "ZCM" for character in text)


async def _next_turn() -> None:
    """Let the other tasks of the loop have a turn."""
    turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(lambda: None if turn.done() else turn.set_result(None))
    await turn


class CountedVectors(NamedTuple):
    """Vectors of several texts, and their tokens.

    Attributes:
        vectors: Shape `(n, dim)` float32, in order.
        n_tokens: Tokens of each text, without prompt and special tokens.
    """

    vectors: FloatMatrix
    n_tokens: list[int]


def vector_of(request: Request) -> FloatVector:
    """The only vector, shape `(dim,)`."""
    vector: FloatVector = request.vectors[0]
    return vector


def matrix_of(request: Request) -> FloatMatrix:
    """All vectors, shape `(n, dim)`."""
    return request.vectors


def counted_of(request: Request) -> CountedVectors:
    """All vectors, and their tokens."""
    return CountedVectors(request.vectors, request.n_tokens)


def records_of(request: Request) -> list[EmbeddedText]:
    """A record for each text."""
    return [
        EmbeddedText(
            id=text_id(str(text)),
            index=index,
            key=None,
            text=str(text),
            embedding=None if index in request.errors else request.vectors[index],
            n_tokens=request.n_tokens[index],
            error=request.errors.get(index),
        )
        for index, text in enumerate(request.texts)
    ]


def with_faults(records: Sequence[EmbeddedText], faults: Mapping[int, str]) -> list[EmbeddedText]:
    """Records of the texts, and between them, where each was, those of the items that were no texts."""
    rest = iter(records)
    return [
        EmbeddedText(id="", index=index, key=None, text="", embedding=None, error=faults[index])
        if index in faults
        else replace(next(rest), index=index)
        for index in range(len(records) + len(faults))
    ]
