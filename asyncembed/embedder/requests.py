"""Who asked for which text: requests, the texts they share, what each has reserved, and the answers used last.

On the event loop only, but for what checks a request.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import anyio.lowlevel
import numpy as np

from asyncembed.encoders import (
    KINDS,
    FloatMatrix,
    Instruction,
    Kind,
    kind_prompt_of,
    kind_task_of,
    prompt_of,
    task_of,
)
from asyncembed.engine.admission import AdmissionQueue, life_bytes
from asyncembed.engine.chunkers import InstructionChunkers, LongTextChunkers
from asyncembed.engine.client import EngineClient
from asyncembed.engine.engine import Engine
from asyncembed.engine.scheduler import BULK, INTERACTIVE
from asyncembed.engine.work import Work
from asyncembed.errors import OptionsError, OverloadedError, TextError, TextTypeError
from asyncembed.iterables import why_other_items, without_line_ends
from asyncembed.options import Blanks, EmbedOptions, check_prompt
from asyncembed.records import AnyText, EmbeddedText, FloatVector, TokenText, text_id
from asyncembed.wording import kind_of, plural, why_no_text

Priority = Literal["interactive", "bulk"] | int
_CLASSES = {"interactive": INTERACTIVE, "bulk": BULK}
_PRIORITIES = range(INTERACTIVE, 101)


class HowOptions(TypedDict, total=False):
    """How a call wants its texts embedded; `AsyncEmbedder.embed` explains each."""

    kind: Kind
    prompt: str | None
    prompt_name: str | None
    task: str | None
    blanks: Blanks
    priority: Priority


def check_how(how: Mapping[str, Any]) -> None:
    """Refuses what no call may say.

    Raises:
        TypeError: No call has an argument of that name.
        OptionsError: One of them cannot be.
    """
    for name, value in how.items():
        if name not in HowOptions.__annotations__:
            names = ", ".join(HowOptions.__annotations__)
            raise TypeError(f"{name!r} is no argument of this call; there are {names}")
        if name in ("kind", "blanks"):
            allowed = KINDS if name == "kind" else get_args(Blanks)
            if value not in allowed:
                raise OptionsError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
        elif name == "priority":
            _number_of(value)
        elif not isinstance(value, str | None):
            raise OptionsError(f"{name}={value!r} must be text, or None")
    check_prompt("prompt", how.get("prompt"))


def _number_of(priority: Priority) -> int:
    """The number of a class of urgency; lower is sooner."""
    number = _CLASSES.get(priority) if isinstance(priority, str) else priority
    if isinstance(number, bool) or not isinstance(number, int) or number not in _PRIORITIES:
        ends = f"{_PRIORITIES[0]} to {_PRIORITIES[-1]}"
        raise OptionsError(f"priority={priority!r} is not 'interactive', 'bulk', or a whole number from {ends}")
    return number


def _listed(texts: object) -> list[Any]:
    """A text alone, or the items of anything that has an order, as a list of its own."""
    if isinstance(texts, (str, TokenText)):
        return [texts]
    hint = ""
    if isinstance(texts, (bytes, bytearray, memoryview)):
        hint = "; decode it first"
    elif isinstance(texts, (Mapping, set, frozenset)):
        hint = "; pass its texts in a list"
    elif (reason := why_other_items(texts)) is not None:
        raise TextTypeError(reason)
    elif hasattr(texts, "__iter__") or hasattr(texts, "__getitem__"):
        return list(without_line_ends(texts))
    raise TextTypeError(f"a text or a list of texts is needed, not {kind_of(texts)}{hint}")


class CountedVectors(NamedTuple):
    """Vectors of several texts, and their tokens.

    Attributes:
        vectors: Shape `(n, dim)` float32, in order.
        n_tokens: Tokens of each text, without prompt and special tokens.
    """

    vectors: FloatMatrix
    n_tokens: list[int]


class Request:
    """One call of an app, checked when it is made; it begins when the model is there.

    Raises:
        TextTypeError: The texts are neither a text nor a list, or one of the list is none and no record can say so.
        TypeError: No call has an argument of that name.
        OptionsError: An argument cannot be.
    """

    instruction: Instruction
    vectors: FloatMatrix
    future: asyncio.Future[Any]

    def __init__(
        self, texts: object, how: Mapping[str, Any], gives: Literal["vectors", "counted", "records"] = "vectors"
    ) -> None:
        items = _listed(texts)
        kinds, names = ((str, TokenText), " or TokenText") if gives == "counted" else (str, "")
        wrong = [index for index, item in enumerate(items) if not isinstance(item, kinds)]
        self.errors = {index: why_no_text(f"item {index}", items[index]) + names for index in wrong}
        if wrong and gives != "records":
            raise TextTypeError(self.errors[wrong[0]])
        check_how(how)
        self.texts: list[AnyText] = ["" if index in self.errors else item for index, item in enumerate(items)]
        self.how = how
        self.priority = _number_of(how.get("priority", INTERACTIVE))
        self.n_tokens = [0] * len(items)
        self.open: dict[int, tuple[Work, int]] = {}
        self._gives = gives
        self._is_one = isinstance(texts, str)
        self._no_texts = set(wrong)
        self._missing = len(items) - len(wrong)

    def begin(self, instruction: Instruction, dim: int) -> None:
        """The model is there."""
        self.instruction = instruction
        self.vectors = np.empty((len(self.texts), dim), np.float32)
        self.future = asyncio.get_running_loop().create_future()
        if not self._missing:
            self.future.set_result(self._result())

    def answer(self, index: int, embedding: FloatVector | None, n_tokens: int, error: str | None = None) -> None:
        """What became of one of the texts."""
        if self.future.done():
            return
        if embedding is not None:
            self.vectors[index] = embedding
            self.n_tokens[index] = n_tokens
        else:
            self.errors[index] = error or "it has no vector"
            if self._gives != "records":
                self.fail(TextError(index, str(self.texts[index]), self.errors[index]))
                return
        self._missing -= 1
        if not self._missing:
            self.future.set_result(self._result())

    def fail(self, error: Exception) -> None:
        """The request ends in an error."""
        if not self.future.done():
            self.future.set_exception(error)

    def _result(self) -> Any:
        if self._gives == "counted":
            return CountedVectors(self.vectors, self.n_tokens)
        if self._gives == "vectors":
            return self.vectors[0] if self._is_one else self.vectors
        return [
            EmbeddedText(
                id="" if index in self._no_texts else text_id(str(text)),
                index=index,
                key=None,
                text=str(text),
                embedding=None if index in self.errors else self.vectors[index],
                n_tokens=self.n_tokens[index],
                error=self.errors.get(index),
            )
            for index, text in enumerate(self.texts)
        ]


Key = tuple[Instruction, AnyText]

ENTRY_OVERHEAD = 400
"""Python objects of one entry besides text and vector, in bytes."""


class AnswerCache:
    """The vectors used last, with the tokens of their texts; the least recently used go where room is short."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = self.n_hits = 0
        self._answers: OrderedDict[Key, tuple[FloatVector, int, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: Key) -> tuple[FloatVector, int] | None:
        """The answer, if it is kept; it is then the last to go."""
        if key not in self._answers:
            return None
        self.n_hits += 1
        self._answers.move_to_end(key)
        return self._answers[key][:2]

    def put(self, key: Key, embedding: FloatVector, n_tokens: int) -> None:
        """Keeps an answer, if it is not larger than all there is."""
        (prompt, task, _), text = key
        size = ENTRY_OVERHEAD + embedding.nbytes
        for part in (prompt, task or "", text):
            size += len(part) if isinstance(part, str) and part.isascii() else 4 * len(part)
        if key in self._answers or size > self.max_bytes:
            return
        self._answers[key] = (embedding, n_tokens, size)
        self.n_bytes += size
        while self.n_bytes > self.max_bytes:
            _, (_, _, gone) = self._answers.popitem(last=False)
            self.n_bytes -= gone


class Requests:
    """Takes requests' texts in while there is room, has each computed once, and answers all who wait for it.

    Half of the budget is kept for the interactive class, so that a long list of another never stands in its way.
    """

    def __init__(
        self,
        engine: Engine,
        chunkers: InstructionChunkers,
        options: EmbedOptions,
        kind_prompts: Mapping[Kind, str | None],
        max_bytes: int,
        cache_bytes: int,
    ) -> None:
        self.engine = engine
        self.dim = min(engine.encoder.dim, options.truncate_dim or engine.encoder.dim)
        self.client = EngineClient(
            engine,
            chunkers,
            chunk_long=LongTextChunkers(engine.encoder, options),
            normalize=options.normalize_embeddings,
            truncate_dim=options.truncate_dim,
        )
        self.cache = AnswerCache(cache_bytes)
        self.urgent = AdmissionQueue(max(1, max_bytes - max_bytes // 2))
        self.later = AdmissionQueue(max(1, max_bytes // 2))
        self.n_requests = self.n_texts = 0
        self._options = options
        self._kind_prompts = kind_prompts
        self._life = (engine.encoder.dim, chunkers.chunk_size, options.chunk_overlap)
        self._works: dict[Key, Work] = {}
        self._requests: set[Request] = set()

    def __repr__(self) -> str:
        return f"<Requests requests={len(self._requests)} texts={len(self._works)}>"

    def __len__(self) -> int:
        """Requests that have no answer yet, those that wait for room included."""
        return len(self._requests)

    async def ask(self, request: Request) -> Any:
        """The answer to a request, whose texts go in by pieces as room comes. Cancelled, it leaves."""
        self._begin(request)
        queue = self._queue(request)
        try:
            for index, text in enumerate(request.texts):
                if index in request.errors:
                    continue
                n_bytes = life_bytes(text, *self._life)
                await queue.reserve(n_bytes)
                if request.future.done():  # one of its texts failed, or the embedder ends
                    queue.release(n_bytes)
                    break
                self._add(request, index, n_bytes)
                if not (index + 1) % 256:
                    await anyio.lowlevel.checkpoint()
            return await request.future
        finally:
            self._leave(request)

    def ask_nowait(self, request: Request) -> asyncio.Future[Any]:
        """Takes all texts in at once, or none: a future of the answer.

        Raises:
            OverloadedError: There is no room.
        """
        self._begin(request)
        try:
            for index, n_bytes in enumerate(self._reserve_nowait(request)):
                self._add(request, index, n_bytes)
        except BaseException:
            self._leave(request)
            raise
        return request.future

    def _reserve_nowait(self, request: Request) -> list[int]:
        """Reserves the life of every text, or of none: their bytes."""
        queue = self._queue(request)
        sizes = [life_bytes(text, *self._life) for text in request.texts]
        taken = list(takewhile(queue.reserve_nowait, sizes))
        if len(taken) == len(sizes):
            return sizes
        for n_bytes in taken:
            queue.release(n_bytes)
        now, can_fit = queue.statistics(), len(sizes) == 1 or sum(sizes) <= queue.max_bytes
        raise OverloadedError(
            f"no room for {plural(len(sizes), 'text')} of {sum(sizes)} bytes until they are done: {now.n_in_flight} "
            f"with {now.reserved_bytes} of {now.max_bytes} bytes are under way and {now.n_waiting} wait. "
            f"{'Try again later' if can_fit else 'Ask for fewer at once'}, await embed(), which lets them in piece by "
            "piece, or raise max_pending_bytes",
            can_fit=can_fit,
        )

    def fail_all(self, make: Callable[[], Exception]) -> None:
        """Every request that waits gets an error of its own."""
        for request in self._requests:
            request.fail(make())

    async def wait_idle(self) -> None:
        """Waits until no request is left."""
        while self._requests:
            await asyncio.wait([request.future for request in self._requests])

    async def run(self) -> None:
        """Answers all who wait, until the client has ended."""
        while waiters := await self.client.finished():
            for request, index in waiters:
                if index not in request.open:
                    continue  # it left
                work = self._release(request, index)
                self._forget(work)
                if work.embedding is not None:
                    self.cache.put((work.instruction, work.text), work.embedding, work.n_tokens)
                request.answer(index, work.embedding, work.n_tokens, work.error)

    def _begin(self, request: Request) -> None:
        """Takes a request up; it leaves by itself as soon as its future is done."""
        encoder, how = self.engine.encoder, request.how
        kind, task = how.get("kind", "text"), how.get("task")
        given = (how.get("prompt"), how.get("prompt_name"))
        if given == (None, None):
            given = (self._kind_prompts.get(kind), None)
        prompt = kind_prompt_of(encoder, kind, self._options) if given == (None, None) else prompt_of(encoder, *given)
        task = kind_task_of(encoder, kind, self._options) if task is None else task_of(encoder, task)
        request.begin(Instruction(prompt, task), self.dim)
        self.n_requests += 1
        self._requests.add(request)
        request.future.add_done_callback(lambda _: self._leave(request))

    def _leave(self, request: Request) -> None:
        """The request has its answer, or nobody waits for it: what only it wanted is dropped. Idempotent."""
        self._requests.discard(request)
        works = dict.fromkeys([self._release(request, index) for index in list(request.open)])
        for work in works:
            work.waiters = [waiter for waiter in work.waiters if waiter[0] is not request]
        unwanted = [work for work in works if not work.waiters]
        for work in unwanted:
            self._forget(work)
        if unwanted:
            self.client.discard(unwanted)
        if not request.future.done():
            request.future.cancel()
        elif not request.future.cancelled():
            request.future.exception()  # told to its caller, or to nobody: not to the loop's log

    def _add(self, request: Request, index: int, n_bytes: int) -> None:
        """A text that has room: answered from the cache, joined to one under way, or new."""
        self.n_texts += 1
        text, told = request.texts[index], request.instruction
        if request.how.get("blanks") == "encode" and isinstance(text, str) and not any(map(str.isalnum, text[:200])):
            told = told._replace(blanks="encode")  # all others share their work with those who take no blanks
        key = (told, text)
        if (known := self.cache.get(key)) is not None:
            self._queue(request).release(n_bytes)
            request.answer(index, *known)
            return
        work = self._works.get(key)
        is_new = work is None
        if work is None:
            work = self._works[key] = Work(self.client, text, request.priority, told)
        request.open[index] = (work, n_bytes)
        if not work.is_pending:  # computed this moment
            self.client.pass_on([(request, index)])
            return
        work.waiters.append((request, index))
        if is_new:
            self.client.submit_nowait([work])
        elif request.priority < work.priority:
            self.client.raise_priority(work, request.priority)

    def _forget(self, work: Work) -> None:
        """From now on the text would be a new one."""
        key = (work.instruction, work.text)
        if self._works.get(key) is work:
            del self._works[key]

    def _queue(self, request: Request) -> AdmissionQueue:
        return self.urgent if request.priority <= INTERACTIVE else self.later

    def _release(self, request: Request, index: int) -> Work:
        work, n_bytes = request.open.pop(index)
        self._queue(request).release(n_bytes)
        return work
