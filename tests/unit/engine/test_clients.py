"""Engine: what clients may do at any moment is right, and what they may not do is refused in one sentence."""

from __future__ import annotations

import random
import threading

import pytest
import torch

import streamllm
from streamllm import Engine, Stream
from tests.unit.engine.conftest import SIZES, TEXTS, alone, until

SAMPLED = {"temperature": 1.0, "eos": []}


def waits_for_the_text(engine, other):
    engine.submit(
        "x", max_new_tokens=3, on_piece=lambda _: engine.submit("y", max_new_tokens=2).text()
    ).text()


def waits_for_a_piece(engine, other):
    engine.submit("x", max_new_tokens=3, on_piece=lambda _: [next(other) for _ in range(9)]).text()


def waits_in_a_processor(engine, other):
    def processor(tokens, logits):
        engine.submit("y", max_new_tokens=1).text()
        return logits

    engine.submit("x", max_new_tokens=3, logits_processor=processor).text()


def detaches(engine, other):
    engine.submit("x", max_new_tokens=3, on_piece=lambda _: other.detach()).text()


@pytest.mark.parametrize("client", [waits_for_the_text, waits_for_a_piece, waits_in_a_processor, detaches])
def test_the_engines_thread_does_not_wait_for_itself(pair, engine, client):
    other = engine.submit("def ", eos=[], ahead=2)
    got: list[BaseException] = []

    def run():
        try:
            client(engine, other)
        except RuntimeError as error:
            got.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert "from another thread" in str(got[0])
    assert engine.submit("x", max_new_tokens=9).text() == "".join(alone(pair, "x", max_new_tokens=9))


def test_a_callback_submits(pair, engine):
    submitted = []

    def on_piece(piece: str) -> None:
        submitted.append(engine.submit("def ", max_new_tokens=5, eos=[]))

    engine.submit("x", max_new_tokens=4, eos=[], on_piece=on_piece).text()
    assert [request.text() for request in submitted] == [
        "".join(alone(pair, "def ", max_new_tokens=5, eos=[]))
    ] * 4


def test_a_callback_closes_the_engine(pair):
    engine = Engine(*pair, slots=2, **SIZES)
    request = engine.submit("x", eos=[], on_piece=lambda _: engine.close())
    assert request.text() == ""
    assert request.finish_reason == "cancelled"
    until(lambda: not any(thread.name == "streamllm engine" for thread in threading.enumerate()))


def test_a_stream_in_an_engine_is_neither_changed_nor_copied(pair, engine, tmp_path):
    stream = Stream(*pair, **SIZES)
    "".join(stream.chat("Hello", max_new_tokens=3))
    request = engine.submit("Once", stream=stream, seed=1, ahead=5, **SAMPLED)
    next(request)
    for use in (
        lambda: stream.feed("abc"), stream.reset, stream.undo, lambda: stream.drop(0), stream.fork,
        lambda: stream.save(tmp_path / "session"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="in an engine already"):
            use()
    request.detach()
    stream.save(tmp_path / "session")
    assert stream.fork().undo()


def test_a_stream_in_an_engine_saves_itself(pair, engine, tmp_path):
    stream = Stream(*pair, **SIZES)
    stream.autosave(tmp_path / "session", every=4)
    text = engine.submit("Once", stream=stream, max_new_tokens=10, eos=[]).text()
    saved = Stream.load(tmp_path / "session", *pair)
    assert saved.said >= 6
    rest = "".join(saved.generate("", max_new_tokens=10 - saved.said, eos=[]))
    assert rest
    assert rest in text  # a token that was saved before it was shown comes first


def test_two_hundred_in_a_queue_with_cancels(pair, engine):
    dice = random.Random(0)
    options = {"max_new_tokens": 4, **SAMPLED}
    requests = [engine.submit(TEXTS[number % 6], seed=number, **options) for number in range(200)]
    cancelled = {number for number in range(200) if dice.random() < 0.4}
    for number in cancelled:
        requests[number].cancel()
    texts = [request.text() for request in requests]
    for number in range(0, 200, 9):
        wanted = "".join(alone(pair, TEXTS[number % 6], seed=number, **options))
        assert wanted.startswith(texts[number]) if number in cancelled else texts[number] == wanted
    assert engine.running == engine.queued == 0


@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (4, 1), (1, 2), (0, 3)])
def test_windows_smaller_than_a_prompt(pair, sinks, window):
    sizes = {"sinks": sinks, "window": window}
    with Engine(*pair, slots=1, prefill_tokens=1, **sizes) as engine:
        for prompt in (list(range(5, 100)), [7], "x"):
            for count in (1, 6):
                options = {"max_new_tokens": count, "eos": []}
                wanted = list(Stream(*pair, **sizes).generate(prompt, **options))
                assert list(engine.submit(prompt, **options)) == wanted


@pytest.mark.parametrize("backend", [None, "flat"])
def test_engines_of_one_model_beside_other_users_of_it(pair, backend):
    model, tokenizer = pair
    model = streamllm.compile(model, backend) if backend else model
    options = {"max_new_tokens": 40, **SAMPLED}
    other = {"sinks": 2, "window": 20}
    wanted = ["".join(alone(pair, "x", seed=seed, **options)) for seed in range(5)]
    smaller = ["".join(Stream(*pair, **other).generate("x", seed=n, **options)) for n in range(5)]
    with Engine(model, tokenizer, 2, **SIZES) as one, Engine(model, tokenizer, 3, **other) as two:
        requests = [engine.submit("x", seed=seed, **options) for engine in (one, two) for seed in range(5)]
        beside = [
            "".join(Stream(model, tokenizer, **SIZES).generate("x", seed=n, **options)) for n in range(5)
        ]
        texts = [request.text() for request in requests]
    assert beside == wanted
    assert texts == wanted + smaller


@pytest.mark.parametrize("backend", [None, "flat"])
def test_a_model_is_trained_while_an_engine_has_it(pair, backend, tmp_path):
    streamllm.save_pretrained(*pair, tmp_path / "copy")
    model, tokenizer = streamllm.load(tmp_path / "copy", device="cpu", dtype="float64")
    used = streamllm.compile(model, backend) if backend else model
    with Engine(used, tokenizer, slots=2, **SIZES) as engine:
        before = engine.submit("def ", max_new_tokens=30, eos=[]).text()
        model.requires_grad_(True).train()
        model(torch.tensor([[5, 6, 7]])).logsumexp(-1).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad)
        model.eval().requires_grad_(False)
        after = engine.submit("def ", max_new_tokens=30, eos=[]).text()
        assert after == "".join(alone((model, tokenizer), "def ", max_new_tokens=30, eos=[])) != before
        model.float()
        with pytest.raises(ValueError, match="make a SinkCache for the model as it is"):
            engine.submit("def ", max_new_tokens=3).text()
        model.double()
        assert engine.submit("def ", max_new_tokens=3, eos=[]).text()
