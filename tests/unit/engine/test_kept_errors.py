"""An error that is kept keeps no stream of its step, and no reference cycle waits for the garbage collector."""

from __future__ import annotations

import gc
import sys
import traceback
import weakref

import pytest

import streamllm
from streamllm import Engine
from tests.unit.engine.conftest import SIZES, until


class Failed(Exception):
    """Raised on purpose."""


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def fails(*_: object):
    raise Failed


def in_a_callback(engine):
    return engine.submit("x", max_new_tokens=9, on_piece=fails)


def in_a_processor(engine):
    return engine.submit("x", max_new_tokens=9, logits_processor=fails)


def in_a_forward(engine):
    request = engine.submit("x", eos=[])
    next(request)
    handle = engine.model.layers[1].register_forward_hook(fails)
    until(lambda: request.has_ended)
    handle.remove()
    return request


@pytest.mark.parametrize("fault", [in_a_callback, in_a_processor, in_a_forward])
@pytest.mark.parametrize("is_read", [True, False])
def test_a_failed_stream_and_its_neighbours_are_freed(pair, no_collector, fault, is_read):
    kept: list[Exception] = []
    with Engine(*pair, slots=3, **SIZES) as engine:
        neighbour = engine.submit("Once", eos=[], ahead=2)
        next(neighbour)
        request = fault(engine)
        streams = [weakref.ref(request._stream), weakref.ref(neighbour._stream)]
        until(lambda request=request: request.has_ended)
        if is_read:
            try:
                list(request)
            except Failed as error:
                kept.append(error)
            text = "".join(traceback.format_exception(kept[0]))
            assert sys.version_info < (3, 11) or "raise Failed" in text  # it has no notes
        neighbour.cancel()
        until(lambda: not engine.running)
        del request, neighbour
        until(lambda: streams[1]() is None)
        kept.clear()  # it keeps what its reader did: its own request
        until(lambda: streams[0]() is None)


def test_the_errors_of_a_list_keep_no_stream(pair, monkeypatch, no_collector):
    made = []
    init = streamllm.Stream.__init__

    def noting(self, *args: object, **options: object):
        init(self, *args, **options)
        made.append(weakref.ref(self))

    monkeypatch.setattr(streamllm.Stream, "__init__", noting)
    each = [{"logits_processor": fails}, {}, {"temperature": -1.0}]
    found = streamllm.complete(*pair, ["x", "def ", "x"], each=each, max_new_tokens=3, **SIZES)
    assert [type(one.error) for one in found] == [Failed, type(None), ValueError]
    assert len(made) > 3
    assert [stream() for stream in made] == [None] * len(made)
