"""One forward at a time: two threads that advance one cache would leave a state that equals neither order."""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch


class ForwardGuard:
    """`with guard:` around whatever reads and then advances a cache. Raises RuntimeError in a second thread.

    It holds the number of the thread, not a lock: a thread that was interrupted in between can go on, and one that
    has ended keeps nothing.
    """

    def __init__(self) -> None:
        self._holder: dict[str, int] = {}

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():  # torch.compile cannot trace threads
            return
        own = threading.get_ident()
        holder = self._holder.setdefault("thread", own)  # in one operation: tests and sets
        if holder != own:
            self._take_over(holder, own)

    def _take_over(self, holder: int, own: int) -> None:
        """From a thread that has ended without leaving."""
        if holder in sys._current_frames():
            raise RuntimeError(
                "another thread is using this cache: run one forward at a time on it, or give each thread a cache "
                "of its own"
            )
        self._holder["thread"] = own

    def __exit__(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            self._holder.pop("thread", None)

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: nothing uses a copy yet."""
        return {"_holder": {}}
