"""What a sampler changes in the logits: equal to transformers' processors, to OpenAI's definition, and to plain DRY."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor

from streamllm import GenerationConfig
from streamllm.sampling import History, Sampler, apply_edits
from tests.unit.sampling.plain import dry_lengths

VOCAB = 12
EOS = (3, 7)
BAD_WORDS = [[5], [1, 2], [2, 2], [0, 1, 4], [7], [3, 4]]


def processed(
    logits: Tensor, tokens: list[int], generated: int = 1, window: int = 1000, **settings
) -> Tensor:
    sampler = Sampler(GenerationConfig(eos=EOS, **settings), vocab_size=len(logits), window=window, seed=0)
    return apply_edits(logits[None], [sampler.edits(History(sampler.needs, tokens), generated)])[0]


# Settings, and transformers' processors of the same names for a prompt of so many tokens.
CASES: dict[str, tuple[dict[str, object], Callable[[int], list[object]]]] = {
    "repetition_penalty": (
        {"repetition_penalty": 1.3},
        lambda _: [transformers.RepetitionPenaltyLogitsProcessor(1.3)],
    ),
    **{
        f"no_repeat_ngram_size {size}": (
            {"no_repeat_ngram_size": size},
            lambda _, size=size: [transformers.NoRepeatNGramLogitsProcessor(size)],
        )
        for size in (1, 2, 3)
    },
    "bad_words_ids": (
        {"bad_words_ids": BAD_WORDS},
        lambda _: [transformers.NoBadWordsLogitsProcessor(BAD_WORDS, list(EOS))],
    ),
    "min_new_tokens": (
        {"min_new_tokens": 4},
        lambda prompt: [transformers.MinNewTokensLengthLogitsProcessor(prompt, 4, list(EOS))],
    ),
    "suppress_tokens": (
        {"suppress_tokens": [2, 9]},
        lambda _: [transformers.SuppressTokensLogitsProcessor([2, 9])],
    ),
    "begin_suppress_tokens": (
        {"begin_suppress_tokens": [2, 9]},
        lambda prompt: [transformers.SuppressTokensAtBeginLogitsProcessor([2, 9], prompt)],
    ),
    "logit_bias": (
        {"logit_bias": {1: 2.5, 4: -100.0}},
        lambda _: [transformers.SequenceBiasLogitsProcessor([[[1], 2.5], [[4], -100.0]])],
    ),
    "all": (
        {
            "logit_bias": {1: 2.5, 4: -1.0}, "repetition_penalty": 0.8, "no_repeat_ngram_size": 3,
            "bad_words_ids": BAD_WORDS, "min_new_tokens": 4, "suppress_tokens": [2], "begin_suppress_tokens": [9],
        },
        lambda prompt: [
            transformers.SequenceBiasLogitsProcessor([[[1], 2.5], [[4], -1.0]]),
            transformers.RepetitionPenaltyLogitsProcessor(0.8),
            transformers.NoRepeatNGramLogitsProcessor(3),
            transformers.NoBadWordsLogitsProcessor(BAD_WORDS, list(EOS)),
            transformers.MinNewTokensLengthLogitsProcessor(prompt, 4, list(EOS)),
            transformers.SuppressTokensLogitsProcessor([2]),
            transformers.SuppressTokensAtBeginLogitsProcessor([9], prompt),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name: str) -> None:
    """The boundaries that this sees: `<` and `<=` of min_new_tokens, the first token of a call, an n-gram at either
    end of the text, the sign of a logit, a single bad word that is an eos, and the order of the steps."""
    settings, processors = CASES[name]
    draw = random.Random(name)
    changed = 0
    for trial in range(150):
        logits = 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(trial))
        prompt, generated = draw.randrange(1, 25), draw.choice((0, 1, 2, 3, 4, 5))
        tokens = [draw.randrange(draw.choice((2, 5, VOCAB))) for _ in range(prompt + generated)]
        wanted = logits[None].clone()
        for processor in processors(prompt):
            wanted = processor(torch.tensor([tokens]), wanted)
        before = logits.clone()
        found = processed(logits, tokens, generated, **settings)
        torch.testing.assert_close(found, wanted[0])
        assert torch.equal(logits, before)
        changed += not torch.equal(found, logits)
    assert changed > 10


@pytest.mark.parametrize("last_n", [None, -1, 0, 1, 4, 30])
def test_presence_and_frequency_penalties_count_the_last_tokens(last_n: int | None) -> None:
    """OpenAI's definition: logit - count * frequency_penalty - (count > 0) * presence_penalty."""
    draw = random.Random(2)
    for trial in range(40):
        tokens = [draw.randrange(4) for _ in range(draw.randrange(40))]
        logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(trial))
        window = 9 if last_n in (None, -1) else last_n
        counts = Counter(tokens[-window:] if window else [])
        settings = {"presence_penalty": 0.7, "frequency_penalty": -0.3, "repeat_last_n": last_n}
        found = processed(logits, tokens, window=9, **settings)
        wanted = [float(x) - counts[i] * -0.3 - (counts[i] > 0) * 0.7 for i, x in enumerate(logits)]
        assert found.tolist() == pytest.approx(wanted, abs=1e-6)


def test_penalties_and_ngrams_forget_what_is_behind_the_last_n_tokens() -> None:
    logits = torch.ones(VOCAB)
    tokens = [8, 1, 2, 3, 4, 1, 2]
    assert processed(logits, tokens, repetition_penalty=2.0, repeat_last_n=6)[8] == 1
    assert processed(logits, tokens, repetition_penalty=2.0, repeat_last_n=7)[8] == 0.5
    assert processed(logits, tokens, no_repeat_ngram_size=3, repeat_last_n=6)[3] == -torch.inf
    assert processed(logits, tokens, no_repeat_ngram_size=3, repeat_last_n=5)[3] == 1
    assert torch.equal(processed(logits, tokens, no_repeat_ngram_size=1, repeat_last_n=0), logits)


def test_dry_subtracts_its_penalties() -> None:
    draw = random.Random(3)
    for trial in range(60):
        tokens = [draw.randrange(3) for _ in range(draw.randrange(60))]
        logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(trial))
        config = GenerationConfig(
            dry_multiplier=0.8,
            dry_base=1.5,
            dry_allowed_length=3,
            dry_penalty_last_n=draw.choice((None, 0, 12)),
        )
        sampler = Sampler(config, vocab_size=VOCAB, window=40, seed=0, breakers=[(2, 2), (1,)])
        window = 40 if config.dry_penalty_last_n is None else config.dry_penalty_last_n
        lengths = dry_lengths(tokens[-window:] if window else [], [(2, 2), (1,)], 3)
        wanted = logits.clone()
        for token, length in lengths.items():
            if token != 1:
                wanted[token] -= 0.8 * 1.5 ** (length - 3)
        found = apply_edits(logits[None], [sampler.edits(History(sampler.needs, tokens), 0)])[0]
        torch.testing.assert_close(found, wanted)


def test_dry_and_a_forbidden_token_together() -> None:
    tokens = [1, 2, 3, 1, 2]
    found = processed(torch.ones(VOCAB), tokens, dry_multiplier=1.0, no_repeat_ngram_size=3)
    assert found[3] == -torch.inf
    assert torch.isfinite(found).sum() == VOCAB - 1


def test_a_batch_of_edits_changes_each_row_as_alone() -> None:
    draw = random.Random(5)
    settings = [case for case, _ in CASES.values()] + [{}, {"dry_multiplier": 1.0, "frequency_penalty": 0.2}]
    logits = torch.randn(len(settings), VOCAB, generator=torch.Generator().manual_seed(5)).bfloat16()
    histories = [History(30, [draw.randrange(4) for _ in range(draw.randrange(40))]) for _ in settings]
    edits = [
        Sampler(GenerationConfig(eos=EOS, **each), vocab_size=VOCAB, window=30, seed=0).edits(history, 0)
        for each, history in zip(settings, histories, strict=True)
    ]
    together = apply_edits(logits, edits)
    assert together.dtype == torch.float32
    for row, edit in enumerate(edits):
        assert torch.equal(together[row], apply_edits(logits[row : row + 1], [edit])[0])
    assert torch.equal(apply_edits(logits, [edits[-2]] * len(edits)), logits.float())


@pytest.mark.parametrize(
    "settings",
    [
        {"logit_bias": {VOCAB: 1.0}},
        {"bad_words_ids": [[0, 99]]},
        {"suppress_tokens": [12]},
        {"begin_suppress_tokens": [12]},
    ],
    ids=str,
)
def test_tokens_outside_the_vocabulary_are_refused(settings) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(settings))} names token \d+, outside .* 0 … 11"):
        Sampler(GenerationConfig(**settings), vocab_size=VOCAB, window=8)


def test_a_sampler_knows_how_far_it_looks_back() -> None:
    def needs(**settings) -> int:
        return Sampler(GenerationConfig(**settings), vocab_size=VOCAB, window=8).needs

    assert needs() == 8
    assert needs(repeat_last_n=100, repetition_penalty=1.1) == 100
    assert needs(dry_multiplier=1.0, dry_penalty_last_n=50) == 50
    assert needs(bad_words_ids=[list(range(11))]) == 10
