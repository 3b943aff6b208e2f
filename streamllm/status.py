"""The status line of a running stream: tokens, speed, place, cache and resident memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TextIO

from streamllm.stream import Stream

INTERVAL = 0.25  # seconds between two refreshes of the line
READING_AFTER = 1.0  # seconds after which the reading of a prompt is shown
REPEATS = 0.5  # a larger share of repeated 4-grams is told

# Escape sequences of terminals
_SAVE_CURSOR, _RESTORE_CURSOR = "\x1b7", "\x1b8"
_CLEAR_LINE = "\x1b[2K"
_SCROLL_WHOLE_SCREEN = "\x1b[r"
_REVERSE, _NORMAL = "\x1b[7m", "\x1b[0m"


class Status:
    """A status line about `stream` on `terminal`, refreshed in place; one line at the end on anything else.

    Where the generated text goes to the same terminal, the line occupies the bottom row, and the text scrolls
    above it.
    """

    def __init__(self, stream: Stream, terminal: TextIO, text: TextIO, quiet: bool = False) -> None:
        self._stream, self._terminal, self._quiet = stream, terminal, quiet
        self._live = not quiet and terminal.isatty() and os.environ.get("TERM") != "dumb"
        self._shared = self._live and text.isatty() and self._size().lines > 2
        self._rows = 0
        self._tokens_before = stream.said
        self._refreshed = self._started = time.monotonic()

    def __enter__(self) -> Status:
        if self._shared:
            self._reserve_bottom_row()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._quiet:
            return
        with contextlib.suppress(BrokenPipeError, ValueError):
            if self._shared:
                self._terminal.write(
                    f"{_SAVE_CURSOR}{_SCROLL_WHOLE_SCREEN}{_to_row(self._rows)}{_CLEAR_LINE}{_RESTORE_CURSOR}"
                )
            elif self._live:
                self._terminal.write(f"\r{_CLEAR_LINE}")
            if kind is None or issubclass(kind, KeyboardInterrupt):
                lead = "\n" if kind is not None and self._shared else ""
                self._terminal.write(f"{lead}{self.line()}\n")
            self._terminal.flush()

    @contextlib.contextmanager
    def reading(self, count: Callable[[], int]) -> Iterator[None]:
        """While the context reads a prompt, show how far it is, from the first second on.

        count: the number of the prompt's tokens; it is called only if it is shown.
        """
        if not self._live:
            yield
            return
        before, done = self._stream.seen, threading.Event()

        def show() -> None:
            if done.wait(READING_AFTER):
                return
            total = count()
            while not done.wait(INTERVAL):
                read = min(self._stream.seen - before, total)
                self._refresh(f"reading the prompt: {read:,} of {total:,} tokens")

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def tick(self) -> None:
        """To be called after each piece of text."""
        now = time.monotonic()
        if self._tokens() <= 1:  # until then the prompt was read, which does not count for the speed
            self._started = now
        if self._live and now - self._refreshed >= INTERVAL:
            self._refreshed = now
            self._refresh(self.line())

    def line(self) -> str:
        """The text of the status line."""
        seconds = time.monotonic() - self._started
        tokens = self._tokens()
        speed = f"{(tokens - 1) / seconds:,.1f} tokens/s" if tokens > 1 and seconds else "– tokens/s"
        parts = [
            f"{tokens:,} tokens",
            speed,
            f"place {self._stream.seen:,}",
            f"cache {self._stream.cache.nbytes / 1e6:.1f} MB",
        ]
        share = self._stream.repeated
        if share > REPEATS:
            parts.append(f"repeats itself {share:.0%}")
        resident = resident_bytes()
        if resident is not None:
            parts.append(f"resident {resident / 1e6:,.0f} MB")
        return " · ".join(parts)

    def _tokens(self) -> int:
        """Tokens generated since this object was made."""
        return self._stream.said - self._tokens_before

    def _refresh(self, line: str) -> None:
        size = self._size()
        line = line[: size.columns - 1]
        if not self._shared:
            self._terminal.write(f"\r{_CLEAR_LINE}{line}")
        else:
            if size.lines != self._rows:
                self._reserve_bottom_row()
            self._terminal.write(
                f"{_SAVE_CURSOR}{_to_row(self._rows)}{_CLEAR_LINE}{_REVERSE}{line}{_NORMAL}{_RESTORE_CURSOR}"
            )
        self._terminal.flush()

    def _size(self) -> os.terminal_size:
        with contextlib.suppress(OSError, ValueError):
            # shutil asks standard output, which may be a pipe; the line is on self._terminal.
            size = os.get_terminal_size(self._terminal.fileno())
            if size.columns and size.lines:
                return size
        return shutil.get_terminal_size()

    def _reserve_bottom_row(self) -> None:
        """Limit scrolling to the rows above the bottom one. The cursor stays where it is in the text."""
        self._rows = self._size().lines
        scroll_above = f"\x1b[1;{self._rows - 1}r"
        one_row_up = "\x1b[1A"
        self._terminal.write(f"\n{_SAVE_CURSOR}{scroll_above}{_RESTORE_CURSOR}{one_row_up}")
        self._terminal.flush()


def _to_row(row: int) -> str:
    return f"\x1b[{row};1H"


def resident_bytes() -> int | None:
    """Resident memory of this process in bytes, its peak on macOS; None where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
