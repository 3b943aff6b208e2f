"""Recall by distance, with a model that copies from the tokens in its window."""

import re
from collections import Counter

import pytest
import torch
from torch import nn

from streamllm.evaluate import (
    TASKS,
    WORDINGS,
    passkey,
    passkey_script,
    ruler,
    ruler_script,
    stream_eval,
    stream_eval_script,
)
from streamllm.models.base import CausalLM
from streamllm.models.step import Geometry
from streamllm.tokenizer import load_tokenizer_files
from tests import tiny

S, W = 4, 256


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer_files(tiny.write(tmp_path_factory.mktemp("bytes"), tiny.tokenizer()))


class Copier(CausalLM):
    """Predicts the token after the longest earlier match of the latest tokens, among the visible tokens.

    Its keys are the tokens themselves, so the cache is its only memory.
    """

    geometry = Geometry(1, 1, 258, (None,), None, None)

    def __init__(self):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.zeros(1))

    def hidden(self, tokens, plan):
        step = plan.steps[None]
        ids = tokens[:, None, :, None].to(self.weight.dtype)
        keys, _ = plan.stores[0].append(ids, ids)
        keys, places, mask = keys[0, 0, :, 0].long().tolist(), step.key_place[0].tolist(), step.mask()
        logits = torch.zeros(1, tokens.shape[1], 258)
        for t in range(tokens.shape[1]):
            visible = range(len(keys)) if mask is None else mask[0, t].nonzero()[:, 0].tolist()
            held = {places[j]: keys[j] for j in visible}
            now, best, choice = int(step.query_place[0, t]), 0, 0
            for place in held:
                length = 0
                while held.get(place - length, -1) == held.get(now - length, -2) and place < now:
                    length += 1
                if length > best:
                    best, choice = length, held.get(place + 1, 0)
            logits[0, t, choice] = 9.0
        return logits

    def project(self, x):
        return x


def answers_twice(script):
    """The tokens of every answer, as (in the fact, in the question)."""
    for (start, stop), distance in zip(script.answers, script.distances, strict=True):
        yield script.tokens[start - distance : stop - distance].tolist(), script.tokens[start:stop].tolist()


@pytest.mark.parametrize("wording", WORDINGS)
def test_every_question_asks_for_an_earlier_fact(tokenizer, wording):
    script = stream_eval_script(tokenizer, lines=100, every=10, back=20, wording=wording, seed=3)
    pairs = list(answers_twice(script))
    assert len(pairs) == 8  # the first question comes after line 20 + 9
    assert all(before == asked for before, asked in pairs)
    assert len({tuple(asked) for _, asked in pairs}) == 8
    text = tokenizer.decode(script.tokens.tolist()).splitlines()
    assert len(text) == 108
    answer = tokenizer.decode(script.tokens[slice(*script.answers[0])].tolist()).strip()
    lines = [n for n, line in enumerate(text) if answer in line]
    assert lines == [9, 30]  # asked after line 29, about the line 20 before it
    assert torch.equal(
        script.tokens, stream_eval_script(tokenizer, lines=100, wording=wording, seed=3).tokens
    )
    assert not torch.equal(script.tokens[:50], stream_eval_script(tokenizer, wording=wording).tokens[:50])


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("distance", [150, 151, 400])
def test_a_passkey_is_at_the_given_distance(tokenizer, wording, distance):
    script = passkey_script(tokenizer, distance=distance, lead=60, wording=wording, seed=1)
    ((before, asked),) = answers_twice(script)
    assert before == asked
    assert script.distances == (distance,)
    assert script.answers[0][0] - distance >= 60
    text = tokenizer.decode(script.tokens.tolist())
    assert text.count(tokenizer.decode(asked).strip()) == 2


def test_facts_in_the_window_are_recalled_and_others_are_not(tokenizer):
    near, far, gone = passkey(
        Copier(), tokenizer, distances=(150, W - 10, W + 1), samples=3, sinks=S, window=W, chunk=100
    )
    assert (near.accuracy, far.accuracy, gone.accuracy) == (1, 1, 0)
    assert near.mean < 0.1 < gone.mean
    assert (near.distance, near.questions, near.lines) == (150, 3, None)


def test_stream_eval_falls_to_zero_beyond_the_window(tokenizer):
    scores = stream_eval(
        Copier(), tokenizer, back=(2, 4, 10), lines=40, every=5, sinks=S, window=400, chunk=64
    )
    assert [score.lines for score in scores] == [2, 4, 10]
    assert [score.accuracy for score in scores] == [1, 1, 0]
    assert scores[1].distance < 400 < scores[2].distance
    (dense,) = stream_eval(Copier(), tokenizer, back=(10,), lines=20, every=5, mode="dense")
    assert dense.accuracy == 1


def test_wrong_arguments_are_named(tokenizer):
    with pytest.raises(ValueError, match="too short"):
        passkey_script(tokenizer, distance=10)
    with pytest.raises(ValueError, match="wording must be one of lines, code"):
        stream_eval_script(tokenizer, wording="verse")
    with pytest.raises(ValueError, match="lines"):
        stream_eval_script(tokenizer, lines=2000)
    with pytest.raises(ValueError, match="back"):
        stream_eval_script(tokenizer, lines=20, back=20)
    with pytest.raises(ValueError, match="mode"):
        stream_eval(Copier(), tokenizer, mode="recompute")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("distance", [None, 400, 777])
def test_a_task_of_ruler_is_at_the_given_distance(tokenizer, task, distance):
    script = ruler_script(tokenizer, task, distance=distance, seed=3)
    text = tokenizer.decode(script.tokens.tolist())
    said = text[: text.index("Question")]
    answers = [tokenizer.decode(script.tokens[start:stop].tolist()).strip() for start, stop in script.answers]
    places = [start - back for (start, _), back in zip(script.answers, script.distances, strict=True)]
    for (start, stop), place in zip(script.answers, places, strict=True):
        assert torch.equal(script.tokens[start:stop], script.tokens[place : place + stop - start])
    if distance is not None:
        assert script.answers[0][0] - max(places) == distance
    assert min(places) > 32
    if task == "needle":
        key = re.search(r"what is the secret number of the (.+)\?", text)[1]
        assert re.findall(rf"The secret number of the {key} is (\d+)\.", said) == answers
    elif task == "variables":
        value = re.search(r"have the value (\d+)\?", text)[1]
        held = set()
        for name, given in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\n", said):
            if given == value or given in held:
                held.add(name)
        assert held == set(answers)
        assert len(answers) == 5
    else:
        words = Counter(re.findall(r"\d+\. (\w+)", said))
        assert answers == [words.most_common(1)[0][0]]
        assert sorted(words.values()) == [2] * 10 + [20]


def test_a_needle_in_the_window_is_recalled_and_another_is_not(tokenizer):
    inside, beyond = ruler(Copier(), tokenizer, "needle", distances=(200, 400), samples=4, window=W)
    assert inside.accuracy == 1
    assert beyond.accuracy == 0
    (dense,) = ruler(Copier(), tokenizer, "needle", distances=(400,), samples=4, mode="dense")
    assert dense.accuracy == 1


def test_wrong_arguments_of_ruler_are_named(tokenizer):
    with pytest.raises(ValueError, match="task must be one of needle, variables, words"):
        ruler_script(tokenizer, "poem", distance=100)
    with pytest.raises(ValueError, match="too short for the task needle: give"):
        ruler_script(tokenizer, "needle", distance=3)
    with pytest.raises(ValueError, match="samples"):
        ruler(Copier(), tokenizer, "needle", samples=0)
