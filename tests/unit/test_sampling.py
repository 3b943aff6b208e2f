"""Sampling against a plain, slow implementation of the same words, in transformers' order."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from streamllm import sampling
from streamllm.generation_config import UNSUPPORTED_KEYS, GenerationConfig, read_generation_config
from streamllm.sampling import next_token
from streamllm.weights.errors import UnsupportedConfig


def slow(logits: list[float], config: GenerationConfig, said: set[int]) -> list[float]:
    """The probability of each token, in plain Python: penalty, temperature, top-k, top-p, min-p."""
    scores = [float(x) for x in logits]
    for token in said:
        p = config.repetition_penalty
        scores[token] = scores[token] * p if scores[token] < 0 else scores[token] / p
    if config.temperature == 0:
        best = max(scores)
        return [float(token == scores.index(best)) for token in range(len(scores))]
    scores = [x / config.temperature for x in scores]
    alive = set(range(len(scores)))
    if config.top_k:
        worst = sorted(scores, reverse=True)[: config.top_k][-1]
        alive = {token for token in alive if scores[token] >= worst}  # ties with the k-th stay
    shares = _shares(scores, alive)
    kept, total = set(), 0.0
    for token in sorted(alive, key=lambda token: -scores[token]):
        if total < config.top_p or config.top_p == 1:
            kept.add(token)
        total += shares[token]
    shares = _shares(scores, kept)
    kept = {token for token in kept if shares[token] >= config.min_p * max(shares)}
    return _shares(scores, kept)


def _shares(scores: list[float], alive: set[int]) -> list[float]:
    weights = torch.tensor([x if token in alive else -torch.inf for token, x in enumerate(scores)])
    return weights.double().softmax(-1).tolist()


def dense(logits: Tensor, config: GenerationConfig) -> Tensor:
    """The probabilities that `choose` draws from, by token."""
    drawn_from = []

    def draw(scores: Tensor, generator: torch.Generator | None) -> Tensor:
        drawn_from.append(scores)
        return torch.tensor([len(drawn_from) % len(scores)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "draw", draw)
        sampling.choose(logits, config, None)
    (scores,) = drawn_from
    if len(scores) == len(logits) and not (config.top_k or config.top_p < 1 or config.min_p):
        tokens = torch.arange(len(logits))
    else:
        tokens = sampling._ranked((logits - logits.max()) / config.temperature, config)[1]
    return torch.zeros(len(logits)).index_add(0, tokens, scores.softmax(-1))


GRID = [
    GenerationConfig(temperature=t, top_k=k, top_p=p, min_p=m)
    for t in (0.5, 1.0, 3.0)
    for k in (0, 1, 7, 400, 5000)
    for p in (0.05, 0.5, 0.9, 0.999, 1.0)
    for m in (0.0, 0.02, 0.3, 1.0)
]


@pytest.mark.parametrize("size", [1, 40, 700])
def test_the_probabilities_are_those_of_the_plain_way(size: int) -> None:
    logits = 3 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    for config in GRID:
        wanted = torch.tensor(slow(logits.tolist(), config, set()))
        found = dense(logits, config)
        assert (found - wanted).abs().max() < 1e-5, config
        assert ((found > 0) == (wanted > 0)).all(), config


def test_a_flat_distribution_needs_more_than_the_few_hundred_first_looked_at() -> None:
    logits = 0.1 * torch.randn(3000, generator=torch.Generator().manual_seed(1))
    for config in (
        GenerationConfig(temperature=1.0, top_p=0.9),
        GenerationConfig(temperature=1.0, min_p=0.5),
        GenerationConfig(temperature=1.0, top_p=0.9, min_p=0.8),
        GenerationConfig(temperature=1.0, top_k=1000, top_p=0.5),
    ):
        wanted = torch.tensor(slow(logits.tolist(), config, set()))
        assert int((wanted > 0).sum()) > 256
        assert (dense(logits, config) - wanted).abs().max() < 1e-6


def test_ties_with_the_kth_stay() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0, -3.0])
    found = dense(logits, GenerationConfig(temperature=1.0, top_k=2))
    assert (found > 0).tolist() == [False, True, True, True, True, False]
    every = dense(torch.zeros(9), GenerationConfig(temperature=1.0, top_k=1))
    assert torch.allclose(every, torch.full((9,), 1 / 9))


@pytest.mark.parametrize("device", ["cpu", "other"])
@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4), (0.51, 3), (0.24, 1)])
def test_the_token_that_reaches_top_p_is_the_last_one_kept(top_p: float, kept: int, device: str) -> None:
    """Four tokens of probability 1/4 each: sums of floats are exact, so `<` and `<=` differ."""
    scores = torch.zeros(4)
    config = GenerationConfig(temperature=1.0, top_p=top_p)
    assert int(sampling._kept(scores, scores.exp().sum(), config).sum()) == kept
    if device == "cpu":
        assert int((dense(scores, config) > 0).sum()) == kept


def test_every_device_keeps_the_same_tokens(monkeypatch) -> None:
    """A CPU looks at few candidates, a device sorts all: `_ranked` differs, what is kept does not."""
    logits = 3 * torch.randn(700, generator=torch.Generator().manual_seed(3))
    scores = logits - logits.max()
    for config in GRID:
        few, tokens, total = sampling._ranked(scores, config)
        every, order = scores.sort(descending=True, stable=True)
        kept = tokens[sampling._kept(few, total, config)]
        assert sorted(kept.tolist()) == sorted(order[sampling._kept(every, total, config)].tolist())


def test_ties_share_equally_under_min_p_and_the_first_wins_when_greedy() -> None:
    logits = torch.tensor([1.0, 4.0, 4.0, 0.0])
    found = dense(logits, GenerationConfig(temperature=1.0, min_p=1.0))
    assert torch.allclose(found, torch.tensor([0.0, 0.5, 0.5, 0.0]))
    assert next_token(logits, GenerationConfig(), None) == 1


def test_top_p_is_of_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # 0.4 and 0.3 are 0.57 and 0.43 of what top_k=2 leaves: 0.5 is reached by the first alone
    assert (dense(logits, GenerationConfig(temperature=1.0, top_k=2, top_p=0.5)) > 0).sum() == 1
    assert (dense(logits, GenerationConfig(temperature=1.0, top_p=0.5)) > 0).sum() == 2


def test_the_repetition_penalty_lowers_both_signs_and_comes_before_the_temperature() -> None:
    logits = torch.tensor([2.0, -1.0, 1.5, -0.5])
    said = torch.tensor([True, True, False, False])
    assert next_token(logits, GenerationConfig(repetition_penalty=1.5), None, said) == 2
    assert next_token(logits, GenerationConfig(repetition_penalty=1.2), None, said) == 0
    config = GenerationConfig(temperature=0.7, repetition_penalty=1.5)
    wanted = slow(logits.tolist(), config, {0, 1})
    draws = _draws(logits, config, 4000, said)
    assert (draws - torch.tensor(wanted)).abs().max() < 0.03


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(temperature=1.0),
        GenerationConfig(temperature=0.6, top_k=5),
        GenerationConfig(temperature=1.4, top_p=0.8),
        GenerationConfig(temperature=1.0, min_p=0.1),
    ],
    ids=str,
)
def test_what_is_drawn_has_the_distribution(config: GenerationConfig) -> None:
    logits = 2 * torch.randn(12, generator=torch.Generator().manual_seed(5))
    draws = _draws(logits, config, 4000)
    assert (draws - torch.tensor(slow(logits.tolist(), config, set()))).abs().max() < 0.03


def _draws(logits: Tensor, config: GenerationConfig, count: int, said: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([next_token(logits, config, generator, said) for _ in range(count)])
    return tokens.bincount(minlength=len(logits)) / count


def test_a_seed_is_a_text_and_half_precision_is_widened() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(2)).bfloat16()
    config = GenerationConfig(temperature=1.0, top_p=0.95)

    def text(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [next_token(logits, config, generator) for _ in range(20)]

    assert text(1) == text(1) != text(2)
    assert text(1) == [
        next_token(logits.float(), config, generator)
        for generator in [torch.Generator().manual_seed(1)]
        for _ in range(20)
    ]


def test_a_tiny_temperature_is_nearly_greedy() -> None:
    logits = torch.tensor([100.0, 300.0, 200.0])
    assert next_token(logits, GenerationConfig(temperature=1e-40), torch.Generator()) == 1


@pytest.mark.parametrize("config", [GenerationConfig(), GenerationConfig(temperature=1.0, top_p=0.9)])
def test_logits_that_are_no_numbers_are_an_error(config: GenerationConfig) -> None:
    with pytest.raises(ValueError, match="not finite"):
        next_token(torch.tensor([1.0, torch.nan, 0.0]), config, torch.Generator())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        GenerationConfig(**{name: value})


def test_what_a_checkpoint_asks_for() -> None:
    asked = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [5, 6], "max_length": 4096}
    assert read_generation_config(asked) == GenerationConfig(temperature=0.6, top_k=50, top_p=0.9, eos=(5, 6))
    # without do_sample the rest is dead, but for the penalty, which greedy decoding hears, too
    greedy = {**asked, "do_sample": False, "repetition_penalty": 1.1, "eos_token_id": 5}
    assert read_generation_config(greedy) == GenerationConfig(repetition_penalty=1.1, eos=(5,))
    assert read_generation_config({}) == GenerationConfig()


def test_what_is_given_comes_before_what_the_checkpoint_says() -> None:
    config = GenerationConfig(temperature=0.6, top_k=50, eos=(5,))
    assert config.override(temperature=None, top_k=None) == config
    assert config.override(temperature=0.0).temperature == 0
    assert config.override(top_k=3) == GenerationConfig(temperature=0.6, top_k=3, eos=(5,))
    assert GenerationConfig().override(top_p=0.9) == GenerationConfig(temperature=1.0, top_p=0.9)
    assert GenerationConfig().override(top_p=0.9, temperature=0.0).temperature == 0


def test_what_cannot_be_done_is_kept_by_name_and_harmless_values_are_not() -> None:
    harmless = {name: values[0] for name, values in UNSUPPORTED_KEYS.items() if values}
    assert read_generation_config({**harmless, "length_penalty": 2.0}).unsupported == ()
    asked = json.loads('{"num_beams": 4, "no_repeat_ngram_size": 3, "forced_eos_token_id": 2, "top_k": 40}')
    assert read_generation_config(asked).unsupported == (
        "num_beams=4",
        "no_repeat_ngram_size=3",
        "forced_eos_token_id=2",
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"do_sample": True, "temperature": "hot"},
        {"do_sample": True, "top_p": 1.5},
        {"do_sample": "yes"},
        {"eos_token_id": "</s>"},
        {"eos_token_id": [1, None]},
        {"repetition_penalty": 0},
    ],
)
def test_a_broken_file_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(UnsupportedConfig, match=r"generation_config\.json"):
        read_generation_config(wrong)
