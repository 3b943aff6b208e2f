"""`sample`: a batch equals its rows alone, draws have the expected frequencies, and the callback."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from streamllm import GenerationConfig
from streamllm.sampling import (
    History,
    RowSettings,
    Sampler,
    check_finite,
    choose_rows,
    sample,
    token_logprobs,
)
from streamllm.sampling import rows as rows_module

CONFIGS = [
    GenerationConfig(),
    GenerationConfig(temperature=1.0),
    GenerationConfig(temperature=0.7, top_k=5),
    GenerationConfig(temperature=1.3, top_p=0.9),
    GenerationConfig(temperature=1.0, min_p=0.1),
    GenerationConfig(temperature=0.9, top_k=300, top_p=0.5, min_p=0.01),
    GenerationConfig(temperature=1.0, top_p=0.9999),
    GenerationConfig(temperature=1e-40, top_p=0.5),
    GenerationConfig(temperature=1e300),
    GenerationConfig(temperature=0.8, repetition_penalty=1.4, frequency_penalty=0.5, dry_multiplier=2.0),
    GenerationConfig(
        temperature=0.8, top_k=3, no_repeat_ngram_size=2, logit_bias={3: 5.0}, min_new_tokens=2, eos=(3,)
    ),
]


@pytest.mark.parametrize("cpu", [True, False], ids=["cpu", "other device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1, 12, 700])
def test_each_row_of_a_batch_gets_the_token_that_it_gets_alone(
    vocab: int, dtype, cpu: bool, monkeypatch
) -> None:
    if not cpu:
        monkeypatch.setattr(
            rows_module,
            "_draw_on_the_cpu",
            lambda scores, *rest: rows_module.draw(rows_module._cut(scores, rest[0]), rest[1]),
        )
    draw = random.Random(vocab)
    for trial in range(12):
        configs = [draw.choice(CONFIGS) for _ in range(draw.choice((1, 2, 9)))]
        if vocab <= 3:
            configs = [config for config in configs if not config.logit_bias] or [GenerationConfig()]
        samplers = [Sampler(c, vocab_size=vocab, window=20, seed=draw.randrange(99)) for c in configs]
        histories = [History(20, [draw.randrange(min(vocab, 4)) for _ in range(9)]) for _ in configs]
        places, generated = [draw.randrange(50) for _ in configs], [draw.randrange(4) for _ in configs]
        generator = torch.Generator().manual_seed(trial)
        logits = (2 * torch.randn(len(configs), vocab, generator=generator)).to(dtype)
        tokens, best = sample(logits, samplers, RowSettings(configs, "cpu"), histories, places, generated)
        assert tokens.dtype == torch.int64
        for i, config in enumerate(configs):
            alone, best_alone = sample(
                logits[i : i + 1],
                [samplers[i]],
                RowSettings([config], "cpu"),
                [histories[i]],
                [places[i]],
                [generated[i]],
            )
            assert tokens[i : i + 1].tolist() == alone.tolist(), config
            assert torch.equal(best[i : i + 1], best_alone)


@pytest.mark.parametrize(
    "config", [c for c in CONFIGS if 0 < c.temperature < 2], ids=lambda config: str(CONFIGS.index(config))
)
def test_draws_have_the_expected_frequencies_over_places_and_over_seeds(config: GenerationConfig) -> None:
    """Chi-square against the softmax of the processed and cut scores."""
    logits = 1.5 * torch.randn(12, generator=torch.Generator().manual_seed(8))
    history, count = History(20, [1, 2, 3, 1, 2]), 3000
    for seeds, places in ((range(count), [4] * count), ([6] * count, range(count))):
        samplers = [Sampler(config, vocab_size=12, window=20, seed=seed) for seed in seeds]
        tokens, _ = sample(
            logits.expand(count, -1),
            samplers,
            RowSettings([config] * count, "cpu"),
            [history] * count,
            places,
            [1] * count,
        )
        counts = tokens.bincount(minlength=12).double()
        probability = probabilities(logits, config, history)
        assert (counts[probability == 0] == 0).all()
        kept = probability > 0
        expected = count * probability[kept]
        chi_square = float(((counts[kept] - expected) ** 2 / expected).sum())
        assert chi_square < int(kept.sum()) - 1 + 5 * (2 * int(kept.sum())) ** 0.5, (
            config,
            counts,
            probability,
        )


def probabilities(logits: Tensor, config: GenerationConfig, history: History) -> Tensor:
    """The exact probability of each token: its share of a fine, even grid of random numbers."""
    from streamllm.sampling import apply_edits

    sampler = Sampler(config, vocab_size=len(logits), window=20, seed=0)
    scores = apply_edits(logits[None], [sampler.edits(history, 1)])
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    tokens, _ = choose_rows(scores.expand(len(grid), -1), RowSettings([config] * len(grid), "cpu"), grid)
    return tokens.bincount(minlength=len(logits)).double() / len(grid)


@pytest.mark.parametrize("chance", [0.0, 1 - 2**-53])
def test_the_ends_of_the_range_draw_tokens_that_are_kept(chance: float) -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, 0.0, -10.0, -torch.inf]])
    for config in (GenerationConfig(temperature=1.0), GenerationConfig(temperature=1.0, top_k=3)):
        token, _ = choose_rows(logits, RowSettings([config], "cpu"), chance)
        assert token.tolist() == [1 if chance == 0 else (3 if config.top_k else 4)]


def test_the_numbers_of_mps_stay_below_one() -> None:
    below_one = rows_module._below_one
    assert torch.tensor(below_one(1 - 2**-53), dtype=torch.float32) < 1
    assert below_one(torch.tensor([1 - 2**-53, 0.5], dtype=torch.float64)).float().tolist() == [
        1 - 2**-24,
        0.5,
    ]


def test_the_callback_sees_the_processed_logits_and_the_last_tokens() -> None:
    calls = []

    def only_even(tokens: list[int], logits: Tensor) -> Tensor:
        calls.append((tokens, logits.clone()))
        return logits.index_fill(0, torch.tensor([1, 3]), -torch.inf)

    config = GenerationConfig(suppress_tokens=[0])
    samplers = [
        Sampler(config, vocab_size=4, window=2, seed=0, logits_processor=processor)
        for processor in (only_even, None)
    ]
    histories = [History(9, [1, 2, 3])] * 2
    logits = torch.tensor([[9.0, 5.0, 1.0, 8.0]] * 2)
    tokens, _ = sample(logits, samplers, RowSettings([config] * 2, "cpu"), histories, [3, 3], [0, 0])
    assert tokens.tolist() == [2, 3]
    ((last, seen),) = calls
    assert last == [2, 3]
    assert seen.tolist() == [-torch.inf, 5, 1, 8]


@pytest.mark.parametrize("result", [None, torch.zeros(3), torch.zeros(1, 4)], ids=str)
def test_a_callback_that_returns_something_else_is_refused(result) -> None:
    sampler = Sampler(
        GenerationConfig(), vocab_size=4, window=2, seed=0, logits_processor=lambda tokens, logits: result
    )
    with pytest.raises(ValueError, match=r"logits_processor returned .* must return logits of shape \[4\]"):
        sample(torch.zeros(1, 4), [sampler], RowSettings([sampler.config], "cpu"), [History(2)], [0], [0])


def test_forbidding_every_token_is_an_error() -> None:
    config = GenerationConfig(suppress_tokens=[0, 1, 2], temperature=1.0)
    sampler = Sampler(config, vocab_size=3, window=2, seed=0)
    _, best = sample(torch.zeros(1, 3), [sampler], RowSettings([config], "cpu"), [History(2)], [0], [0])
    with pytest.raises(ValueError, match="every token is forbidden"):
        check_finite(float(best))


def test_no_values_are_read_from_a_device() -> None:
    """A tensor on "meta" has no values: reading one raises."""
    for config in CONFIGS:
        sampler = Sampler(config, vocab_size=50, window=20, seed=0)
        logits = torch.zeros(2, 50, device="meta")
        tokens, best = sample(
            logits,
            [sampler] * 2,
            RowSettings([config] * 2, "meta"),
            [History(20, [1, 2, 1])] * 2,
            [3, 4],
            [0, 1],
        )
        assert tokens.shape == best.shape == (2,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("vocab", [12, 700, 50_000])
def test_cuda_gives_the_tokens_of_the_cpu_and_is_not_waited_for(vocab: int) -> None:
    histories = [History(20, [1, 2, 1, 3, 1, 2])] * len(CONFIGS)
    samplers = [Sampler(config, vocab_size=vocab, window=20, seed=i) for i, config in enumerate(CONFIGS)]
    on_cpu, on_cuda = (RowSettings(CONFIGS, device) for device in ("cpu", "cuda"))
    for place in range(20):
        logits = 2 * torch.randn(len(CONFIGS), vocab, generator=torch.Generator().manual_seed(place))
        rest = samplers, [place] * len(CONFIGS), [place] * len(CONFIGS)
        wanted, _ = sample(logits, rest[0], on_cpu, histories, *rest[1:])
        device_logits = logits.cuda()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found, _ = sample(device_logits, rest[0], on_cuda, histories, *rest[1:])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert found.tolist() == wanted.tolist()


def test_a_seed_of_its_own_is_drawn_where_none_is_given() -> None:
    torch.manual_seed(0)
    seeds = {Sampler(GenerationConfig(), vocab_size=3, window=2).seed for _ in range(3)}
    assert len(seeds) == 3


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    logits = 3 * torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    tokens = torch.tensor([4, 0, 49])
    wanted = logits.double().log_softmax(-1)
    for row, found in enumerate(token_logprobs(logits, tokens, 5).rows()):
        assert found.token == tokens[row]
        assert found.logprob == pytest.approx(float(wanted[row, found.token]), abs=1e-5)
        order = wanted[row].argsort(descending=True)[:5].tolist()
        assert [token for token, _ in found.top] == order
        assert [value for _, value in found.top] == pytest.approx(wanted[row, order].tolist(), abs=1e-5)
    assert [row.top for row in token_logprobs(logits.bfloat16(), tokens).rows()] == [()] * 3
    for count in (-1, 51):
        with pytest.raises(ValueError, match=r"top_logprobs must be in 0 … 50"):
            token_logprobs(logits, tokens, count)
