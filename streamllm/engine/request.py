"""Request: the text of one stream on its way from the engine to its reader, a thread or asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from streamllm.sampling import TokenLogProbs

if TYPE_CHECKING:
    from streamllm.stream import Stream

CANCELLED = "cancelled"


class Mailbox:
    """The pieces that were generated and not read yet. The engine's thread puts them in, the reader takes them out.

    ahead: the stream pauses while this many pieces wait; None: never. on_piece: is called in the engine's thread
    with each piece, instead of keeping it. wake: tells the engine that it may go on. on_end: is called at the end.
    check_may_wait: raises RuntimeError in the engine's thread, which would wait for itself.
    """

    def __init__(
        self,
        ahead: int | None,
        on_piece: Callable[[str], object] | None,
        wake: Callable[[], None],
        on_end: Callable[[], None],
        check_may_wait: Callable[[], None],
    ) -> None:
        self._check_may_wait = check_may_wait
        self._ahead, self._on_piece, self._wake, self._on_end = ahead, on_piece, wake, on_end
        self._changed = threading.Condition()
        self._pieces: deque[str] = deque()
        self._readers: list[Callable[[], None]] = []  # of asyncio: each is called once, at the next change
        self.is_cancelled = False
        self.has_ended = False
        self.has_failed = False
        self._error: Exception | None = None  # raised by the next `take` after the last piece

    # For the engine's thread

    @property
    def is_full(self) -> bool:
        return self._ahead is not None and len(self._pieces) >= self._ahead

    def give(self, piece: str) -> None:
        if self._on_piece is not None:
            try:
                self._on_piece(piece)
            except Exception:
                raise
            except BaseException as error:  # such as SystemExit: it would end the engine's thread
                raise RuntimeError(f"on_piece raised {error!r}") from error
            return
        with self._changed:
            self._pieces.append(piece)
            self._notify()

    def end(self, error: Exception | None) -> None:
        self._on_end()
        with self._changed:
            self.has_ended, self.has_failed, self._error = True, error is not None, error
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        readers, self._readers = self._readers, []
        for reader in readers:
            reader()

    # For the reader

    def take(self, call_later: Callable[[], None] | None = None) -> str | None:
        """The next piece; None at the end. Waits for it, or, with `call_later`, raises BlockingIOError.

        call_later: is called once, in another thread, when it is time to ask again.
        """
        with self._changed:
            while not self._pieces:
                if self.has_ended:
                    error, self._error = self._error, None
                    if error is None:
                        return None
                    try:
                        raise error
                    finally:
                        del error  # its traceback refers to this function
                if call_later is not None:
                    self._readers.append(call_later)
                    raise BlockingIOError
                self._check_may_wait()
                self._changed.wait()
            was_full = self.is_full
            piece = self._pieces.popleft()
        if was_full:
            self._wake()
        return piece

    def forget(self, call_later: Callable[[], None]) -> None:
        """Remove a callback that `take` was given."""
        with self._changed:
            if call_later in self._readers:
                self._readers.remove(call_later)

    def cancel(self) -> None:
        self.is_cancelled = True
        self._wake()


class Request:
    """One stream of an engine. Iterate over it (`for` or `async for`) to get the text that it generates, by pieces.

    Pieces are those of `Stream.generate`. A request that nobody holds any more is cancelled, unless it has an
    `on_piece`. An error that ended the stream is raised where the next piece would come.
    """

    def __init__(self, stream: Stream, mailbox: Mailbox, detach: Callable[[], None], keep: bool) -> None:
        self._stream, self._mailbox, self._detach = stream, mailbox, detach
        self._is_detached = False
        if not keep:
            weakref.finalize(self, mailbox.cancel).atexit = False

    @property
    def finish_reason(self) -> str | None:
        """Why the text has ended: as `Stream.finish_reason`, or "cancelled", also by the engine's `close`.

        None before the end, after an error, and for a detached stream.
        """
        mailbox = self._mailbox
        if not mailbox.has_ended or mailbox.has_failed or self._is_detached:
            return None
        return self._stream.finish_reason or CANCELLED

    @property
    def has_ended(self) -> bool:
        """Whether no more text is generated. Pieces may wait to be read."""
        return self._mailbox.has_ended

    @property
    def generated(self) -> int:
        """How many tokens the stream's model has generated, as `Stream.said`."""
        return self._stream.said

    @property
    def logprobs(self) -> list[TokenLogProbs]:
        """As `Stream.logprobs`."""
        return self._stream.logprobs

    def __iter__(self) -> Request:
        return self

    def __next__(self) -> str:
        piece = self._mailbox.take()
        if piece is None:
            raise StopIteration
        return piece

    def __aiter__(self) -> Request:
        return self

    async def __anext__(self) -> str:
        loop = asyncio.get_running_loop()
        while True:
            changed = asyncio.Event()

            def call_later(changed: asyncio.Event = changed) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(changed.set)

            try:
                piece = self._mailbox.take(call_later)
            except BlockingIOError:
                try:
                    await changed.wait()
                finally:
                    self._mailbox.forget(call_later)
                continue
            if piece is None:
                raise StopAsyncIteration
            return piece

    def text(self) -> str:
        """Wait for the end, and return the rest of the text.

        Raises the error that ended the stream; RuntimeError in the engine's thread, for example within `on_piece`.
        """
        return "".join(self)

    def cancel(self) -> None:
        """End the stream after its current token. Returns at once; pieces that wait can still be read."""
        self._mailbox.cancel()

    def detach(self) -> Stream:
        """Take the stream out of the engine, between two tokens. It can then go on by itself, be saved or submitted.

        Pieces that wait can still be read here. Raises RuntimeError where the stream has ended, or the engine is
        closed.
        """
        self._detach()
        self._is_detached = True
        return self._stream
