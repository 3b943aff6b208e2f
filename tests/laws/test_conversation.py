"""The law of a conversation: whatever is evicted, dropped, undone, cut off or forked, the logits equal the definition.

A stream in float64 talks, beside a plain list that is fed token by token and closes up.
"""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import streamllm
from streamllm import Stream
from tests.laws.evicting import EvictingStream
from tests.laws.families import CONFIGS, tiny_model
from tests.laws.scenarios import TOLERANCE, error
from tests.unit.conftest import write_chat_tokenizer

SINKS, WINDOW = 4, 70


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_chat_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> streamllm.Tokenizer:
    return streamllm.load_tokenizer(folder)


class Plain:
    """The definition: a list of entries, the number of each one's token, and the turns' starts."""

    def __init__(self, model: torch.nn.Module, by_turn: bool) -> None:
        self.entries, self.by_turn = EvictingStream(model, SINKS, WINDOW), by_turn
        self.size = SINKS + max(self.entries.windows)
        self.numbers: list[int] = []
        self.logits = torch.zeros(0)
        self.last = 0

    def copy(self) -> Plain:
        other = copy.copy(self)
        other.entries, other.numbers = copy.copy(self.entries), list(self.numbers)
        other.entries.cached = [list(entries) for entries in self.entries.cached]
        other.entries.before = [[list(entries) for entries in lists] for lists in self.entries.before]
        return other

    def feed(self, tokens: list[int], number: int, starts: list[int]) -> None:
        for token in tokens:
            if self.by_turn and len(self.numbers) == self.size:
                later = [start for start in starts if self.numbers[SINKS] < start <= self.numbers[-1]]
                if later:
                    self.evict(sum(old < min(later) for old in self.numbers[SINKS:]))
            self.logits = torch.from_numpy(self.entries.step(token))
            self.numbers.append(number)
            if len(self.numbers) > self.size:
                del self.numbers[SINKS]
            self.last, number = token, number + 1

    def evict(self, count: int) -> None:
        self.entries.evict_range(SINKS, SINKS + count)
        del self.numbers[SINKS : SINKS + count]

    def drop(self, start: int, stop: int) -> None:
        """The newest token is fed again, because it has read what leaves."""
        self.entries.rewind(1)
        number = self.numbers.pop()
        ranks = [rank for rank, old in enumerate(self.numbers) if rank >= SINKS and start <= old < stop]
        if ranks:
            self.entries.evict_range(ranks[0], ranks[-1] + 1)
            del self.numbers[ranks[0] : ranks[-1] + 1]
        self.logits = torch.from_numpy(self.entries.step(self.last))
        self.numbers.append(number)


class Talk:
    """A stream, the plain list beside it, and the tokens that the stream was given."""

    def __init__(self, stream: Stream, plain: Plain) -> None:
        self.stream, self.plain = stream, plain

    def copy(self, stream: Stream) -> Talk:
        """Another stream in the state of this one, with a list of its own."""
        return Talk(stream, self.plain.copy())

    def chat(self, text: str, length: int, **options: object) -> None:
        log, loop = [], self.stream._loop
        push = type(loop).push

        def noted(tokens, on_device=None):
            log.extend(tokens)
            push(loop, tokens, on_device)

        loop.push = noted
        list(self.stream.chat(text, max_new_tokens=length, eos=(), **options))
        self.stream._settle()
        loop.push_drawn()
        self.stream._feed()
        del loop.push
        self.plain.feed(log, loop.end - len(log), [turn.start for turn in self.stream.turns])

    def drop(self, turn: int) -> None:
        chosen = self.stream.turns[turn]
        assert chosen.stop < self.stream._end
        self.stream.drop(turn)
        self.plain.drop(chosen.start, chosen.stop)

    @property
    def error(self) -> float:
        self.stream._feed()
        logits = self.stream._loop.logits
        assert logits is not None
        return error(logits, self.plain.logits)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("evict", ["token", "turn"])
def test_a_conversation_equals_the_definition(name: str, evict: str, tokenizer) -> None:
    model = tiny_model(name, vocab_size=tokenizer.vocab_size)
    draw = random.Random(name + evict)
    talk = Talk(Stream(model, tokenizer, SINKS, WINDOW, chunk=9, evict=evict), Plain(model, evict == "turn"))
    worst = 0.0
    talk.chat("Hello", 5)
    for number in range(6):
        kind = draw.choice(["chat", "drop", "undo", "fork"])
        if kind == "drop":
            talk.drop(draw.randrange(len(talk.stream.turns) - 1))
        elif kind == "undo":
            before = talk.copy(talk.stream)
            talk.chat("never mind", draw.choice([2, 40]))
            talk.stream.undo()
            talk = before.copy(talk.stream)
        elif kind == "fork":
            other = talk.copy(talk.stream.fork())
            talk.chat("on the other way", 3)
            worst = max(worst, talk.error)
            talk = other
        worst = max(worst, talk.error)
        talk.chat(f"more {number}", draw.choice([1, 9]))
        worst = max(worst, talk.error)
    assert worst <= TOLERANCE


SETTINGS = {"greedy": {}, "sampled": {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.1}}
KINDS = {
    "modules": (None, None),
    "flat": ("flat", None),
    "int8": (None, "int8"),
    "flat, int8": ("flat", "int8"),
}
GOES_ON = """
import json, sys
from pathlib import Path
from tests.laws.test_conversation import goes_on_from
print(json.dumps({path.name: goes_on_from(path, sys.argv[1]) for path in Path(sys.argv[2]).iterdir()}))
"""


def model_of(name: str, kind: str, vocab_size: int) -> torch.nn.Module:
    plain = tiny_model(name, vocab_size=vocab_size)
    backend = KINDS[kind][0]
    return plain if backend is None else streamllm.compile(plain, backend)


def goes_on(stream: Stream) -> dict[str, str]:
    """What streams from here say, by settings."""
    return {
        name: "".join(other.generate("", max_new_tokens=5, **settings))
        + "".join(other.chat("and then?", max_new_tokens=6, **settings))
        for (name, settings), other in ((pair, stream.fork()) for pair in SETTINGS.items())
    }


def goes_on_from(path: Path, tokenizer_folder: str) -> dict[str, str]:
    tokenizer = streamllm.load_tokenizer(tokenizer_folder)
    name, kind = path.name.split("; ")
    return goes_on(Stream.load(path, model_of(name, kind, tokenizer.vocab_size), tokenizer))


def test_another_process_goes_on_as_if_not_stopped(tokenizer, folder: Path, tmp_path: Path) -> None:
    wanted = {}
    for number, name in enumerate(CONFIGS):
        for kind in list(KINDS)[number % 2 :: 2]:
            model = model_of(name, kind, tokenizer.vocab_size)
            stream = Stream(model, tokenizer, SINKS, 40, quantize=KINDS[kind][1], evict="turn")
            for text in ("one", "two"):
                list(stream.chat(text, max_new_tokens=9))
            stream.drop(1)
            path = tmp_path / f"{name}; {kind}"
            stream.save(path)
            wanted[path.name] = goes_on(stream)
    done = subprocess.run(
        [sys.executable, "-c", GOES_ON, str(folder), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == wanted
    assert len(wanted) == 2 * len(CONFIGS)
