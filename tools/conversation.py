"""A long scripted conversation: is each token fed once, is memory flat, and is the last turn as fast as the first?

    python tools/conversation.py                            # the embedded checkpoint: 500 turns, 200,000 tokens
    python tools/conversation.py --model FOLDER --turns 60 --window 1020 --answer 64      # a chat model

A turn is a user's message and an answer. The embedded checkpoint has no chat template, so a small one is written for
it here, and the messages are pieces of Python source that it was not trained on. For each turn, the time from the call
of `chat` to the first piece of the answer is measured, beside two others that get the same tokens:

* re-feeding: one forward of the same model over the tokens that the window holds, without a cache;
* transformers, which keeps its cache and evicts nothing, in a process of its own (--no-transformers leaves it out). Its
  time depends on how many keys the cache has, not on their values: they are random numbers, as many as the conversation
  has tokens.

A time in the table is the median of the turn and of two turns before and after it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from array import array
from collections.abc import Iterator
from itertools import count, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import streamllm
import streamllm.weights.embedded
from streamllm.evaluate.corpus import held_out_texts
from streamllm.status import resident_bytes

TEMPLATE = (
    "{% for message in messages %}# {{ message.role }}\n{{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant\n{% endif %}"
)
SYSTEM = "Answer in a few short sentences."
QUESTIONS = (
    "What is a river?", "Name three animals that live in the sea.", "Why is the sky blue?",
    "Tell me a very short story about a fox.", "What should I cook with eggs and rice?",
    "How does a bicycle stay upright?", "Write a sentence with the word 'window'.", "What is the capital of {}?",
    "Explain what {} is to a child.", "And why is that so?", "Say the same in fewer words.", "What did I ask before?",
)  # fmt: skip
SUBJECTS = ("France", "Japan", "gravity", "Kenya", "a prime number", "Peru", "the moon", "Norway", "bread")
AROUND = 2  # turns before and after, whose times are in the median


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder; default: the embedded checkpoint")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--turns", type=int, default=500)
    parser.add_argument("--message", type=int, default=100, help="tokens of a message, of the embedded model")
    parser.add_argument("--answer", type=int, default=300, help="the longest answer, in tokens")
    parser.add_argument("--window", type=int, help="default: what the model was trained for, at most 4,092")
    parser.add_argument("--evict", choices=("turn", "token"), default="turn")
    parser.add_argument("--backend", choices=("flat", "inductor"), help="compile the step of one token")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--show", type=int, default=3, help="print this many of the last turns")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer = streamllm.load(given.model, dtype=given.dtype, device="cpu")
    if given.model is None:
        tokenizer.chat_template = TEMPLATE
    talk = Conversation(given, model, tokenizer)
    talk.run()
    talk.report()


class Conversation:
    """A stream, the tokens that its model was given, and the times of each turn."""

    def __init__(self, given: argparse.Namespace, model: torch.nn.Module, tokenizer: Any) -> None:
        self.given, self.plain = given, model
        stepped = streamllm.compile(model, given.backend) if given.backend else model
        self.stream = streamllm.Stream(
            stepped, tokenizer, sinks="system", window=given.window, evict=given.evict
        )
        self.fed, self.pushed = array("q"), array("q")  # which take less memory than lists
        stepped.register_forward_pre_hook(self._count)
        self.seconds: dict[str, list[float | None]] = {"stream": [], "re-feeding": [], "transformers": []}
        self.resident: list[int] = []
        self.tokens: list[int] = []  # of the conversation, after each turn
        self.peer = None if given.no_transformers else Peer(given.model, given.dtype, given.threads)
        last = given.turns
        self.shown = sorted({5, *(last * part // 5 for part in range(1, 5)), last})

    def _count(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if len(arguments) > 1:  # with a cache: not what is read again to measure it
            self.fed.extend(arguments[0][0].tolist())

    def run(self) -> None:
        stream, given = self.stream, self.given
        stream.say("system", SYSTEM)
        self._record_pushes()
        messages = sources(stream.tokenizer, given.message) if given.model is None else questions()
        for turn, message in enumerate(islice(messages, given.turns), 1):
            before, started = len(self.pushed), time.perf_counter()
            pieces = stream.chat(
                message, max_new_tokens=given.answer, temperature=given.temperature, seed=turn,
                **({"eos": ()} if given.model is None else {}),
            )  # fmt: skip
            asked = len(self.pushed)
            next(pieces)
            self.seconds["stream"].append(time.perf_counter() - started)
            if turn % 20 == 0:
                print(f"turn {turn}: {len(self.pushed):,} tokens", flush=True)
            near = any(abs(turn - shown) <= AROUND for shown in self.shown)
            self.seconds["re-feeding"].append(self._read_again() if near else None)
            for _ in pieces:
                pass
            peer = self.peer if near else None
            took = None if peer is None else peer.turn(before, list(self.pushed[before:asked]))
            self.seconds["transformers"].append(took)
            self.resident.append(resident_bytes() or 0)
            self.tokens.append(len(self.pushed))

    def _record_pushes(self) -> None:
        """Note the tokens of the stream: those that are there, and each one that is pushed from now on."""
        # `sinks="system"` makes a new cache, and a loop with it, when it reads the system prompt.
        loop = self.stream._loop
        push = loop.push
        self.pushed.extend(loop.last_tokens(loop.end))

        def noted(tokens: Any, on_device: Any = None) -> None:
            self.pushed.extend(tokens)
            push(tokens, on_device)

        loop.push = noted  # type: ignore[method-assign]

    def _read_again(self) -> float:
        """Seconds to read what the window holds, without a cache."""
        cache = self.stream.cache
        tokens = torch.tensor([list(self.pushed[-cache.sinks - cache.window :])])
        started = time.perf_counter()
        with torch.inference_mode():
            self.plain(tokens)
        return time.perf_counter() - started

    def report(self) -> None:
        stream = self.stream
        for turn in stream.turns[len(stream.turns) - 2 * self.given.show :]:
            print(f"{turn.role}: {' '.join(turn.text.split())[:300]}")
        waiting = len(stream._loop.unfed)
        assert self.fed == self.pushed[: len(self.pushed) - waiting], "a token was not fed, or fed twice"
        print(
            f"\n{len(self.seconds['stream'])} turns, {len(self.pushed):,} tokens: each was fed once, in order. "
            f"{stream!r}\n"
        )
        print("| turn | tokens | first token, ms | re-feeding, ms | transformers, ms | resident, MB |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: |")
        for shown in self.shown:
            cells = [self._median(name, shown) for name in self.seconds]
            texts = ["" if cell is None else f"{cell * 1e3:.1f}" for cell in cells]
            print(
                f"| {shown} | {self.tokens[shown - 1]:,} | {' | '.join(texts)} | "
                f"{self.resident[shown - 1] / 1e6:.1f} |"
            )
        for name in self.seconds:
            first, last = self._median(name, self.shown[0]), self._median(name, self.shown[-1])
            if first is not None and last is not None:
                print(f"{name}: turn {self.shown[-1]} takes {last / first:.2f} times as long as turn 5")
        if self.peer is not None:
            print(f"transformers: {self.peer.resident / 1e6:.0f} MB resident at the end")
            self.peer.end()

    def _median(self, name: str, turn: int) -> float | None:
        near = self.seconds[name][max(0, turn - 1 - AROUND) : turn + AROUND]
        known = [seconds for seconds in near if seconds is not None]
        return statistics.median(known) if known else None


def sources(tokenizer: Any, length: int) -> Iterator[str]:
    """Pieces of Python source, each of this many tokens."""
    ids = tokenizer.encode_piece("\n".join(held_out_texts()), bos=False)
    for number in count():
        start = number * length % (len(ids) - length)
        yield tokenizer.decode(ids[start : start + length])


def questions() -> Iterator[str]:
    for number in count():
        yield QUESTIONS[number % len(QUESTIONS)].format(SUBJECTS[number % len(SUBJECTS)])


class Peer:
    """transformers in a process of its own, with the cache that its generate keeps from one turn to the next."""

    def __init__(self, folder: str | None, dtype: str, threads: int) -> None:
        path = folder or str(Path(streamllm.weights.embedded.__file__).parent)
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_peer, args=(theirs, path, dtype, threads), daemon=True)
        self._process.start()
        self.resident = 0

    def turn(self, before: int, message: list[int]) -> float:
        """Seconds from a message to the first token, in a conversation that had this many tokens before."""
        self._pipe.send((before, message))
        seconds, self.resident = self._pipe.recv()
        return float(seconds)

    def end(self) -> None:
        self._pipe.send(None)
        self._process.join()


@torch.inference_mode()
def _peer(pipe: Connection, folder: str, dtype: str, threads: int) -> None:
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    config = model.config
    while (turn := pipe.recv()) is not None:
        before, message = turn
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            keys = torch.randn(1, config.num_key_value_heads, before, config.head_dim, dtype=model.dtype)
            cache.update(keys, keys.clone(), layer)
        started = time.perf_counter()
        out = model(torch.tensor([message]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        out.logits[0, -1].argmax().item()
        pipe.send((time.perf_counter() - started, resident_bytes() or 0))


if __name__ == "__main__":
    main()
