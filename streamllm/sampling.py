"""From logits to the next token: pure functions, an explicit generator, and what a checkpoint asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from streamllm.weights.config_reader import ConfigReader
from streamllm.weights.errors import UnsupportedConfig

# Keys of generation_config.json that would change what is said, with the values that do nothing.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0, 0.0),
    "guidance_scale": (1, 1.0),
    "typical_p": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "encoder_repetition_penalty": (1, 1.0),
    "no_repeat_ngram_size": (0,),
    "diversity_penalty": (0, 0.0),
    "length_penalty": None,  # type: ignore[dict-item]  # acts on beams alone
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "stop_strings": ([],),
    "watermarking_config": (),
    "dola_layers": (),
}


@dataclass(frozen=True)
class GenerationConfig:
    """How to choose the next token, and where to end. The defaults are greedy, and end nowhere.

    temperature: 0 takes the likeliest token; else logits are divided by it. top_k: of the likeliest tokens,
    0 for all. top_p: of the smallest set with that probability (arXiv 1904.09751). min_p: of those with at
    least that share of the likeliest one's probability (arXiv 2407.01082). repetition_penalty: scores of
    tokens that were there before are divided by it, or multiplied where negative (arXiv 1909.05858).
    eos: the ids of tokens that end a text.

    Raises ValueError for a number outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos: tuple[int, ...] = ()
    unsupported: tuple[str, ...] = ()  # what generation_config.json asks for and is not done here

    def __post_init__(self) -> None:
        for name, fits, allowed in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "0 (all) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "in 0 … 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {allowed}, not {getattr(self, name)}")

    def override(self, **given: Any) -> GenerationConfig:
        """This, with those of the given values that are not None.

        A temperature, top_k, top_p or min_p that is given where nothing was sampled switches sampling on.
        """
        given = {name: value for name, value in given.items() if value is not None}
        unknown = set(given) - {field.name for field in fields(self)}
        assert not unknown, unknown
        sampled = self.temperature > 0 or "temperature" in given
        if not sampled and {"top_k", "top_p", "min_p"} & set(given):
            given["temperature"] = 1.0
        return replace(self, **given)


def read_generation_config(
    values: Mapping[str, Any], where: str = "generation_config.json"
) -> GenerationConfig:
    """generation_config.json -> what it asks for.

    What cannot be done here is not an error yet: the model may be used otherwise. `generate` refuses it.
    Raises UnsupportedConfig for a value of the wrong type.
    """
    keys = ConfigReader(values, where)
    sampled = keys.flag("do_sample", False)
    eos = keys.get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in eos):
        raise keys.wrong("eos_token_id", eos, "a token id or a list of them")
    unsupported = tuple(
        f"{name}={values[name]!r}"
        for name, harmless in WITHOUT_EFFECT.items()
        if harmless is not None and values.get(name) is not None and values[name] not in harmless
    )
    try:
        return GenerationConfig(
            temperature=keys.number("temperature", 1.0) if sampled else 0.0,
            top_k=keys.size("top_k", 50, 0) if sampled else 0,  # transformers' default
            top_p=keys.number("top_p", 1.0) if sampled else 1.0,
            min_p=keys.number("min_p", 0.0) if sampled else 0.0,
            repetition_penalty=keys.number("repetition_penalty", 1.0),
            eos=tuple(eos),
            unsupported=unsupported,
        )
    except ValueError as error:
        raise UnsupportedConfig(f"{where}: {error}") from None


def attach(model: nn.Module, config: GenerationConfig) -> None:
    """Let a model carry what its checkpoint asks for, as `model.generation_config`."""
    setattr(model, "generation_config", config)  # noqa: B010  # nn.Module declares tensors and modules only


def attached(model: nn.Module) -> GenerationConfig:
    """What the model's checkpoint asks for; the defaults for a model that no checkpoint was loaded into."""
    found = getattr(model, "generation_config", None)
    return found if isinstance(found, GenerationConfig) else GenerationConfig()


def next_token(
    logits: Tensor, config: GenerationConfig, generator: torch.Generator | None, said: Tensor | None = None
) -> int:
    """One token from logits [V]. `said`, bool [V], marks those that the repetition penalty is for.

    Raises ValueError where a logit is no number, which a model out of its precision gives.
    """
    if logits.device.type != "cpu":  # where a look at the numbers costs more than it can spare
        token, best = choose(logits, config, generator, said)
        check_finite(float(best))
        return int(token)
    scores = _penalised(logits, config, said)
    top, first = scores.max(-1)
    check_finite(float(top))
    if config.temperature == 0:
        return int(first)
    # the difference, because a small temperature would make infinities of the scores themselves
    scores, tokens = _likeliest((scores - top) / config.temperature, config)
    return int(tokens[_drawn(scores, generator)])


def choose(
    logits: Tensor, config: GenerationConfig, generator: torch.Generator | None, said: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `next_token`, but the token stays on its device, int64 [1], and nothing waits for it.

    With it comes the best logit, [1], for `check_finite`: where it is no number, the token means nothing.
    """
    scores = _penalised(logits, config, said)
    best, token = scores.max(-1, keepdim=True)
    if config.temperature == 0:
        return token, best
    scores = (scores - best) / config.temperature
    if not config.top_k and config.top_p == 1 and not config.min_p:
        return _drawn(scores, generator), best
    # As `_likeliest`, but what is left out keeps its place: how many are left is not known here.
    scores, tokens = scores.sort(descending=True, stable=True)
    if config.top_k:
        worst = scores[min(config.top_k, len(scores)) - 1]
        scores = scores.masked_fill(scores < worst, -torch.inf)
    shares = scores.softmax(-1)
    fits = shares.cumsum(-1) - shares < config.top_p if config.top_p < 1 else shares >= 0
    if config.min_p:
        fits = fits & (shares >= config.min_p * shares[0])
    return tokens.gather(0, _drawn(scores.masked_fill(~fits, -torch.inf), generator)), best


def check_finite(best: float) -> None:
    """Raises ValueError where the best logit is no number."""
    if not math.isfinite(best):
        raise ValueError(
            f"the model's logits are not finite ({best:g}): in float16 take bfloat16 or float32 instead; "
            f"else its weights are damaged"
        )


def _penalised(logits: Tensor, config: GenerationConfig, said: Tensor | None) -> Tensor:
    scores = logits.float()
    if said is None or config.repetition_penalty == 1.0:
        return scores
    penalty = config.repetition_penalty
    return torch.where(said, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _drawn(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """Which of the scores, of which the best is 0, one number of chance falls on: int64 [1].

    Scores of -inf behind the others change nothing, and a vocabulary costs no more chance than a few tokens.
    """
    wide = torch.float32 if scores.device.type == "mps" else torch.float64  # MPS has no more
    reached = scores.to(wide).exp().cumsum(-1)
    chance = torch.rand(1, generator=generator, dtype=wide, device=scores.device)
    rank = torch.searchsorted(reached, chance * reached[-1], right=True)
    return rank.clamp(
        max=len(scores) - 1
    )  # acts where scores are no numbers: a token there must be, to be fed


def _likeliest(scores: Tensor, config: GenerationConfig) -> tuple[Tensor, Tensor]:
    """The scores that top-k, top-p and min-p leave, in this order, and their tokens; the best come first."""
    if not config.top_k and config.top_p == 1 and not config.min_p:
        return scores, torch.arange(len(scores), device=scores.device)
    if config.top_k:
        worst = scores.topk(min(config.top_k, len(scores))).values[-1]
        tokens = (scores >= worst).nonzero().squeeze(-1)  # with all that tie with the k-th
        kept, order = scores[tokens].sort(descending=True, stable=True)
        tokens, shares = tokens[order], kept.softmax(-1)
    else:  # nearly always a few hundred hold all the probability that is asked for: spare the full sort
        kept, tokens = scores.topk(min(256, len(scores)))
        shares = (kept - scores.logsumexp(-1)).exp()
        enough = config.top_p < 1 and shares.sum() >= config.top_p
        if not (enough or (config.top_p == 1 and shares[-1] < config.min_p * shares[0])):
            kept, tokens = scores.sort(descending=True)
            shares = kept.softmax(-1)
    if config.top_p < 1:
        before = shares.cumsum(-1) - shares
        fits = before < config.top_p
        kept, tokens, shares = kept[fits], tokens[fits], shares[fits]
    if config.min_p:
        fits = shares >= config.min_p * shares[0]
        kept, tokens = kept[fits], tokens[fits]
    return kept, tokens
