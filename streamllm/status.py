"""The status line of a running stream: tokens, speed, place, cache and resident memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

from streamllm.stream import Stream

INTERVAL = 0.25  # seconds between two looks at a terminal


class Status:
    """A line on `terminal` about `stream`, refreshed in place; where it is no terminal, one line at the end.

    When the text goes to the same terminal, the line keeps the bottom row for itself and the text scrolls
    above it.
    """

    def __init__(self, stream: Stream, terminal: TextIO, text: TextIO, quiet: bool = False) -> None:
        self._stream, self._terminal, self._quiet = stream, terminal, quiet
        self._live = not quiet and terminal.isatty() and os.environ.get("TERM") != "dumb"
        self._shared = self._live and text.isatty() and self._size().lines > 2
        self._rows = 0
        self._first = stream.said
        self._shown = self._since = time.monotonic()

    def __enter__(self) -> Status:
        if self._shared:
            self._reserve()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._quiet:
            return
        with contextlib.suppress(BrokenPipeError, ValueError):
            if self._shared:
                self._terminal.write(f"\x1b7\x1b[r\x1b[{self._rows};1H\x1b[2K\x1b8")
            elif self._live:
                self._terminal.write("\r\x1b[2K")
            if kind is None or issubclass(kind, KeyboardInterrupt):
                lead = "\n" if kind is not None and self._shared else ""
                self._terminal.write(f"{lead}{self.line()}\n")
            self._terminal.flush()

    def tick(self) -> None:
        """Something more was said."""
        now = time.monotonic()
        if self._stream.said - self._first <= 1:  # the prompt was read, and is not counted in the speed
            self._since = now
        if self._live and now - self._shown >= INTERVAL:
            self._shown = now
            self._refresh()

    def line(self) -> str:
        """What the status line says."""
        seconds = time.monotonic() - self._since
        tokens = self._stream.said - self._first
        speed = f"{(tokens - 1) / seconds:,.1f} tokens/s" if tokens > 1 and seconds else "– tokens/s"
        parts = [
            f"{tokens:,} tokens",
            speed,
            f"place {self._stream.seen:,}",
            f"cache {self._stream.cache.nbytes / 1e6:.1f} MB",
        ]
        resident = resident_bytes()
        if resident is not None:
            parts.append(f"resident {resident / 1e6:,.0f} MB")
        return " · ".join(parts)

    def _refresh(self) -> None:
        line = self.line()
        size = self._size()
        if not self._shared:
            self._terminal.write(f"\r\x1b[2K{line[: size.columns - 1]}")
        else:
            if size.lines != self._rows:
                self._reserve()
            self._terminal.write(
                f"\x1b7\x1b[{self._rows};1H\x1b[2K\x1b[7m{line[: size.columns - 1]}\x1b[0m\x1b8"
            )
        self._terminal.flush()

    def _size(self) -> os.terminal_size:
        with contextlib.suppress(OSError, ValueError):
            size = os.get_terminal_size(
                self._terminal.fileno()
            )  # not that of standard output, a pipe perhaps
            if size.columns and size.lines:
                return size
        return shutil.get_terminal_size()

    def _reserve(self) -> None:
        """Keep the text out of the bottom row: a scroll region without it, the cursor where it was."""
        self._rows = self._size().lines
        self._terminal.write(f"\n\x1b7\x1b[1;{self._rows - 1}r\x1b8\x1b[1A")
        self._terminal.flush()


def resident_bytes() -> int | None:
    """Resident memory of this process in bytes, where the system tells; its peak on macOS."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
