"""What a stream remembers: facts told some distance ago, asked for later.

StreamEval is built as section 4.4 of Xiao et al. (arXiv 2309.17453) describes it: numbered facts, one per
line, and every 10 lines a question whose answer was told 20 lines before, or further. A passkey test hides
one fact in filler. What has left the window is gone: sinks keep a stream fluent, they remember nothing of it.
A score that stayed up past the window would be a fault.

Answers are scored without generating: if each of an answer's tokens is the likeliest after the ones before
it, then greedy decoding says the answer, and the other way round. So one pass in exact chunks scores a whole
stream, and the right answers stand in the text that follows. Pieces of text are made into tokens apart from
each other, so that an answer consists of the same tokens where it is told and where it is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamllm.evaluate.scoring import new_cache, predictions
from streamllm.evaluate.texts import beginning
from streamllm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Wording:
    """How facts are told and asked for. {key} and {answer} are filled in; a question ends with its answer."""

    fact: str
    question: str
    filler: str  # {a} … {d} are words


WORDINGS = {
    "lines": Wording(
        fact="line {key}: the register holds <{answer}>\n",
        question="What does the register hold in line {key}? line {key}: the register holds <{answer}>\n",
        filler="The {a} {b} stands behind the {c} {d}.\n",
    ),
    "code": Wording(  # the question is the fact's own line again: the most that a very small model can do
        fact="    self.{key} = {answer}\n",
        question="    self.{key} = {answer}\n",
        filler="    self.{a}_{b} = {c}_{d}\n",
    ),
}

_WORDS = """
amber azure bitter brave bright calm clever cold copper crimson curious distant early eager empty
faint gentle golden happy hidden hollow idle ivory jolly keen late little lonely loud lucky mellow
misty narrow noble old patient plain proud quick quiet

anchor apple arrow badge barrel basket beacon bell bottle bridge button cabin candle castle circle
cloud corner crown desert dragon engine feather field forest garden hammer harbor island jacket
kettle ladder lantern marble meadow mirror needle orchard paper pebble river
"""
_FIRST, _SECOND = (half.split() for half in _WORDS.split("\n\n"))


@dataclass(frozen=True, eq=False)
class Script:
    """A stream with answers in it: token ids [N], where each answer stands, how long ago it was told."""

    tokens: Tensor
    answers: tuple[tuple[int, int], ...]  # first token, and behind the last
    distances: tuple[int, ...]  # tokens between an answer's first token and the same where it was told


@dataclass(frozen=True)
class Recall:
    """Answers at one distance."""

    distance: float  # tokens back, the mean
    lines: int | None  # lines back (StreamEval)
    questions: int
    correct: int  # answers that greedy decoding gives in full
    nll: float  # nats, summed over the answers' tokens
    tokens: int
    tokens_correct: int  # those of them that are the likeliest after what stands before

    @property
    def accuracy(self) -> float:
        return self.correct / self.questions

    @property
    def token_accuracy(self) -> float:
        return self.tokens_correct / self.tokens

    @property
    def mean(self) -> float:
        """Nats per token of the answers: falls where a fact is remembered, even if not well enough."""
        return self.nll / self.tokens


def stream_eval_script(
    tokenizer: Tokenizer,
    *,
    lines: int = 500,
    every: int = 10,
    back: int = 20,
    digits: int = 5,
    wording: str = "lines",
    seed: int = 0,
) -> Script:
    """A stream of `lines` facts, and behind every `every`-th a question for what stood `back` lines before.

    Raises ValueError for an unknown wording, and for more lines than there are names (1,600).
    """
    said, rng, pieces = _wording(wording), random.Random(seed), _Pieces(tokenizer)
    if not 1 <= lines <= len(_FIRST) * len(_SECOND):
        raise ValueError(f"lines must be in 1 … {len(_FIRST) * len(_SECOND)}, not {lines}")
    if every < 1 or not 1 <= back < lines:
        raise ValueError(f"every must be at least 1 and back in 1 … {lines - 1}, not {every} and {back}")
    keys = [f"{first}_{second}" for first in _FIRST for second in _SECOND]
    rng.shuffle(keys)
    facts: list[tuple[str, str, int]] = []
    answers, distances = [], []
    for line, key in enumerate(keys[:lines]):
        answer = _number(rng, digits)
        told, _ = pieces.fill(said.fact, key, answer)
        facts.append((key, answer, told))
        if line % every == every - 1 and line >= back:
            key, answer, told = facts[line - back]
            begin, end = pieces.fill(said.question, key, answer)
            answers.append((begin, end))
            distances.append(begin - told)
    if not answers:
        raise ValueError(f"{lines} lines have no question {back} lines back every {every} lines: give more")
    return Script(torch.tensor(pieces.ids), tuple(answers), tuple(distances))


def passkey_script(
    tokenizer: Tokenizer,
    *,
    distance: int,
    lead: int = 32,
    digits: int = 5,
    wording: str = "lines",
    seed: int = 0,
) -> Script:
    """Filler, a fact, filler, and the question, its answer exactly `distance` tokens behind the fact's.

    At least `lead` tokens of filler come first, so that the fact is no sink.

    Raises ValueError for an unknown wording, and for a distance too short for fact and question.
    """
    said, rng, pieces = _wording(wording), random.Random(seed), _Pieces(tokenizer)

    first, second, answer = rng.choice(_FIRST), rng.choice(_SECOND), _number(rng, digits)
    key, others = f"{first}_{second}", [word for word in _FIRST if word != first]  # nobody else has that key

    def filler() -> list[int]:
        words = {"a": others, "b": _SECOND, "c": others, "d": _SECOND}
        return pieces.encode(said.filler.format(**{name: rng.choice(some) for name, some in words.items()}))

    while len(pieces.ids) < lead:
        pieces.ids += filler()
    told, _ = pieces.fill(said.fact, key, answer)
    room = told + distance - len(pieces.ids) - len(pieces.parts(said.question, key, answer)[0])
    if room < 0:
        raise ValueError(
            f"a distance of {distance} is too short for fact and question: give {distance - room}"
        )
    between: list[int] = []
    while len(between) < room:
        between += filler()
    pieces.ids += between[len(between) - room :]  # cut where it is least strange: behind the fact
    begin, end = pieces.fill(said.question, key, answer)
    assert begin - told == distance
    return Script(torch.tensor(pieces.ids), ((begin, end),), (distance,))


def stream_eval(
    model: nn.Module,
    tokenizer: Tokenizer,
    *,
    back: Sequence[int] | None = None,
    lines: int = 500,
    every: int = 10,
    digits: int = 5,
    wording: str = "lines",
    seed: int = 0,
    mode: str = "sinks",
    sinks: int = 4,
    window: int | None = None,
    chunk: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Recall, ...]:
    """StreamEval with the answer `back` lines before the question: one stream, and one Recall, for each.

    back=None: from a quarter of the window to twice the window, in lines; the paper's own is (20,).
    `mode`, `sinks`, `window` and `chunk` as for `perplexity` (not "recompute"). `progress` is called with
    (done, total) streams. Raises ValueError as `stream_eval_script` does.
    """
    if back is None:
        held = new_cache(model, mode, sinks, window, chunk).window
        some = min(lines, 100)
        line = (
            len(
                stream_eval_script(
                    tokenizer, lines=some, every=min(every, some), back=1, digits=digits, wording=wording
                ).tokens
            )
            / some
        )
        swept = (round(held * part / 8 / line) for part in (2, 4, 6, 8, 12, 16))
        back = sorted({distance for distance in swept if 1 <= distance < lines})
    scores = []
    for done, distance in enumerate(back):
        script = stream_eval_script(
            tokenizer, lines=lines, every=every, back=distance, digits=digits, wording=wording, seed=seed
        )
        scores.append(_score(model, [script], mode, sinks, window, chunk, distance))
        if progress is not None:
            progress(done + 1, len(back))
    return tuple(scores)


def passkey(
    model: nn.Module,
    tokenizer: Tokenizer,
    *,
    distances: Sequence[int] | None = None,
    samples: int = 20,
    lead: int = 32,
    digits: int = 5,
    wording: str = "lines",
    seed: int = 0,
    mode: str = "sinks",
    sinks: int = 4,
    window: int | None = None,
    chunk: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Recall, ...]:
    """One hidden fact, asked for `distances` tokens later: `samples` streams, and one Recall, for each.

    distances=None: from a quarter of the window, or as near as the words allow, to twice the window. Else
    as `stream_eval`.
    """
    if distances is None:
        held = new_cache(model, mode, sinks, window, chunk).window
        shortest = _shortest_passkey(tokenizer, wording, digits)
        eighths = (held * part // 8 for part in (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16))
        distances = [distance for distance in eighths if distance >= shortest]
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    scores = []
    for done, distance in enumerate(distances):
        scripts = [
            passkey_script(
                tokenizer, distance=distance, lead=lead, digits=digits, wording=wording, seed=seed + sample
            )
            for sample in range(samples)
        ]
        scores.append(_score(model, scripts, mode, sinks, window, chunk, None))
        if progress is not None:
            progress(done + 1, len(distances))
    return tuple(scores)


def _shortest_passkey(tokenizer: Tokenizer, wording: str, digits: int) -> int:
    """A distance at which every fact and question find room."""
    said, pieces = _wording(wording), _Pieces(tokenizer)
    longest = 0
    for key in (f"{first}_{second}" for first in _FIRST for second in _SECOND):
        asked, told = (pieces.parts(text, key, "8") for text in (said.question, said.fact))
        longest = max(longest, len(asked[0]) + len(told[2]))
    return longest + 2 * digits + 2  # the answer's own tokens are fewer


def _score(
    model: nn.Module,
    scripts: Sequence[Script],
    mode: str,
    sinks: int,
    window: int | None,
    chunk: int,
    lines: int | None,
) -> Recall:
    if mode not in ("sinks", "window", "dense"):
        raise ValueError(f"mode must be sinks, window or dense, not {mode!r}")
    correct, nll, tokens, tokens_correct, distances = 0, 0.0, 0, 0, 0
    for script in scripts:
        keys = len(script.tokens) if mode == "dense" else window
        cache = new_cache(model, mode, sinks if mode == "sinks" else 0, keys, chunk)
        lost, hit = [], []
        for _, logits, targets in predictions(model, script.tokens, cache, chunk):
            lost.append(F.cross_entropy(logits.float(), targets, reduction="none").cpu().double())
            hit.append((logits.argmax(-1) == targets).cpu())
        nats, hits = torch.cat(lost), torch.cat(hit)  # [N - 1], of the tokens 1 … N-1
        for start, stop in script.answers:
            said = hits[start - 1 : stop - 1]
            correct += bool(said.all())
            tokens_correct += int(said.sum())
            nll += float(nats[start - 1 : stop - 1].sum())
            tokens += stop - start
        distances += sum(script.distances)
    questions = sum(len(script.answers) for script in scripts)
    return Recall(distances / questions, lines, questions, correct, nll, tokens, tokens_correct)


class _Pieces:
    """A stream of token ids that grows piece by piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.ids = beginning(tokenizer)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    def parts(self, template: str, key: str, answer: str) -> tuple[list[int], list[int], list[int]]:
        """What stands before the answer, the answer, and what stands behind it."""
        before, _, behind = template.replace("{key}", key).partition("{answer}")
        if before.endswith(" "):  # a blank is part of the token behind it in almost every vocabulary
            before, answer = before[:-1], f" {answer}"
        return self.encode(before), self.encode(answer), self.encode(behind)

    def fill(self, template: str, key: str, answer: str) -> tuple[int, int]:
        """Add a template; returns where its answer begins and ends."""
        before, middle, behind = self.parts(template, key, answer)
        begin = len(self.ids) + len(before)
        self.ids += [*before, *middle, *behind]
        return begin, begin + len(middle)


def _number(rng: random.Random, digits: int) -> str:
    if digits < 1:
        raise ValueError(f"digits must be at least 1, not {digits}")
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _wording(name: str) -> Wording:
    if name not in WORDINGS:
        raise ValueError(f"wording must be one of {', '.join(WORDINGS)}, not {name!r}")
    return WORDINGS[name]
