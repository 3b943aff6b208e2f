"""The loop against a slow, plain one: after every token it feeds the whole text again, and looks at all of it."""

from __future__ import annotations

import pytest
import torch

from streamllm import GenerationConfig, SinkCache, generate
from streamllm import loop as loop_module
from streamllm.generation import make_sampler
from streamllm.loop import Loop
from streamllm.sampling import uniform
from tests.laws.scenarios import random_tokens, reference_logits, tiny_llama
from tests.unit.sampling.plain import dry_lengths, ngram_followers

SINKS, WINDOW, COUNT, SEED = 2, 6, 40, 11
PROMPT = random_tokens(9)[0].tolist()
CONFIGS = {
    "greedy": GenerationConfig(),
    "sampled": GenerationConfig(temperature=1.0),
    "truncated": GenerationConfig(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02),
    "repetition": GenerationConfig(repetition_penalty=1.3),
    "repetition, sampled": GenerationConfig(temperature=0.9, repetition_penalty=1.3),
    "all of the text": GenerationConfig(temperature=0.9, repetition_penalty=1.3, repeat_last_n=1000),
    "counts": GenerationConfig(temperature=0.7, presence_penalty=0.4, frequency_penalty=0.3),
    "n-grams": GenerationConfig(no_repeat_ngram_size=2, repeat_last_n=30),
    "bias": GenerationConfig(temperature=1.0, logit_bias=((3, 4.0), (5, -2.0)), suppress_tokens=(7, 8)),
    "dry": GenerationConfig(dry_multiplier=3.0, dry_allowed_length=1, dry_penalty_last_n=30),
}


def plain_scores(logits: list[float], text: list[int], config: GenerationConfig) -> list[float]:
    """The logits after the settings against repetition, from the list of all tokens."""
    scores = list(logits)
    for token, bias in config.logit_bias:
        scores[token] += bias
    last_n = SINKS + WINDOW if config.repeat_last_n is None else config.repeat_last_n
    recent = text[-last_n:]
    for token in set(recent):
        penalty = config.repetition_penalty
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
        scores[token] -= config.presence_penalty + config.frequency_penalty * recent.count(token)
    if config.no_repeat_ngram_size:
        for token in ngram_followers(recent, config.no_repeat_ngram_size):
            scores[token] = -torch.inf
    for token in config.suppress_tokens:
        scores[token] = -torch.inf
    if config.dry_multiplier:
        shortest = config.dry_allowed_length
        for token, length in dry_lengths(text[-(config.dry_penalty_last_n or 0) :], (), shortest).items():
            scores[token] -= config.dry_multiplier * config.dry_base ** (length - shortest)
    return scores


def plain_choice(scores: list[float], config: GenerationConfig, chance: float) -> int:
    """The token at which the cumulative probability of the kept tokens, in the order of ids, exceeds `chance`."""
    if config.temperature == 0:
        return scores.index(max(scores))
    probabilities = (torch.tensor(scores, dtype=torch.float64) / config.temperature).softmax(-1).tolist()
    ranked = sorted(range(len(scores)), key=lambda token: -probabilities[token])
    kept = ranked[: config.top_k or None]
    total, nucleus = sum(probabilities[token] for token in kept), []
    for token in kept:
        if sum(probabilities[other] for other in nucleus) < config.top_p * total or config.top_p == 1:
            nucleus.append(token)
    best = probabilities[ranked[0]]
    kept = sorted(token for token in nucleus if probabilities[token] >= config.min_p * best)
    left = chance * sum(probabilities[token] for token in kept)
    for token in kept:
        left -= probabilities[token]
        if left < 0:
            return token
    return kept[-1]


def plain_tokens(model, config: GenerationConfig) -> list[int]:
    """The reference of the streaming laws reads the whole text for each token."""
    text = list(PROMPT)
    for _ in range(COUNT):
        logits = reference_logits(model, torch.tensor([text]), SINKS, WINDOW)[0, -1].tolist()
        text.append(plain_choice(plain_scores(logits, text, config), config, uniform(SEED, len(text))))
    return text[len(PROMPT) :]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_past_eviction_gives_the_tokens_of_the_plain_loop(model, monkeypatch, name: str) -> None:
    config = CONFIGS[name]
    wanted = plain_tokens(model, config)
    assert len(PROMPT) + COUNT > 4 * (SINKS + WINDOW)
    without = GenerationConfig(temperature=config.temperature)
    assert (wanted == plain_tokens(model, without)) == (config == without), "the settings must matter"
    for run_ahead in ((), ("cpu",)):
        monkeypatch.setattr(loop_module, "RUN_AHEAD", run_ahead)
        cache = SinkCache(model, SINKS, WINDOW, chunk=4)
        settings = {"generation_config": config, "seed": SEED}
        assert list(generate(model, PROMPT, cache, max_new_tokens=COUNT, **settings)) == wanted
        loop, tokens = Loop(model, SinkCache(model, SINKS, WINDOW, chunk=4)), list[int]()
        loop.push(PROMPT)
        for count in (1, 7, COUNT - 8):  # three calls on one stream
            sampler = make_sampler(loop, (), config, SEED, None, ())
            for number in range(count):
                loop.push_drawn()
                tokens.append(loop.draw(sampler, number))
        assert tokens == wanted
