"""DRY: equal to the plain version, with llama.cpp's rules for breakers and exponents."""

from __future__ import annotations

import random

import pytest

from streamllm.sampling import breaker_tokens
from streamllm.sampling.dry import RepeatedSuffixes, dry_penalties, single_token_breakers
from tests.unit.sampling.plain import dry_lengths


def matches(tokens, window: int = 1000, breakers=()) -> RepeatedSuffixes:
    repeats = RepeatedSuffixes(window, tuple(breakers))
    for token in tokens:
        repeats.push(token)
    return repeats


@pytest.mark.parametrize("window", [1, 2, 3, 4, 7, 40, 1000])
@pytest.mark.parametrize(
    "breakers", [(), ((0,),), ((0, 1), (1, 1, 1)), ((0, 1, 2), (1,), (2, 0)), ((0, 1, 0),)], ids=str
)
def test_lengths_equal_those_of_the_plain_version(window: int, breakers) -> None:
    for seed in range(6):
        draw = random.Random(seed)
        repeats, tokens = RepeatedSuffixes(window, breakers), []
        while len(tokens) < 150:
            start = draw.randrange(len(tokens) + 1)
            new = [draw.randrange(3)] + tokens[start : start + draw.randrange(20)] * (draw.random() < 0.4)
            for token in new:
                repeats.push(token)
            tokens += new
            for shortest in (1, 2, 5):
                wanted = dry_lengths(tokens[-window:], breakers, shortest)
                assert repeats.continuations(shortest) == wanted


def test_the_example_of_the_docstring() -> None:
    a, b, c, y = range(4)
    assert matches([a, b, c, c, b, c, y, a, b, c]).continuations(1) == {c: 3, b: 1, y: 2}


def test_a_breaker_limits_the_length_and_a_breaker_token_is_exempt() -> None:
    tokens = [5, 1, 2, 9, 3, 4, 7, 5, 1, 2, 9, 3, 4]  # 7 would continue a repetition of 6 tokens
    assert matches(tokens).continuations(2) == {7: 6}
    assert matches(tokens, breakers=[(9,)]).continuations(2) == {7: 2}
    assert matches(tokens, breakers=[(9,)]).continuations(3) == {}
    assert matches(tokens, breakers=[(2, 9)]).continuations(2) == {7: 2}
    assert matches(tokens, breakers=[(4,)]).continuations(1) == {}
    repeats = matches([1, 2, 7, 1, 2], breakers=[(7,)])
    assert repeats.continuations(2) == {7: 2}
    assert list(dry_penalties(repeats, 1.0, 1.75, 2, single_token_breakers([(7,), (1, 2)]))) == []


def test_a_breaker_outside_the_window_does_not_count() -> None:
    tokens = [8, 9, 1, 2, 1, 2, 1, 2]
    breakers = [(9,), (8, 9, 1)]
    for window in range(1, 9):
        wanted = dry_lengths(tokens[-window:], breakers, 1)
        assert matches(tokens, window, breakers).continuations(1) == wanted


@pytest.mark.parametrize(("length", "wanted"), [(1, 0), (2, 0.8), (3, 1.4), (4, 2.45)])
def test_the_penalty_grows_with_the_length_of_the_repetition(length: int, wanted: float) -> None:
    block = list(range(10, 10 + length))
    repeats = matches([1, *block, 7, 2, *block])
    found = dict(dry_penalties(repeats, 0.8, 1.75, 2))
    assert found == ({7: pytest.approx(wanted)} if wanted else {})


def test_a_very_long_repetition_has_a_finite_penalty() -> None:
    repeats = matches([1, 2, 3] * 900, window=2700)
    for base in (1.0, 1.75, 100.0):
        ((token, penalty),) = dry_penalties(repeats, 0.8, base, 2)
        assert token == 1
        assert penalty == (pytest.approx(0.8) if base == 1 else pytest.approx(0.8e30, rel=1e-6))


class Letters:
    """A tokenizer of some short texts."""

    TEXTS = ("\n", "a", ":", " :", '"', "*", "b\n", "U", "ser", ":x", "xUse", "r", "\n\n")
    vocab_size = len(TEXTS)

    def decode(self, ids, *, skip_special_tokens: bool) -> str:
        return "".join(self.TEXTS[token] for token in ids)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids = []
        while text:
            ids.append(
                max(
                    (i for i, t in enumerate(self.TEXTS) if text.startswith(t)),
                    key=lambda i: len(self.TEXTS[i]),
                )
            )
            text = text[len(self.TEXTS[ids[-1]]) :]
        return ids


def test_breakers_are_found_in_the_vocabulary() -> None:
    texts, letters = Letters.TEXTS, Letters()

    def spelled(found) -> set[tuple[str, ...]]:
        return {tuple(texts[token] for token in breaker) for breaker in found}

    assert spelled(breaker_tokens(letters, None)) == {
        ("\n",), (":",), (" :",), ('"',), ("*",), ("b\n",), (":x",), ("\n\n",),
    }  # fmt: skip
    assert spelled(breaker_tokens(letters, ["User:"])) == {("U", "ser", ":"), ("xUse", "r", ":")}
    assert breaker_tokens(letters, [(3, 4), "a"]) == ((1,), (3, 4))
    assert breaker_tokens(letters, ()) == ()
    assert breaker_tokens(None, None) == ()
    assert breaker_tokens(None, [(3,)]) == ((3,),)
    with pytest.raises(ValueError, match="takes a tokenizer: give token ids"):
        breaker_tokens(None, ["\n"])
