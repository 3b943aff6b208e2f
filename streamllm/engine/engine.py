"""Engine: a thread that computes many streams together, and takes requests from any thread."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from streamllm.compiled import Compiled
from streamllm.engine.batch import Batch
from streamllm.engine.request import Mailbox, Request
from streamllm.engine.row import SlotStream, TextRow
from streamllm.models.checks import whole_number
from streamllm.models.step import geometry_of
from streamllm.tensor_parallel import is_tensor_parallel
from streamllm.text_stream import TextStream
from streamllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from streamllm.session.dialogue import Message
    from streamllm.stream import Stream

Result = TypeVar("Result")

AHEAD = 256  # unread pieces at which an endless stream pauses


class Engine:
    """Independent streams, computed together: each joins and leaves at any step, with settings of its own.

        with streamllm.Engine(model, tokenizer, slots=8) as engine:
            requests = [engine.submit(text, max_new_tokens=100, temperature=0.8, seed=0) for text in texts]
            for request in requests:
                print(request.text())        # or `for piece in request`, or `async for piece in request`

    A stream sees nothing of its neighbours, and generates what it would generate alone. Rounding depends on the number
    of streams, so a text may differ where two tokens are almost equally likely. When all slots are taken, requests
    wait in the order in which they came.

    Args:
        slots: how many streams run at once. Each slot is the memory of one cache.
        sinks, window, chunk, quantize: of every stream, see `SinkCache`.
        prefill_tokens: while streams run, at most this many tokens of new prompts are read between two of their tokens,
            so that the streams do not stall. None: 512 on CUDA, elsewhere twice the number of slots, at least 16.

    A compiled model (`streamllm.compile`) computes the slots by its recorded steps. Raises ValueError for wrong
    arguments and for a tensor-parallel model, TypeError for a model of another library.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        slots: int = 64,
        sinks: int = 4,
        window: int | None = None,
        *,
        chunk: int | None = None,
        quantize: str | None = None,
        prefill_tokens: int | None = None,
    ) -> None:
        geometry_of(model)
        if is_tensor_parallel(model):
            raise ValueError(
                "an engine takes requests in one process, and a tensor-parallel model needs the same steps in all of "
                "them: give lists of prompts to streamllm.generate_batch"
            )
        self.model, self.tokenizer = model, tokenizer
        self._batch = Batch(
            model, slots, sinks=sinks, window=window, chunk=chunk, quantize=quantize,
            prefill_tokens=prefill_tokens,
        )  # fmt: skip
        self._worker = _Worker(self._batch)
        # Runs at `close`, when nothing refers to the engine any more, or when the interpreter exits.
        self._stop = weakref.finalize(self, _Worker.stop, self._worker)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel all requests, and end the thread after its current step."""
        self._stop()

    @property
    def running(self) -> int:
        """How many streams are in slots."""
        return self._batch.running

    @property
    def queued(self) -> int:
        """How many requests wait for a slot."""
        return self._batch.queued

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of all slots."""
        return self._batch.slots.memory.nbytes

    def submit(
        self,
        text: str | Sequence[int] | Tensor = "",
        *,
        stream: Stream | None = None,
        ahead: int | None = None,
        on_piece: Callable[[str], object] | None = None,
        **options: Any,
    ) -> Request:
        """Generate after `text`, or ids, as `Stream.generate(text, **options)` does.

        Args:
            stream: a stream to go on with, for example one that was loaded or detached. Its sinks, window, quantize
                and type must be those of the engine. Do not use it until the request has ended.
            ahead: the stream pauses while this many pieces wait to be read. None: never where `max_new_tokens` is
                given, else 256.
            on_piece: is called with each piece, in the engine's thread; the request then has no pieces to read. While
                it runs, all streams stand still. It may submit requests, but not wait for them. An error in it ends
                this stream alone.

        Raises ValueError and TypeError as `Stream.generate`, at the call; RuntimeError for a closed engine.
        """
        return self._submit(stream, ahead, on_piece, options, lambda own: own.generate(text, **options))

    def chat(
        self,
        text_or_messages: str | Sequence[Message],
        *,
        stream: Stream | None = None,
        ahead: int | None = None,
        on_piece: Callable[[str], object] | None = None,
        **options: Any,
    ) -> Request:
        """Answer a user's text, or messages, as `Stream.chat(text_or_messages, **options)` does. See `submit`."""
        return self._submit(
            stream, ahead, on_piece, options, lambda own: own.chat(text_or_messages, **options)
        )

    def _submit(
        self,
        stream: Stream | None,
        ahead: int | None,
        on_piece: Callable[[str], object] | None,
        options: dict[str, Any],
        begin: Callable[[Stream], Iterator[str]],
    ) -> Request:
        if on_piece is not None and not callable(on_piece):
            raise TypeError(f"on_piece must be a function or None, not {on_piece!r}")
        if ahead is not None:
            ahead = whole_number("ahead", ahead, 1)
        elif options.get("max_new_tokens") is None:
            ahead = AHEAD
        self._worker.check_open()
        slots = self._batch.slots
        if stream is None:
            stream = SlotStream(self.model, self.tokenizer, slots.new_cache())
        elif not isinstance(stream, TextStream):
            raise TypeError(f"stream must be a streamllm.Stream or None, not {stream!r}")
        else:
            own = stream.model.model if isinstance(stream.model, Compiled) else stream.model
            if own is not self._batch.plain:
                raise ValueError("the stream belongs to another model: make an engine for that model")
            slots.check(stream.cache)
        # The thread must not refer to the engine: an engine that nothing refers to ends its thread.
        batch = self._batch
        pieces = begin(stream)
        slots.check(stream.cache)  # again: with sinks="system", the first message makes a new cache
        free = _take(stream)
        try:
            mailbox = Mailbox(ahead, on_piece, self._worker.wake, free, self._worker.check_may_wait)
            row = TextRow(stream, pieces, mailbox)
            self._worker.run_soon(lambda: batch.add(row))
        except BaseException:
            free()
            raise
        return Request(stream, mailbox, lambda: self._detach(row), on_piece is not None)

    def _detach(self, row: TextRow) -> None:
        batch = self._batch

        def detach() -> bool:
            known = row in batch.rows()
            batch.remove(row, keep=True)
            return known

        if not self._worker.call(detach):
            raise RuntimeError(
                "the stream has ended, so it is not in the engine any more: detach it earlier, or submit a stream "
                "of your own (stream=…)"
            )


_taking = threading.Lock()


def _take(stream: Stream) -> Callable[[], None]:
    """Mark a stream as taken. Returns what frees it. Raises ValueError where it is in an engine already."""
    with _taking:
        stream._check_free()
        stream._is_in_engine = True

    def free() -> None:
        stream._is_in_engine = False

    return free


class _Worker:
    """The thread that steps a batch. Only this thread changes the batch, between two steps."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._awake = self._closing = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="streamllm engine", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Step again: a stream that was paused may now be able to go on."""
        with self._changed:
            self._awake = True
            self._changed.notify()

    def run_soon(self, job: Callable[[], None]) -> None:
        """Call `job` before the next step. Raises RuntimeError where the engine is closed."""
        with self._changed:
            self.check_open()
            self._jobs.append(job)
            self._awake = True
            self._changed.notify()

    def call(self, function: Callable[[], Result]) -> Result:
        """Call `function` before the next step, and return its result. Raises RuntimeError for a closed engine."""
        self.check_may_wait()
        answer: Future[Result] = Future()

        def job() -> None:
            try:
                answer.set_result(function())
            except BaseException as error:
                answer.set_exception(error)

        self.run_soon(job)
        return answer.result()

    def check_open(self) -> None:
        if self._closing:
            raise RuntimeError("the engine is closed: make another one")
        if self._process != os.getpid():
            raise RuntimeError(
                "the engine's thread is in the process that forked this one: make another engine"
            )

    def check_may_wait(self) -> None:
        """Raises RuntimeError in the engine's own thread."""
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "call this from another thread: the thread of the engine would wait for itself"
            )

    def stop(self) -> None:
        if self._process != os.getpid():
            return  # a fork has no thread to end, and may have copied a lock that is held
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._awake or self._closing):
                    self._changed.wait()
                self._awake = False
                jobs, self._jobs = self._jobs, deque()
                closing = self._closing
            while jobs:
                jobs.popleft()()  # a job refers to its stream, so no reference to the job is kept
            if closing:
                for row in self.batch.rows():
                    self.batch.remove(row)
                return
            try:
                worked = self.batch.step()
            except BaseException as error:  # an error of the batch itself: no row can go on
                self._fail(error)
                worked = False
            if worked:
                with self._changed:
                    self._awake = True

    def _fail(self, error: BaseException) -> None:
        failure = error if isinstance(error, Exception) else RuntimeError(f"the engine failed: {error!r}")
        self.batch.take_out(self.batch.rows(), failure)
