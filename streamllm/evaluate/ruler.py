"""Long-context tasks after the rules of RULER (Hsieh et al., arXiv 2404.06654), by distance, generated offline.

    needle      one key and its number, hidden in filler ("single needle")
    variables   a chain of five variables, all with the value of the first; the question asks for all five
    words       a numbered list in which one word occurs twenty times and ten others twice; the question asks for it

The texts are our own. RULER fills a context of a given length; here a task is stated `distance` tokens before its
answer, so that the scores show what a window loses. RULER asks for ten common words, in any order; with one, there is
one right answer. Answers are scored without generating, as in `streamllm.evaluate.recall`: an answer is right if
greedy decoding gives it, after the right answers before it.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from streamllm.evaluate.predictions import new_cache
from streamllm.evaluate.recall import (
    ADJECTIVES,
    NOUNS,
    Pieces,
    Recall,
    Script,
    random_number,
    score_distances,
)
from streamllm.tokenizer import Tokenizer

CHAIN = 5  # variables
COMMON, OTHERS, OTHERS_EACH = 20, 10, 2  # how often the common word occurs; other words, and how often each


@dataclass(frozen=True)
class Task:
    """What is stated, and what is asked. A space comes before each answer, in both."""

    stated: tuple[tuple[str, str], ...]  # text, and the answer that follows it, "" for none
    asked: tuple[tuple[str, str], ...]  # the same; the answers are those of `stated`, in this order
    after: str = "\n"  # the answers


def needle_task(rng: random.Random) -> Task:
    key, value = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}", random_number(rng, 5)
    return Task(
        ((f"The secret number of the {key} is", value), (".\n", "")),
        (
            (
                f"Question: what is the secret number of the {key}?\nAnswer: The secret number of the {key} is",
                value,
            ),
        ),
    )


def variables_task(rng: random.Random) -> Task:
    names: list[str] = []
    while len(names) < CHAIN:
        name = "".join(rng.choices(string.ascii_uppercase, k=3))
        if name not in names:
            names.append(name)
    value = random_number(rng, 5)
    stated = [("VAR", names[0]), (f" = {value}\n", "")]
    for before, name in pairwise(names):
        stated += [(_filler(rng) + "VAR", name), (f" = VAR {before}\n", "")]
    question = f"Question: which variables have the value {value}?\nAnswer: The {CHAIN} variables are"
    return Task(tuple(stated), ((question, names[0]), *((",", name) for name in names[1:])))


def words_task(rng: random.Random) -> Task:
    common, *others = rng.sample(NOUNS, 1 + OTHERS)
    words = [common] * COMMON + others * OTHERS_EACH
    rng.shuffle(words)
    stated = [("A list of words:", "")]
    stated += [(f"\n{number}.", word) for number, word in enumerate(words, 1)]
    question = "\nQuestion: which word occurs most often in the list?\nAnswer: The most common word is"
    return Task((*stated, ("\n", "")), ((question, common),))


TASKS: dict[str, Callable[[random.Random], Task]] = {
    "needle": needle_task,
    "variables": variables_task,
    "words": words_task,
}


def ruler_script(
    tokenizer: Tokenizer, task: str, *, distance: int | None, lead: int = 32, seed: int = 0
) -> Script:
    """Filler, what is stated, filler and the question: a stream with one answer, or five for "variables".

    The first answer starts exactly `distance` tokens after the last place where an answer is stated. At least `lead`
    tokens of filler come first, so that nothing is stated among the sinks. distance=None: the shortest one.

    Raises ValueError for an unknown task, and for a distance too short for the question.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
    rng, pieces = random.Random(seed), Pieces(tokenizer)
    made = TASKS[task](rng)
    while len(pieces.ids) < lead:
        pieces.ids += pieces.encode(_filler(rng))
    places: dict[str, int] = {}  # the last place where each answer is stated
    for text, answer in made.stated:
        pieces.ids += pieces.encode(text)
        if answer:
            places[answer] = len(pieces.ids)
            pieces.ids += pieces.encode(f" {answer}")
    question = pieces.encode(made.asked[0][0])
    nearest = max(places[answer] for _, answer in made.asked)
    shortest = len(pieces.ids) + len(question) - nearest
    if distance is None:
        distance = shortest
    room = distance - shortest
    if room < 0:
        raise ValueError(f"a distance of {distance} is too short for the task {task}: give {shortest}")
    between: list[int] = []
    while len(between) < room:
        between += pieces.encode(_filler(rng))
    pieces.ids += between[len(between) - room :]
    answers, distances = [], []
    for number, (text, answer) in enumerate(made.asked):
        pieces.ids += question if number == 0 else pieces.encode(text)
        start = len(pieces.ids)
        pieces.ids += pieces.encode(f" {answer}")
        answers.append((start, len(pieces.ids)))
        distances.append(start - places[answer])
    pieces.ids += pieces.encode(made.after)
    return Script(torch.tensor(pieces.ids, dtype=torch.int64, device="cpu"), tuple(answers), tuple(distances))


def ruler(
    model: nn.Module,
    tokenizer: Tokenizer,
    task: str,
    *,
    distances: Sequence[int] | None = None,
    samples: int = 20,
    lead: int = 32,
    seed: int = 0,
    mode: str = "sinks",
    sinks: int = 4,
    window: int | None = None,
    chunk: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Recall, ...]:
    """One of TASKS: `samples` streams, and one Recall, for each distance.

    distances=None: from a quarter of the window, or as near as the task allows, to twice the window. The other
    arguments are as for `streamllm.evaluate.stream_eval`. Raises ValueError as `ruler_script` does.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")

    def scripts(distance: int | None) -> list[Script]:
        return [
            ruler_script(tokenizer, task, distance=distance, lead=lead, seed=seed + sample)
            for sample in range(samples)
        ]

    if distances is None:
        kept = new_cache(model, mode, sinks, window, chunk).window
        shortest = max(_distance(script) for script in scripts(None))
        eighths = (kept * part // 8 for part in (2, 4, 6, 8, 9, 12, 16))
        distances = [distance for distance in eighths if distance >= shortest] or [shortest]
    return score_distances(model, distances, scripts, mode, sinks, window, chunk, progress)


def _distance(script: Script) -> int:
    """From the last place where an answer is stated to the first answer."""
    stated = (start - back for (start, _), back in zip(script.answers, script.distances, strict=True))
    return script.answers[0][0] - max(stated)


def _filler(rng: random.Random) -> str:
    adjective, noun = (rng.choice(words) for words in (ADJECTIVES, NOUNS))
    return f"The {adjective} {noun} stands behind the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}.\n"
