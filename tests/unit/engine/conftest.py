"""A model in float64 with a chat template, and an engine of it."""

from __future__ import annotations

import threading
import time

import pytest

import streamllm
from streamllm import Engine, Stream
from tests.unit.conftest import write_chat_tokenizer, write_llama

SIZES = {"sinks": 4, "window": 40}
TEXTS = ["Once upon a time", "def ", "x", "one two three four five six seven " * 6, "for name in", "naïve ☕"]


@pytest.fixture(scope="package")
def pair(tmp_path_factory):
    """A model in float64 with a ChatML template, so that rounding does not decide about tokens."""
    folder = tmp_path_factory.mktemp("engine")
    ids = write_chat_tokenizer(folder)
    return streamllm.load(write_llama(folder, ids), device="cpu", dtype="float64")


@pytest.fixture
def engine(pair):
    with Engine(*pair, slots=3, **SIZES) as engine:
        yield engine
    assert not any(thread.name == "streamllm engine" for thread in threading.enumerate())


def alone(pair, text, **options):
    return list(Stream(*pair, **SIZES).generate(text, **options))


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)
