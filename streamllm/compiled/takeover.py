"""Takeover: a library that another process compiles while tokens already run from the flat list.

Compiling takes half a minute or more, which only a long stream is worth. So the first tokens run from the flat list.
After a few tokens, this looks for a library that an earlier process kept. After some seconds, it compiles one at low
priority. As soon as the library is ready, tokens run from it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from torch import nn

from streamllm.compiled import library
from streamllm.compiled.library import CompileError, Library, Request

LOOK_AFTER_TOKENS = 16
COMPILE_AFTER_SECONDS = 5.0
# Larger models spend their time on reading weights, where the flat list is nearly as fast (tools/bench.py decode).
MAX_MODEL_BYTES = 2 << 30
_one_at_a_time = threading.Lock()  # caches of many sizes must not start as many compilers


def can_pay(model: nn.Module) -> bool:
    """Whether compiling can be worth it here: there is a compiler, and the model is not too large."""
    try:
        library.check()
    except CompileError:
        return False
    return sum(weight.nbytes for weight in model.parameters()) <= MAX_MODEL_BYTES


class Takeover:
    """Obtains the library for one kind of token. `advance` is called once for each token."""

    def __init__(self) -> None:
        self.library: Library | None = None  # once it is ready
        self.key = ""  # of the request that it was compiled for
        self._tokens, self._begun = 0, time.monotonic()
        self._request: Request | None = None
        self._compiling: threading.Thread | None = None
        self._failed = False

    def advance(self, request: Callable[[], Request]) -> bool:
        """Whether the library is ready. request: makes the request to compile; called once, takes long."""
        if self.library is not None or self._failed:
            return self.library is not None
        self._tokens += 1
        if self._request is None and self._tokens > LOOK_AFTER_TOKENS:
            try:
                found = request()
                self.library, self.key = library.kept(found), found.key()
            except Exception:  # such as no memory for the other layout: tokens still run from the flat list
                self._failed = True
                return False
            self._request = found
        elif self._request is not None and self._compiling is None and self._has_gone_on():
            # A daemon: a process that ends does not wait for it, and the compiler ends with the process.
            thread = threading.Thread(target=self._compile, args=(self._request,), daemon=True)
            thread.start()
            self._compiling = thread
        return self.library is not None

    def _has_gone_on(self) -> bool:
        return time.monotonic() - self._begun > COMPILE_AFTER_SECONDS

    def wait(self) -> None:
        """Wait until a compilation that has begun is over."""
        if self._compiling is not None:
            self._compiling.join()

    def _compile(self, request: Request) -> None:
        try:
            with _one_at_a_time:
                self.library = library.compiled(request, low_priority=True)
        except Exception:  # whatever it was: tokens still run from the flat list
            self._failed = True
