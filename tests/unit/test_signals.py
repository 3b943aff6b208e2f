"""The law of interruption for a stream: wherever Ctrl-C falls, no token is lost, fed twice, or shown twice.

A trace function raises KeyboardInterrupt at each line that the library runs for a few tokens, one line after the other.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import streamllm
from streamllm import SinkCache, Stream, loop

ROOT = str(Path(streamllm.__file__).parents[1])
ROOMS = tuple(f"{ROOT}/{room}/" for room in ("streamllm", "models"))
TEXT = "def once(upon):\n    return"
SETTINGS = {"temperature": 0.9, "seed": 5, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "eos": []}
TOKENS, BEFORE = 12, 4  # tokens of a text, and those before the interrupt; the prompt alone fills the window
# Every so many lines. STREAMLLM_EVERY_LINE=1 strikes at each line; that takes half an hour.
EVERY_LINE = bool(os.environ.get("STREAMLLM_EVERY_LINE"))
STRIDE = (
    dict.fromkeys(["modules", "flat", "run ahead"], 1)
    if EVERY_LINE
    else {"modules": 13, "flat": 17, "run ahead": 17}
)


class Strike:
    """Raises KeyboardInterrupt at line event number `at` of this library, counted from the start."""

    def __init__(self, at: int) -> None:
        self.at, self.lines = at, 0

    def __enter__(self) -> Strike:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_) -> None:
        sys.settrace(None)

    def _call(self, frame, event, _):
        return self._line if frame.f_code.co_filename.startswith(ROOMS) else None

    def _line(self, frame, event, _):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


@pytest.fixture(params=list(STRIDE))
def backend(request, monkeypatch) -> str:
    if request.param == "run ahead":
        monkeypatch.setattr(loop, "RUN_AHEAD", ("cpu",))
    return request.param


def a_stream(model, tokenizer, backend: str) -> Stream:
    model = streamllm.compile(model, "flat") if backend == "flat" else model
    return Stream(model, tokenizer, sinks=2, window=7, chunk=4)


def test_ctrl_c_at_every_line_of_three_tokens_loses_nothing(model, tokenizer, backend: str) -> None:
    whole = "".join(a_stream(model, tokenizer, backend).generate(TEXT, max_new_tokens=TOKENS, **SETTINGS))
    stream = a_stream(model, tokenizer, backend)
    tokens = tokenizer.encode(TEXT)
    at = 1
    struck = True
    while struck:
        stream.reset()
        pieces = list(stream.generate(TEXT, max_new_tokens=BEFORE, **SETTINGS))
        struck = False
        with Strike(at):
            try:
                for piece in stream.generate(max_new_tokens=3, **SETTINGS):
                    pieces.append(piece)
            except KeyboardInterrupt:
                struck = True
        pieces += stream.generate(max_new_tokens=TOKENS - stream.said + stream._view.unsaid, **SETTINGS)
        assert "".join(pieces) == whole, f"at line event {at}"
        assert stream.said == TOKENS
        assert stream.seen == len(tokens) + TOKENS - 1, f"at line event {at}"
        at += STRIDE[backend]
    assert at > 300


def test_ctrl_c_at_every_line_of_a_prompt_and_of_a_stop_string_loses_nothing(
    model, tokenizer, backend: str
) -> None:
    first = "".join(a_stream(model, tokenizer, backend).generate(TEXT, max_new_tokens=12, **SETTINGS))
    stop = first[4:7]

    def answer(stream: Stream, strike: int) -> tuple[str, bool]:
        pieces, struck = [], False
        with Strike(strike):
            try:
                for piece in stream.generate(TEXT, max_new_tokens=12, stop=stop, **SETTINGS):
                    pieces.append(piece)
            except KeyboardInterrupt:
                struck = True
        return "".join(pieces), struck

    stream = a_stream(model, tokenizer, backend)
    shown, _ = answer(stream, 0)
    assert shown == first[:4]
    after = "".join(stream.generate(" and", max_new_tokens=6, **SETTINGS))
    struck, at = True, 1
    while struck:
        stream.reset()
        shown, struck = answer(stream, at)
        if stream.seen or stream._loop.end:  # else it fell before the prompt was pushed
            if struck and stream.finish_reason is None:
                shown += "".join(
                    stream.generate(
                        max_new_tokens=12 - stream.said + stream._view.unsaid, stop=stop, **SETTINGS
                    )
                )
            assert shown == first[:4], f"at line event {at}"
            got = "".join(stream.generate(" and", max_new_tokens=6, **SETTINGS))
            assert got == after, f"at line event {at}"
        at += 3 * STRIDE[backend]


def test_the_cache_of_an_interrupted_stream_equals_that_of_one_that_was_not(model, tokenizer) -> None:
    plain = a_stream(model, tokenizer, "modules")
    list(plain.generate(TEXT, max_new_tokens=15, **SETTINGS))
    for at in range(1, 900, 41):
        stream = a_stream(model, tokenizer, "modules")
        with Strike(at), pytest.raises(KeyboardInterrupt):
            list(stream.generate(TEXT, max_new_tokens=15, **SETTINGS))
        if not stream._loop.end:
            list(stream.generate(TEXT, max_new_tokens=15, **SETTINGS))
        left = 15 - stream.said + stream._view.unsaid
        list(stream.generate(max_new_tokens=left, **SETTINGS))
        wanted, got = plain.cache.state_dict(), stream.cache.state_dict()
        assert all((wanted[name] - got[name]).abs().max() < 1e-4 for name in wanted), f"at line event {at}"
        assert isinstance(stream.cache, SinkCache)
