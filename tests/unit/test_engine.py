"""Engine: each stream gets the text that it would get alone, and what happens to one happens to no other."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from tokenizers import Tokenizer as Library

import streamllm
from streamllm import Engine, Stream
from tests.unit.chat.samples import STYLES
from tests.unit.conftest import write_llama, write_tokenizer

SIZES = {"sinks": 4, "window": 40}
TEXTS = ["Once upon a time", "def ", "x", "one two three four five six seven " * 6, "for name in", "naïve ☕"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model in float64 with a ChatML template, so that rounding does not decide about tokens."""
    folder = tmp_path_factory.mktemp("engine")
    write_tokenizer(folder, bos=True)
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    library.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(STYLES["chatml"])
    return streamllm.load(write_llama(folder, library.get_vocab_size()), device="cpu", dtype="float64")


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


SETTINGS = [
    {"temperature": 1.0, "seed": 3, "max_new_tokens": 50},
    {"max_new_tokens": 30, "stop": ["e"]},
    {"temperature": 0.7, "top_k": 20, "seed": 1, "max_new_tokens": 60, "stop": ["ab", "th"]},
    {"temperature": 1.5, "seed": 9, "max_new_tokens": 45, "repetition_penalty": 1.2, "top_logprobs": 2},
    {"temperature": 1.0, "seed": 4, "max_new_tokens": 40, "eos": list(range(2, 40))},
    {"max_new_tokens": 1},
    {"max_new_tokens": 0},
]


def test_each_stream_gets_its_text_alone(pair, engine):
    for turn in range(2):
        wanted, requests = [], []
        for number, options in enumerate(SETTINGS):
            text = TEXTS[(number + turn) % len(TEXTS)]
            stream = Stream(*pair, **SIZES)
            wanted.append((list(stream.generate(text, **options)), stream.finish_reason, stream.logprobs))
            requests.append(engine.submit(text, **options))
        got = [(list(request), request.finish_reason, request.logprobs) for request in requests]
        assert [(pieces, reason) for pieces, reason, _ in got] == [(p, reason) for p, reason, _ in wanted]
        assert [[x.token for x in found] for _, _, found in got] == [
            [x.token for x in w] for _, _, w in wanted
        ]
    assert engine.running == engine.queued == 0


def test_each_slot_has_the_memory_of_one_cache(pair, engine):
    assert engine.nbytes == 3 * Stream(*pair, **SIZES).cache.nbytes


def test_ids_and_processors(pair, engine):
    def never_a(tokens, logits):
        logits = logits.clone()
        logits[70:90] = -torch.inf
        return logits

    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 5, "logits_processor": never_a}
    requests = [engine.submit([5, 6, 7], **options), engine.submit("x", max_new_tokens=20)]
    assert requests[0].text() == "".join(alone(pair, [5, 6, 7], **options))
    assert requests[1].text() == "".join(alone(pair, "x", max_new_tokens=20))


def test_wrong_arguments_are_refused_at_the_call(pair, engine):
    for options in ({"max_new_tokens": -1}, {"stop": ""}, {"temperature": -1.0}, {"ahead": 0}):
        with pytest.raises(ValueError, match=r"must|empty"):
            engine.submit("x", **options)
    with pytest.raises(TypeError, match="not a setting"):
        engine.submit("x", heat=1)
    with pytest.raises(TypeError, match="stream must be"):
        engine.submit("x", stream=3)
    with pytest.raises(TypeError, match="not a model of this library"):
        Engine(pair[1], pair[0])
    with pytest.raises(TypeError, match="on_piece"):
        engine.submit("x", on_piece=3)
    with pytest.raises(ValueError, match="window=30"):
        engine.submit("x", stream=Stream(*pair, sinks=4, window=30))
    with pytest.raises(ValueError, match="slots"):
        Engine(*pair, slots=0)
    with pytest.raises(ValueError, match="sinks="):
        engine.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
                    stream=Stream(*pair, sinks="system", window=40))  # fmt: skip
    other, _ = streamllm.load(device="cpu")
    with pytest.raises(ValueError, match="another model"):
        engine.submit("x", stream=Stream(other, pair[1], **SIZES))
    assert engine.running == engine.queued == 0


def test_a_stream_is_in_one_engine_at_a_time(pair, engine):
    stream = Stream(*pair, **SIZES)
    request = engine.submit("Once", stream=stream, eos=[])
    until(lambda: stream.said > 3)
    with Engine(*pair, slots=1, **SIZES) as other:
        for call in (lambda: other.submit("x", stream=stream), lambda: stream.generate("x"),
                     lambda: stream.chat("x"), lambda: stream.say("user", "x")):  # fmt: skip
            with pytest.raises(ValueError, match="in an engine already"):
                call()
        assert next(request)
        request.cancel()
        text = request.text()
        assert request.finish_reason == "cancelled", text
        assert other.submit("and", stream=stream, max_new_tokens=4, eos=[]).text()
    assert "".join(stream.generate("", max_new_tokens=4, eos=[]))


def test_a_callback_that_exits_ends_its_stream_alone(pair, engine):
    def leave(piece):
        raise SystemExit(3)

    neighbour = engine.submit("Once", max_new_tokens=30, eos=[])
    request = engine.submit("x", max_new_tokens=9, eos=[], on_piece=leave)
    with pytest.raises(RuntimeError, match=r"on_piece raised SystemExit\(3\)"):
        request.text()
    assert neighbour.text() == "".join(alone(pair, "Once", max_new_tokens=30, eos=[]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_is_told_that_the_thread_is_elsewhere(pair):
    with Engine(*pair, slots=1, **SIZES) as engine:
        child = os.fork()
        if not child:
            code = 1
            try:
                engine.submit("x", max_new_tokens=1)
            except RuntimeError as error:
                engine.close()  # returns
                code = 0 if "forked" in str(error) else 2
            finally:
                os._exit(code)
        end = time.monotonic() + 20
        while (waited := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
            time.sleep(0.01)
        if waited[0] == 0:
            os.kill(child, signal.SIGKILL)
        assert waited == (child, 0)
        assert engine.submit("x", max_new_tokens=9).text()


def test_a_slow_reader_stalls_only_itself(pair, engine):
    slow = engine.submit("Once", temperature=1.0, seed=1, ahead=5, eos=[])
    fast = engine.submit("Once", temperature=1.0, seed=1, max_new_tokens=80, eos=[])
    wanted = alone(pair, "Once", temperature=1.0, seed=1, max_new_tokens=80, eos=[])
    assert list(fast) == wanted
    until(lambda: slow.generated == 5)
    time.sleep(0.05)
    assert slow.generated == 5
    assert [next(slow) for _ in range(80)] == wanted
    slow.cancel()
    list(slow)
    assert slow.finish_reason == "cancelled"


def test_cancelling_running_and_queued_streams(engine):
    requests = [engine.submit("x", seed=n, temperature=1.0, eos=[]) for n in range(5)]
    until(lambda: (engine.running, engine.queued) == (3, 2))
    for request in requests[:2] + requests[3:4]:
        request.cancel()
    until(lambda: (engine.running, engine.queued) == (2, 0))
    assert [request.has_ended for request in requests] == [True, True, False, True, False]
    assert requests[3].text() == ""
    assert next(requests[4]) is not None


def test_a_request_that_is_dropped_is_cancelled(engine):
    request = engine.submit("x", eos=[])
    next(request)
    del request
    gc.collect()
    until(lambda: engine.running == 0)


def test_an_error_in_one_stream_ends_it_alone(pair, engine):
    def fails(*_: object):
        raise ZeroDivisionError("on purpose")

    seen = []
    failing = [
        engine.submit("x", max_new_tokens=10, on_piece=fails),
        engine.submit("x", max_new_tokens=10, logits_processor=fails),
        engine.submit(
            "x", max_new_tokens=10, logit_bias={n: -float("inf") for n in range(pair[1].vocab_size)}
        ),
    ]
    fine = engine.submit("x", max_new_tokens=40, on_piece=seen.append)
    for request in failing[:2]:
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            request.text()
        assert request.finish_reason is None
        assert request.text() == ""  # once
    with pytest.raises(ValueError, match="every token is forbidden"):
        failing[2].text()
    assert fine.text() == ""
    assert seen == alone(pair, "x", max_new_tokens=40)


def test_an_error_of_the_forward_ends_those_it_was_for(pair, engine):
    model = pair[0]
    request = engine.submit("x", eos=[])
    next(request)

    def hook(*_: object):
        handle.remove()
        raise torch.OutOfMemoryError("on purpose")

    handle = model.layers[1].register_forward_hook(hook)
    with pytest.raises(torch.OutOfMemoryError):
        request.text()
    assert engine.submit("x", max_new_tokens=9).text() == "".join(alone(pair, "x", max_new_tokens=9))


def test_a_detached_stream_is_saved_and_goes_on_in_an_engine(pair, engine, tmp_path):
    options = {"temperature": 1.0, "seed": 7, "eos": []}
    wanted = "".join(alone(pair, TEXTS[3], max_new_tokens=150, **options))
    for count in (1, 30, 70):
        request = engine.submit(TEXTS[3], ahead=count, **options)
        until(lambda count=count, request=request: request.generated == count)
        stream = request.detach()
        text = request.text()
        assert request.finish_reason is None
        with pytest.raises(RuntimeError, match="has ended"):
            request.detach()
        assert stream.cache.nbytes == Stream(*pair, **SIZES).cache.nbytes
        stream.save(tmp_path / "session")
        loaded = Stream.load(tmp_path / "session", *pair)
        forked = "".join(stream.fork().generate("", max_new_tokens=9, **options))
        assert (text + forked) == wanted[: len(text + forked)]
        again = engine.submit("", stream=loaded, max_new_tokens=40, **options)
        with pytest.raises(ValueError, match="in an engine already"):
            engine.submit("", stream=loaded)
        text += again.text()
        text += "".join(loaded.generate("", max_new_tokens=110 - count, **options))  # by itself
        assert text == wanted
        stream = engine.submit("", stream=stream, max_new_tokens=5, **options)
        assert wanted.startswith(
            "".join(alone(pair, TEXTS[3], max_new_tokens=count, **options)) + stream.text()
        )


def test_a_stream_that_waits_for_a_slot_is_detached(pair, engine, tmp_path):
    running = [engine.submit("x", eos=[], ahead=1) for _ in range(3)]
    stream = engine.submit("Once upon", max_new_tokens=20).detach()
    stream.save(tmp_path / "session")
    for request in running:
        request.cancel()
    wanted = "".join(alone(pair, "Once upon", max_new_tokens=20))
    loaded = Stream.load(tmp_path / "session", *pair)
    assert engine.submit("", stream=loaded, max_new_tokens=20).text() == wanted
    assert "".join(stream.generate("", max_new_tokens=20)) == wanted


def test_chat(pair, engine):
    def talk(answer):
        return [
            answer([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]),
            answer("And then?"),
        ]

    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 2}
    own, given = Stream(*pair, **SIZES), Stream(*pair, evict="turn", **SIZES)
    other = Stream(*pair, evict="turn", **SIZES)
    wanted = talk(lambda text: "".join(own.chat(text, **options)))
    assert engine.chat("Hello", **options).text() == "".join(Stream(*pair, **SIZES).chat("Hello", **options))
    stream = Stream(*pair, **SIZES)
    assert talk(lambda text: engine.chat(text, stream=stream, **options).text()) == wanted
    by_turn = talk(lambda text: "".join(other.chat(text, **options)))
    assert talk(lambda text: engine.chat(text, stream=given, **options).text()) == by_turn
    assert [turn.text for turn in given.turns] == [turn.text for turn in other.turns]


def test_asyncio(pair, engine):
    options = {"max_new_tokens": 30, "temperature": 1.0}

    async def read(number: int) -> str:
        pieces = [p async for p in engine.submit(TEXTS[number % 6], seed=number, ahead=2, **options)]
        return "".join(pieces)

    async def read_all() -> list[str]:
        endless = engine.submit("x", eos=[], ahead=1)
        await endless.__anext__()
        return await asyncio.gather(*(read(number) for number in range(8)))

    wanted = ["".join(alone(pair, TEXTS[n % 6], seed=n, **options)) for n in range(8)]
    assert asyncio.run(read_all()) == wanted

    async def give_up() -> None:
        blocked = [engine.submit("x", eos=[], ahead=1) for _ in range(3)]
        waiting = engine.submit("x", eos=[])
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(waiting.__anext__(), 0.05)
        for request in blocked:
            request.cancel()
        assert await waiting.__anext__() is not None

    asyncio.run(give_up())


def test_threads(pair, engine):
    options = {"max_new_tokens": 25, "temperature": 1.0}
    wanted = {n: "".join(alone(pair, TEXTS[n % 6], seed=n, **options)) for n in range(12)}
    got = {}

    def work(number: int) -> None:
        got[number] = engine.submit(TEXTS[number % 6], seed=number, **options).text()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == wanted


def test_a_closed_engine(pair):
    engine = Engine(*pair, slots=2, **SIZES)
    requests = [engine.submit("x", eos=[]) for _ in range(3)]
    next(requests[0])
    engine.close()
    engine.close()
    for request in requests:
        request.text()
        assert request.finish_reason == "cancelled"
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit("x")
    with pytest.raises(RuntimeError, match="closed"):
        requests[0].detach()


def test_an_engine_that_is_dropped_ends_its_thread(pair):
    engine = Engine(*pair, slots=2, **SIZES)
    engine.submit("x", max_new_tokens=2).text()
    del engine
    gc.collect()
    until(lambda: not any(thread.name == "streamllm engine" for thread in threading.enumerate()))


PROGRAM = """
import streamllm
engine = streamllm.Engine(*streamllm.load(device="cpu"), slots=2, window=60)
requests = [engine.submit("def ", eos=[], seed=n, temperature=1.0) for n in range(3)]
print("running", flush=True)
for piece in requests[0]:
    pass
"""


def test_ctrl_c_ends_a_program(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.stdout.readline() == "running\n"
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=120)
    assert child.returncode in (-signal.SIGINT, 130)
    assert errors.strip().endswith("KeyboardInterrupt")
