"""backend="auto": tokens run from the flat list, and then from a library that was compiled meanwhile."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import streamllm
from streamllm.cache import SinkCache
from streamllm.compiled import library, takeover
from streamllm.compiled.weight_guard import WeightGuard
from streamllm.models import linear
from tests.laws.scenarios import random_tokens, tiny_llama

needs_compiler = pytest.mark.skipif(not takeover.can_pay(tiny_llama()), reason="no C++ compiler")


@pytest.fixture
def soon(monkeypatch, tmp_path):
    """A stream is worth a library at its third token. Libraries are kept in a folder of this test."""
    monkeypatch.setattr(takeover, "LOOK_AFTER_TOKENS", 2)
    monkeypatch.setattr(takeover, "COMPILE_AFTER_SECONDS", 0.0)
    monkeypatch.setenv("STREAMLLM_CACHE", str(tmp_path))


def fresh_model():
    model = type(tiny_llama())(tiny_llama().config)
    model.load_state_dict(tiny_llama().state_dict())
    return model.float().requires_grad_(False).eval()


def decode(model, cache, tokens, wait=False):
    """The logits of tokens [1, T], one by one. wait: for the compilation, as soon as it has begun."""
    logits = []
    for token in tokens[0]:
        logits.append(model(token.view(1, 1), cache))
        if wait:
            for _, way in list(model._takeovers._values.items()):
                way.wait()
    return torch.cat(logits, 1)


@needs_compiler
def test_the_library_takes_over_between_two_tokens(soon):
    plain = fresh_model()
    model = streamllm.compile(fresh_model())
    assert model.backend == "auto"
    tokens = random_tokens(40)
    wanted = decode(plain, SinkCache(plain, 2, 9), tokens)
    cache = SinkCache(model, 2, 9)
    got = decode(model, cache, tokens, wait=True)
    (way,) = model._takeovers._values.values()
    assert way.library is not None
    assert model._by_rows
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)
    # Another stream of the same size takes it from its first token on, past a prompt and at any place.
    cache = SinkCache(model, 2, 9)
    other = torch.cat([model(tokens[:, :17], cache), decode(model, cache, tokens[:, 17:])], 1)
    torch.testing.assert_close(other, wanted, rtol=2e-5, atol=2e-5)
    assert len(model._takeovers._values) == 1


@needs_compiler
def test_a_kept_library_is_taken_without_compiling(soon, monkeypatch):
    first = streamllm.compile(fresh_model())
    decode(first, SinkCache(first, 2, 9), random_tokens(8), wait=True)

    def compiled(*_, **__):
        raise AssertionError("it was kept")

    monkeypatch.setattr(library, "compiled", compiled)
    model = streamllm.compile(fresh_model())
    tokens = random_tokens(12)
    wanted = decode(fresh_model(), SinkCache(fresh_model(), 2, 9), tokens)
    got = decode(model, SinkCache(model, 2, 9), tokens)
    (way,) = model._takeovers._values.values()
    assert way.library is not None
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


@needs_compiler
def test_a_model_that_was_quantized_meanwhile_does_not_take_the_old_library(soon):
    plain, model = fresh_model(), streamllm.compile(fresh_model())
    caches, tokens = (SinkCache(plain, 2, 9), SinkCache(model, 2, 9)), random_tokens(30)
    plain(tokens[:, :6], caches[0])
    decode(model, caches[1], tokens[:, :6], wait=True)
    (before,) = model._takeovers._values.values()
    assert before.library is not None
    for each in (plain, model.model):
        linear.quantize(each)
    wanted, got = (
        decode(each, cache, tokens[:, 6:]) for each, cache in zip((plain, model), caches, strict=True)
    )
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)
    assert model._takeovers.get(next(iter(model._takeovers._values))) is not before


def test_a_compilation_that_fails_leaves_the_flat_list(soon, monkeypatch):
    monkeypatch.setattr(takeover, "can_pay", lambda model: True)
    monkeypatch.setattr("streamllm.compiled.api.can_pay", lambda model: True)

    def failing(*_, **__):
        raise library.CompileError("no")

    monkeypatch.setattr(library, "compiled", failing)
    monkeypatch.setattr(library, "kept", lambda request: None)
    model, tokens = streamllm.compile(fresh_model()), random_tokens(20)
    wanted = decode(fresh_model(), SinkCache(fresh_model(), 2, 9), tokens)
    got = decode(model, SinkCache(model, 2, 9), tokens, wait=True)
    (way,) = model._takeovers._values.values()
    assert way._failed
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


def test_a_list_that_cannot_be_made_leaves_the_flat_list(soon, monkeypatch):
    monkeypatch.setattr("streamllm.compiled.api.can_pay", lambda model: True)

    def failing(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr("streamllm.compiled.api.cpu_loops.prepare", failing)
    model, tokens = streamllm.compile(fresh_model()), random_tokens(20)
    wanted = decode(fresh_model(), SinkCache(fresh_model(), 2, 9), tokens)
    got = decode(model, SinkCache(model, 2, 9), tokens)
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


def test_without_a_compiler_it_is_the_flat_list(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert streamllm.compile(fresh_model(), "auto").backend == "flat"


def test_a_large_model_stays_with_the_flat_list(monkeypatch):
    monkeypatch.setattr(takeover, "MAX_MODEL_BYTES", 1000)
    assert streamllm.compile(fresh_model(), "auto").backend == "flat"


def test_short_streams_start_no_compiler(monkeypatch):
    started = []
    monkeypatch.setattr(library, "compiled", lambda *_, **__: started.append(1))
    model = streamllm.compile(fresh_model())
    decode(model, SinkCache(model, 2, 9), random_tokens(takeover.LOOK_AFTER_TOKENS))
    assert not started
    assert not model._by_rows


def test_threads_wait_while_the_weights_are_stored_anew(soon, monkeypatch):
    """bfloat16 weights are packed; unpacking them under another thread's forward would fail there."""
    monkeypatch.setattr(takeover, "can_pay", lambda model: True)
    monkeypatch.setattr("streamllm.compiled.api.can_pay", lambda model: True)
    monkeypatch.setattr(library, "kept", lambda request: None)

    def failing(*_, **__):
        raise library.CompileError("no")

    monkeypatch.setattr(library, "compiled", failing)
    plain, model = fresh_model().bfloat16(), fresh_model().bfloat16()
    for each in (plain, model):
        linear.arrange(each)
    model = streamllm.compile(model)
    computing, left = threading.Event(), threading.Event()
    stored = []
    tokens = random_tokens(12)
    wanted = decode(plain, SinkCache(plain, 2, 9), tokens)
    arrange_by_rows = linear.arrange_by_rows
    monkeypatch.setattr(
        linear, "arrange_by_rows", lambda given: (stored.append(left.is_set()), arrange_by_rows(given))
    )

    def hook(*_):
        if threading.current_thread() is not threading.main_thread() and not computing.is_set():
            computing.set()
            time.sleep(0.3)
            left.set()

    handle = model.model.head.register_forward_hook(hook)
    found = []

    def other():
        found.append(model(tokens, SinkCache(model, 2, 9)))

    thread = threading.Thread(target=other)
    thread.start()
    assert computing.wait(20)
    got = decode(model, SinkCache(model, 2, 9), tokens)
    thread.join(20)
    handle.remove()
    assert stored == [True]
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.2)
    torch.testing.assert_close(found[0], plain(tokens, SinkCache(plain, 2, 9)), rtol=0.05, atol=0.2)


def test_two_threads_that_change_a_layout_take_turns_and_one_that_ended_keeps_nothing():
    guard, inside, most = WeightGuard(), [], []

    def change():
        with guard:
            for _ in range(20):
                with guard.changing():
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0)
                    inside.pop()

    threads = [threading.Thread(target=change) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [1] * 60
    ended = threading.Thread(target=lambda: (guard.__enter__(), guard.changing().__enter__()))
    ended.start()
    ended.join()
    with guard, guard.changing():
        pass


def test_caches_of_many_sizes_start_one_compiler_at_a_time(soon, monkeypatch):
    monkeypatch.setattr(takeover, "can_pay", lambda model: True)
    monkeypatch.setattr("streamllm.compiled.api.can_pay", lambda model: True)
    monkeypatch.setattr(library, "kept", lambda request: None)
    running, most = [], []

    def failing(*_, **__):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        raise RuntimeError("no")

    monkeypatch.setattr(library, "compiled", failing)
    model = streamllm.compile(fresh_model())
    for window in (5, 7, 9):
        decode(model, SinkCache(model, 2, window), random_tokens(6))
    ways = list(model._takeovers._values.values())
    for way in ways:
        way.wait()
    assert most == [1, 1, 1]
    assert all(way._failed for way in ways)
