"""Sampling against a simple implementation with transformers' order of steps; generation_config.json."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from streamllm.generation_config import UNSUPPORTED_KEYS, GenerationConfig, read_generation_config
from streamllm.sampling import History, RowSettings, Sampler, check_finite, choose_rows, rows, sample
from streamllm.weights.errors import UnsupportedConfig


def expected_probabilities(logits: list[float], config: GenerationConfig, seen: set[int]) -> list[float]:
    """The probability of each token in plain Python: penalty, temperature, top-k, top-p, min-p, in this order."""
    scores = [float(x) for x in logits]
    for token in seen:
        p = config.repetition_penalty
        scores[token] = scores[token] * p if scores[token] < 0 else scores[token] / p
    if config.temperature == 0:
        best = max(scores)
        return [float(token == scores.index(best)) for token in range(len(scores))]
    scores = [x / config.temperature for x in scores]
    kept = set(range(len(scores)))
    if config.top_k:
        lowest = sorted(scores, reverse=True)[: config.top_k][-1]
        kept = {token for token in kept if scores[token] >= lowest}  # also ties with the k-th
    probabilities = _softmax(scores, kept)
    candidates, kept, total = kept, set(), 0.0
    for token in sorted(candidates, key=lambda token: -scores[token]):
        if total < config.top_p or config.top_p == 1:
            kept.add(token)
        total += probabilities[token]
    probabilities = _softmax(scores, kept)
    kept = {token for token in kept if probabilities[token] >= config.min_p * max(probabilities)}
    return _softmax(scores, kept)


def _softmax(scores: list[float], kept: set[int]) -> list[float]:
    """Over the kept tokens; the others have probability 0."""
    masked = torch.tensor([x if token in kept else -torch.inf for token, x in enumerate(scores)])
    return masked.double().softmax(-1).tolist()


def next_token(
    logits: Tensor, config: GenerationConfig, seed: int = 0, place: int = 0, seen: tuple[int, ...] = ()
) -> int:
    """The token that `sample` gives for logits [V] at a place of a stream that holds the tokens `seen`."""
    size = len(logits)
    sampler = Sampler(config, vocab_size=size, window=size, seed=seed)
    history = History(size, seen)
    tokens, best = sample(logits[None], [sampler], RowSettings([config], "cpu"), [history], [place], [0])
    check_finite(float(best))
    return int(tokens)


def probabilities_of(logits: Tensor, config: GenerationConfig, device: str = "cpu") -> Tensor:
    """The probability [V] of each token, from the scores that `sample` draws from on this kind of device."""
    settings = RowSettings([config], "cpu")
    scores = (logits - logits.max())[None] / settings.temperature
    if not (config.top_k or config.top_p < 1 or config.min_p):
        return scores[0].softmax(-1)
    if device == "cpu":
        values, tokens, short = rows._cut_candidates(scores, settings)
        if short is None or not short.any():
            return torch.zeros(len(logits)).index_add(0, tokens[0], values[0].softmax(-1))
    return rows._cut(scores, settings)[0].softmax(-1)


GRID = [
    GenerationConfig(temperature=t, top_k=k, top_p=p, min_p=m)
    for t in (0.5, 1.0, 3.0)
    for k in (0, 1, 7, 400, 5000)
    for p in (0.05, 0.5, 0.9, 0.999, 1.0)
    for m in (0.0, 0.02, 0.3, 1.0)
]


@pytest.mark.parametrize("size", [1, 40, 700])
def test_probabilities_equal_those_of_the_simple_implementation(size: int) -> None:
    logits = 3 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    for config in GRID:
        wanted = torch.tensor(expected_probabilities(logits.tolist(), config, set()))
        found = probabilities_of(logits, config)
        assert (found - wanted).abs().max() < 1e-5, config
        assert ((found > 0) == (wanted > 0)).all(), config


def test_a_flat_distribution_keeps_more_tokens_than_the_first_candidates() -> None:
    logits = 0.1 * torch.randn(3000, generator=torch.Generator().manual_seed(1))
    for config in (
        GenerationConfig(temperature=1.0, top_p=0.9),
        GenerationConfig(temperature=1.0, min_p=0.5),
        GenerationConfig(temperature=1.0, top_p=0.9, min_p=0.8),
        GenerationConfig(temperature=1.0, top_k=1000, top_p=0.5),
    ):
        wanted = torch.tensor(expected_probabilities(logits.tolist(), config, set()))
        assert int((wanted > 0).sum()) > 256
        assert (probabilities_of(logits, config) - wanted).abs().max() < 1e-6


def test_ties_with_the_kth_token_are_kept() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0, -3.0])
    found = probabilities_of(logits, GenerationConfig(temperature=1.0, top_k=2))
    assert (found > 0).tolist() == [False, True, True, True, True, False]
    all_equal = probabilities_of(torch.zeros(9), GenerationConfig(temperature=1.0, top_k=1))
    assert torch.allclose(all_equal, torch.full((9,), 1 / 9))


@pytest.mark.parametrize("device", ["cpu", "other"])
@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4), (0.51, 3), (0.24, 1)])
def test_the_token_that_reaches_top_p_is_the_last_one_kept(top_p: float, kept: int, device: str) -> None:
    """Four tokens of probability 1/4, whose sums are exact in floats, so that `<` and `<=` differ."""
    config = GenerationConfig(temperature=1.0, top_p=top_p)
    assert int((probabilities_of(torch.zeros(4), config, device) > 0).sum()) == kept


@pytest.mark.parametrize("rounding", [torch.float32, torch.bfloat16], ids=str)
def test_every_device_keeps_the_same_tokens(rounding: torch.dtype) -> None:
    """A CPU sorts some candidates, other devices all tokens. In bfloat16, many tokens are equally likely."""
    logits = (3 * torch.randn(700, generator=torch.Generator().manual_seed(3))).to(rounding).float()
    for config in GRID:
        on_cpu, elsewhere = (probabilities_of(logits, config, device) for device in ("cpu", "other"))
        assert ((on_cpu > 0) == (elsewhere > 0)).all(), config


@pytest.mark.parametrize("size", [40, 700])
def test_the_random_number_falls_into_the_interval_of_its_token(size: int) -> None:
    """Each token's interval is as long as its probability, and they follow one another in the order of ids."""
    logits = 3 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    margin = 1e-6
    for config in GRID[:: 3 if size > 100 else 1]:
        probability = torch.tensor(expected_probabilities(logits.tolist(), config, set())).double()
        ends = probability.cumsum(0)
        tokens = (probability > 4 * margin).nonzero()[:, 0][:40]
        chances = torch.cat((ends[tokens] - probability[tokens] + margin, ends[tokens] - margin))
        batch = RowSettings([config] * len(chances), "cpu")
        found, _ = choose_rows(logits.expand(len(chances), -1), batch, chances)
        assert found.tolist() == tokens.tolist() * 2, config


def test_ties_have_equal_probability_and_greedy_decoding_takes_the_first() -> None:
    logits = torch.tensor([1.0, 4.0, 4.0, 0.0])
    found = probabilities_of(logits, GenerationConfig(temperature=1.0, min_p=1.0))
    assert torch.allclose(found, torch.tensor([0.0, 0.5, 0.5, 0.0]))
    assert next_token(logits, GenerationConfig()) == 1


def test_top_p_applies_to_the_tokens_that_top_k_keeps() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # With top_k=2, 0.4 and 0.3 become 0.57 and 0.43, so the first one alone reaches 0.5.
    assert (probabilities_of(logits, GenerationConfig(temperature=1.0, top_k=2, top_p=0.5)) > 0).sum() == 1
    assert (probabilities_of(logits, GenerationConfig(temperature=1.0, top_p=0.5)) > 0).sum() == 2


def test_the_repetition_penalty_lowers_logits_of_both_signs_before_the_temperature() -> None:
    logits = torch.tensor([2.0, -1.0, 1.5, -0.5])
    assert next_token(logits, GenerationConfig(repetition_penalty=1.5), seen=(0, 1)) == 2
    assert next_token(logits, GenerationConfig(repetition_penalty=1.2), seen=(0, 1)) == 0
    config = GenerationConfig(temperature=0.7, repetition_penalty=1.5)
    wanted = expected_probabilities(logits.tolist(), config, {0, 1})
    draws = _draws(logits, config, 4000, (0, 1))
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
def test_draws_have_the_expected_frequencies(config: GenerationConfig) -> None:
    logits = 2 * torch.randn(12, generator=torch.Generator().manual_seed(5))
    draws = _draws(logits, config, 4000)
    assert (draws - torch.tensor(expected_probabilities(logits.tolist(), config, set()))).abs().max() < 0.03


def _draws(logits: Tensor, config: GenerationConfig, count: int, seen: tuple[int, ...] = ()) -> Tensor:
    tokens = torch.tensor([next_token(logits, config, 0, place, seen) for place in range(count)])
    return tokens.bincount(minlength=len(logits)) / count


def test_a_seed_makes_draws_repeatable_and_bfloat16_logits_are_widened() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(2)).bfloat16()
    config = GenerationConfig(temperature=1.0, top_p=0.95)

    def draws(seed: int) -> list[int]:
        return [next_token(logits, config, seed, place) for place in range(20)]

    assert draws(1) == draws(1) != draws(2)
    assert draws(1) == [next_token(logits.float(), config, 1, place) for place in range(20)]


def test_a_tiny_temperature_does_not_overflow() -> None:
    logits = torch.tensor([100.0, 300.0, 200.0])
    assert next_token(logits, GenerationConfig(temperature=1e-40)) == 1


@pytest.mark.parametrize("config", [GenerationConfig(), GenerationConfig(temperature=1.0, top_p=0.9)])
def test_logits_that_are_not_finite_are_an_error(config: GenerationConfig) -> None:
    with pytest.raises(ValueError, match="not finite"):
        next_token(torch.tensor([1.0, torch.nan, 0.0]), config)


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


def test_generation_config_json_is_read() -> None:
    values = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [5, 6], "max_length": 4096}
    assert read_generation_config(values) == GenerationConfig(
        temperature=0.6, top_k=50, top_p=0.9, eos=(5, 6)
    )
    # Without do_sample, only eos and the penalty have an effect.
    greedy = {**values, "do_sample": False, "repetition_penalty": 1.1, "eos_token_id": 5}
    assert read_generation_config(greedy) == GenerationConfig(repetition_penalty=1.1, eos=(5,))
    assert read_generation_config({}) == GenerationConfig()


def test_given_settings_override_those_of_the_checkpoint() -> None:
    config = GenerationConfig(temperature=0.6, top_k=50, eos=(5,))
    assert config.override(temperature=None, top_k=None) == config
    assert config.override(temperature=0.0).temperature == 0
    assert config.override(top_k=3) == GenerationConfig(temperature=0.6, top_k=3, eos=(5,))
    assert GenerationConfig().override(top_p=0.9) == GenerationConfig(temperature=1.0, top_p=0.9)
    assert GenerationConfig().override(top_p=0.9, temperature=0.0).temperature == 0


def test_unsupported_settings_are_listed_unless_their_value_has_no_effect() -> None:
    without_effect = {name: values[0] for name, values in UNSUPPORTED_KEYS.items() if values}
    assert read_generation_config({**without_effect, "length_penalty": 2.0}).unsupported == ()
    values = json.loads('{"num_beams": 4, "typical_p": 0.9, "forced_eos_token_id": 2, "top_k": 40}')
    assert read_generation_config(values).unsupported == (
        "num_beams=4",
        "typical_p=0.9",
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
def test_errors_name_generation_config_json(wrong: dict[str, object]) -> None:
    with pytest.raises(UnsupportedConfig, match=r"generation_config\.json"):
        read_generation_config(wrong)
