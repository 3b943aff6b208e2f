"""WeightGuard: a model's weights are stored anew only while no other thread computes with them."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

POLL_SECONDS = 0.001


class WeightGuard:
    """`with guard:` around what computes with the weights, `with guard.changing():` around what stores them anew.

    A thread that computes may begin to change: it counts as computing again at the end. Like `ForwardGuard`, it
    holds the numbers of threads, not a lock: a thread that has ended keeps nothing.
    """

    def __init__(self) -> None:
        self._computing: set[int] = set()
        self._changing: int | None = None
        self._one = threading.Lock()  # for the test of `_changing`

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():  # torch.compile cannot trace threads
            return
        own = threading.get_ident()
        self._computing.add(own)
        # Asked after the addition: whoever changes asks the other way round, so one of the two sees the other.
        while self._changing is not None and self._changing != own:
            self._computing.discard(own)
            self._wait_for(self._changing)
            self._computing.add(own)

    def __exit__(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            self._computing.discard(threading.get_ident())

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Wait until no other thread computes or changes, and keep the others waiting."""
        own = threading.get_ident()
        computed = own in self._computing
        self._computing.discard(own)  # else two threads that begin to change would wait for each other
        try:
            while not self._began(own):
                self._wait_for(self._changing)
            while self._computing:
                for other in list(self._computing):
                    self._wait_for(other)
            yield
        finally:
            if computed:
                self._computing.add(own)
            if self._changing == own:
                self._changing = None

    def _began(self, own: int) -> bool:
        with self._one:
            if self._changing is None:
                self._changing = own
        return self._changing == own

    def _wait_for(self, other: int | None) -> None:
        """A moment; or forget a thread that has ended without leaving."""
        if other is not None and other not in sys._current_frames():
            self._computing.discard(other)
            if self._changing == other:
                self._changing = None
        time.sleep(POLL_SECONDS)


_guards: WeakKeyDictionary[nn.Module, WeightGuard] = WeakKeyDictionary()


def weight_guard_of(model: nn.Module) -> WeightGuard:
    """The guard of a model's weights: one for all that compute with them."""
    return _guards.setdefault(model, WeightGuard())
