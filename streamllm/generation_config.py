"""GenerationConfig: how the next token is chosen and where a text ends, by the call or by the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

from torch import nn

from streamllm.generation_checks import CHECKS
from streamllm.weights.config_reader import ConfigReader
from streamllm.weights.errors import UnsupportedConfig

# Keys of generation_config.json that would change the text and are not supported, with their values that have no
# effect; None: no value has one, because the key acts on beams only.
UNSUPPORTED_KEYS: dict[str, tuple[Any, ...] | None] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0, 0.0),
    "guidance_scale": (1, 1.0),
    "typical_p": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "encoder_repetition_penalty": (1, 1.0),
    "diversity_penalty": (0, 0.0),
    "length_penalty": None,
    "min_length": (0,),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "stop_strings": ([],),
    "watermarking_config": (),
    "dola_layers": (),
}
# Keys of generation_config.json that mean the same as the fields of this name.
HONOURED_KEYS = (
    "no_repeat_ngram_size", "bad_words_ids", "min_new_tokens", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip
TRANSFORMERS_TOP_K = 50  # its default where do_sample is true and top_k is absent


class SamplingSettings(TypedDict, total=False):
    """The keyword arguments of every call that generates; see `GenerationConfig`. None: the checkpoint's."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repeat_last_n: int | None
    no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    min_new_tokens: int | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    logit_bias: Mapping[int, float] | None
    dry_multiplier: float | None
    dry_base: float | None
    dry_allowed_length: int | None
    dry_penalty_last_n: int | None
    dry_sequence_breakers: Sequence[str | Sequence[int]] | None
    eos: Sequence[int] | int | None


@dataclass(frozen=True)
class GenerationConfig:
    """How to choose the next token, and where to end. The defaults are greedy, without an end.

    temperature: 0 takes the likeliest token; otherwise logits are divided by it. top_k: sample from the k
    likeliest tokens, 0 from all. top_p: from the smallest set with that probability (arXiv 1904.09751).
    min_p: from the tokens with at least that share of the likeliest one's probability (arXiv 2407.01082).
    repetition_penalty: logits of tokens that the stream has seen are divided by it, or multiplied where
    negative (arXiv 1909.05858). eos: ids of the tokens that end a text.

    Settings against repetition look at the last tokens of the stream, whoever wrote them:
    repeat_last_n: how many tokens repetition_penalty, presence_penalty, frequency_penalty and no_repeat_ngram_size
    look back; None or -1: the window, 0: none, which switches them off. presence_penalty: subtracted from the
    logits of tokens that occurred; frequency_penalty: subtracted once for each time that a token occurred.
    no_repeat_ngram_size: no n-gram of this length occurs twice; 0: off. dry_multiplier: above 0, a token that would
    continue a repetition of n tokens loses dry_multiplier * dry_base ** (n - dry_allowed_length), if n is at least
    dry_allowed_length (DRY, oobabooga/textgen#5677). dry_penalty_last_n: how far it looks, as repeat_last_n.
    dry_sequence_breakers: strings, or lists of token ids, that interrupt a repetition; None: line breaks, colons,
    double quotes and asterisks in a `Stream`, and nothing in `generate`, which has no tokenizer.

    logit_bias: by token id, a number that is added to its logit; -inf forbids the token. bad_words_ids: sequences
    of token ids that are never completed. suppress_tokens: ids that are never generated; begin_suppress_tokens:
    not as the first token of a call. min_new_tokens: a call generates no eos before so many tokens.

    Raises ValueError for a setting outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int | None = None
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()  # a mapping may be given
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: tuple[str | tuple[int, ...], ...] | None = None
    eos: tuple[int, ...] = ()
    unsupported: tuple[
        str, ...
    ] = ()  # what generation_config.json asks for and this library does not support

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
        for name, check in CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))

    def override(self, **given: Any) -> GenerationConfig:
        """This config with those of the given values that are not None.

        Giving top_k, top_p or min_p switches sampling on, at temperature 1, where this config is greedy. Raises
        TypeError for a name that is not a setting.
        """
        given = {name: value for name, value in given.items() if value is not None}
        known = {field.name for field in fields(self)}
        if unknown := sorted(set(given) - known):
            settings = ", ".join(sorted(SamplingSettings.__annotations__))
            raise TypeError(f"{unknown[0]} is not a setting of generation; the settings are {settings}")
        if "eos" in given:
            eos = given["eos"]
            given["eos"] = (eos,) if isinstance(eos, int) else tuple(eos)
        samples = self.temperature > 0 or "temperature" in given
        if not samples and {"top_k", "top_p", "min_p"} & set(given):
            given["temperature"] = 1.0
        return replace(self, **given)


def read_generation_config(
    values: Mapping[str, Any], where: str = "generation_config.json"
) -> GenerationConfig:
    """The config that generation_config.json asks for.

    An unsupported key is not an error here, because the model may be used without generating; `generate`
    refuses it. Raises UnsupportedConfig for a value of the wrong type.
    """
    config = ConfigReader(values, where)
    samples = config.flag("do_sample", False)
    eos = config.get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in eos):
        raise config.wrong("eos_token_id", eos, "a token id or a list of them")
    unsupported = tuple(
        f"{name}={values[name]!r}"
        for name, harmless in UNSUPPORTED_KEYS.items()
        if harmless is not None and values.get(name) is not None and values[name] not in harmless
    )
    try:
        return GenerationConfig(
            temperature=config.number("temperature", 1.0) if samples else 0.0,
            top_k=config.size("top_k", TRANSFORMERS_TOP_K, 0) if samples else 0,
            top_p=config.number("top_p", 1.0) if samples else 1.0,
            min_p=config.number("min_p", 0.0) if samples else 0.0,
            repetition_penalty=config.number("repetition_penalty", 1.0),
            **{name: config.get(name) for name in HONOURED_KEYS if values.get(name) is not None},
            eos=tuple(eos),
            unsupported=unsupported,
        )
    except ValueError as error:
        raise UnsupportedConfig(f"{where}: {error}") from None


def attach(model: nn.Module, config: GenerationConfig) -> None:
    """Store the checkpoint's config on its model, as `model.generation_config`."""
    setattr(model, "generation_config", config)  # noqa: B010  # nn.Module declares tensors and modules only


def attached(model: nn.Module) -> GenerationConfig:
    """The config of the model's checkpoint; the defaults for a model without one."""
    found = getattr(model, "generation_config", None)
    return found if isinstance(found, GenerationConfig) else GenerationConfig()


def resolve(
    model: nn.Module, config: GenerationConfig | None, settings: Mapping[str, Any]
) -> GenerationConfig:
    """The call's settings, over the config (None: the checkpoint's), over the defaults.

    Raises UnsupportedConfig where the config asks for what is not supported.
    """
    if config is None:
        config = attached(model)
    if config.unsupported:
        raise UnsupportedConfig(
            f"generation_config.json asks for {', '.join(config.unsupported)}, which is not supported; "
            f"pass a generation_config of your own to generate without it"
        )
    return config.override(**settings)
