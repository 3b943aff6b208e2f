"""Which facts a stream recalls, by distance: a fact is stated, and a question asks for it later.

StreamEval is built as section 4.4 of Xiao et al. (arXiv 2309.17453) describes it: facts, one per line, and
every 10 lines a question about the fact 20 lines before. A passkey test hides one fact in filler. A fact that
has left the window cannot be recalled: sinks keep a stream fluent, but they store nothing of it. A score that
stayed high beyond the window would be a fault.

Answers are scored without generating. Greedy decoding gives an answer exactly if each of its tokens is the
most likely one after those before it. So the text contains the right answers, and one pass in exact chunks
scores a whole stream. Pieces of text are tokenized separately, so that an answer has the same tokens in the
fact and in the question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamllm.evaluate.predictions import new_cache, nll_of, stream_logits
from streamllm.evaluate.texts import beginning
from streamllm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Wording:
    """How facts are stated and asked for. {key} and {answer} are filled in; a question ends with its answer."""

    fact: str
    question: str
    filler: str  # {a} … {d} are words


WORDINGS = {
    "lines": Wording(
        fact="line {key}: the register holds <{answer}>\n",
        question="What does the register hold in line {key}? line {key}: the register holds <{answer}>\n",
        filler="The {a} {b} stands behind the {c} {d}.\n",
    ),
    "code": Wording(  # the question repeats the line of the fact: a very small model can do no more
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
ADJECTIVES, NOUNS = (half.split() for half in _WORDS.split("\n\n"))


@dataclass(frozen=True, eq=False)
class Script:
    """A stream with questions and their answers."""

    tokens: Tensor  # int64 [N]
    answers: tuple[tuple[int, int], ...]  # start and stop of each answer
    distances: tuple[int, ...]  # tokens from the fact to its question, measured at the answer's first token


@dataclass(frozen=True)
class Recall:
    """The answers at one distance."""

    distance: float  # tokens back, the mean
    lines: int | None  # lines back (StreamEval)
    questions: int
    correct: int  # answers that greedy decoding gives in full
    nll: float  # nats, summed over the tokens of the answers
    tokens: int
    tokens_correct: int  # tokens of answers that are the most likely after what precedes them

    @property
    def accuracy(self) -> float:
        return self.correct / self.questions

    @property
    def token_accuracy(self) -> float:
        return self.tokens_correct / self.tokens

    @property
    def mean(self) -> float:
        """Nats per token of the answers: lower where a fact is recalled, even if not well enough to be right."""
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
    """A stream of `lines` facts, and after every `every`-th a question about the fact `back` lines before.

    Raises ValueError for an unknown wording, for more lines than there are names (1,600), and where no
    question has a fact so far back.
    """
    phrases, rng, pieces = _wording(wording), random.Random(seed), Pieces(tokenizer)
    if not 1 <= lines <= len(ADJECTIVES) * len(NOUNS):
        raise ValueError(f"lines must be in 1 … {len(ADJECTIVES) * len(NOUNS)}, not {lines}")
    if every < 1 or not 1 <= back < lines:
        raise ValueError(f"every must be at least 1 and back in 1 … {lines - 1}, not {every} and {back}")
    keys = _keys()
    rng.shuffle(keys)
    facts: list[tuple[str, str, int]] = []
    answers, distances = [], []
    for line, key in enumerate(keys[:lines]):
        answer = random_number(rng, digits)
        stated, _ = pieces.add(phrases.fact, key, answer)
        facts.append((key, answer, stated))
        if line % every == every - 1 and line >= back:
            key, answer, stated = facts[line - back]
            start, stop = pieces.add(phrases.question, key, answer)
            answers.append((start, stop))
            distances.append(start - stated)
    if not answers:
        raise ValueError(
            f"{lines} lines with a question every {every} have none about a fact {back} lines back: give more lines"
        )
    return Script(torch.tensor(pieces.ids, dtype=torch.int64, device="cpu"), tuple(answers), tuple(distances))


def passkey_script(
    tokenizer: Tokenizer,
    *,
    distance: int,
    lead: int = 32,
    digits: int = 5,
    wording: str = "lines",
    seed: int = 0,
) -> Script:
    """Filler, a fact, filler and the question; its answer starts exactly `distance` tokens after the fact's.

    At least `lead` tokens of filler come first, so that the fact is not among the sinks.

    Raises ValueError for an unknown wording, and for a distance too short for fact and question.
    """
    phrases, rng, pieces = _wording(wording), random.Random(seed), Pieces(tokenizer)

    adjective, noun, answer = rng.choice(ADJECTIVES), rng.choice(NOUNS), random_number(rng, digits)
    key = f"{adjective}_{noun}"
    others = [word for word in ADJECTIVES if word != adjective]  # so that no filler contains the key

    def filler() -> list[int]:
        words = {"a": others, "b": NOUNS, "c": others, "d": NOUNS}
        return pieces.encode(
            phrases.filler.format(**{name: rng.choice(some) for name, some in words.items()})
        )

    while len(pieces.ids) < lead:
        pieces.ids += filler()
    stated, _ = pieces.add(phrases.fact, key, answer)
    room = stated + distance - len(pieces.ids) - len(pieces.parts(phrases.question, key, answer)[0])
    if room < 0:
        raise ValueError(
            f"a distance of {distance} is too short for fact and question: give {distance - room}"
        )
    between: list[int] = []
    while len(between) < room:
        between += filler()
    pieces.ids += between[len(between) - room :]  # cut right after the fact, far from the question
    start, stop = pieces.add(phrases.question, key, answer)
    assert start - stated == distance
    return Script(torch.tensor(pieces.ids, dtype=torch.int64, device="cpu"), ((start, stop),), (distance,))


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
    """StreamEval with the fact `back` lines before the question: one stream, and one Recall, for each number.

    back=None: from a quarter of the window to twice the window, in lines; the paper has (20,).
    `mode`, `sinks`, `window` and `chunk` as for `perplexity` (not "recompute"). `progress` is called with
    (done, total) streams. Raises ValueError as `stream_eval_script` does.
    """
    if back is None:
        kept = new_cache(model, mode, sinks, window, chunk).window
        some = min(lines, 100)
        sample = stream_eval_script(
            tokenizer, lines=some, every=min(every, some), back=1, digits=digits, wording=wording
        )
        tokens_per_line = len(sample.tokens) / some
        swept = (round(kept * part / 8 / tokens_per_line) for part in (2, 4, 6, 8, 12, 16))
        back = sorted({distance for distance in swept if 1 <= distance < lines})

    def scripts(distance: int) -> list[Script]:
        return [
            stream_eval_script(
                tokenizer, lines=lines, every=every, back=distance, digits=digits, wording=wording, seed=seed
            )
        ]

    return score_distances(model, back, scripts, mode, sinks, window, chunk, progress, in_lines=True)


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
    """One hidden fact, asked for `distances` tokens later: `samples` streams, and one Recall, for each distance.

    distances=None: from a quarter of the window, or as near as the wording allows, to twice the window. The
    other arguments are as for `stream_eval`.
    """
    if distances is None:
        kept = new_cache(model, mode, sinks, window, chunk).window
        shortest = _shortest_passkey(tokenizer, wording, digits)
        eighths = (kept * part // 8 for part in (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16))
        distances = [distance for distance in eighths if distance >= shortest]
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")

    def scripts(distance: int) -> list[Script]:
        return [
            passkey_script(
                tokenizer, distance=distance, lead=lead, digits=digits, wording=wording, seed=seed + sample
            )
            for sample in range(samples)
        ]

    return score_distances(model, distances, scripts, mode, sinks, window, chunk, progress)


def _shortest_passkey(tokenizer: Tokenizer, wording: str, digits: int) -> int:
    """A distance that is long enough for every fact and question."""
    phrases, pieces = _wording(wording), Pieces(tokenizer)
    longest = 0
    for key in _keys():
        question, fact = (pieces.parts(text, key, "8") for text in (phrases.question, phrases.fact))
        longest = max(longest, len(question[0]) + len(fact[2]))
    return longest + 2 * digits + 2  # leaves room for the tokens of the answer


def score_distances(
    model: nn.Module,
    distances: Sequence[int],
    scripts: Callable[[int], list[Script]],
    mode: str,
    sinks: int,
    window: int | None,
    chunk: int,
    progress: Callable[[int, int], None] | None,
    in_lines: bool = False,
) -> tuple[Recall, ...]:
    """One Recall for each distance, from its scripts. in_lines: the distances are numbers of lines, not of tokens."""
    scores = []
    for done, distance in enumerate(distances):
        lines = distance if in_lines else None
        scores.append(score_scripts(model, scripts(distance), mode, sinks, window, chunk, lines))
        if progress is not None:
            progress(done + 1, len(distances))
    return tuple(scores)


def score_scripts(
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
        nll_of_chunks, hits_of_chunks = [], []
        for _, logits, targets in stream_logits(model, script.tokens, cache, chunk):
            nll_of_chunks.append(nll_of(logits, targets))
            hits_of_chunks.append((logits.argmax(-1) == targets).cpu())
        nats, hits = torch.cat(nll_of_chunks), torch.cat(hits_of_chunks)  # [N - 1], of the tokens 1 … N-1
        for start, stop in script.answers:
            answer_hits = hits[start - 1 : stop - 1]
            correct += bool(answer_hits.all())
            tokens_correct += int(answer_hits.sum())
            nll += float(nats[start - 1 : stop - 1].sum())
            tokens += stop - start
        distances += sum(script.distances)
    questions = sum(len(script.answers) for script in scripts)
    return Recall(distances / questions, lines, questions, correct, nll, tokens, tokens_correct)


class Pieces:
    """A stream of token ids that grows piece by piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.ids = beginning(tokenizer)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    def parts(self, template: str, key: str, answer: str) -> tuple[list[int], list[int], list[int]]:
        """The tokens before the answer, of the answer, and after it."""
        before, _, after = template.replace("{key}", key).partition("{answer}")
        if before.endswith(" "):  # in almost every vocabulary, a space belongs to the token after it
            before, answer = before[:-1], f" {answer}"
        return self.encode(before), self.encode(answer), self.encode(after)

    def add(self, template: str, key: str, answer: str) -> tuple[int, int]:
        """Add a filled-in template. Returns the start and stop of its answer."""
        before, middle, after = self.parts(template, key, answer)
        start = len(self.ids) + len(before)
        self.ids += [*before, *middle, *after]
        return start, start + len(middle)


def _keys() -> list[str]:
    return [f"{adjective}_{noun}" for adjective in ADJECTIVES for noun in NOUNS]


def random_number(rng: random.Random, digits: int) -> str:
    if digits < 1:
        raise ValueError(f"digits must be at least 1, not {digits}")
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _wording(name: str) -> Wording:
    if name not in WORDINGS:
        raise ValueError(f"wording must be one of {', '.join(WORDINGS)}, not {name!r}")
    return WORDINGS[name]
