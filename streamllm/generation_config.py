"""GenerationConfig: how the next token is chosen and where a text ends, by the call or by the checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict

from streamllm.generation_checks import CHECKS
from streamllm.weights.config_reader import ConfigReader
from streamllm.weights.errors import UnsupportedConfig

if TYPE_CHECKING:
    from torch import nn

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
SAMPLING_OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # values that keep all tokens
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

    Of two values for one setting the first of these counts, as in transformers: that of the call; of the config
    that the call is given; of the checkpoint's generation_config.json, or of config.json where that file is missing;
    the default. A config gives only the settings that it was made with. `unsupported` is an exception: a config that
    is given replaces the checkpoint's.

    Raises ValueError for a setting outside its range or of another type.
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

    # Of an instance: the settings that it was made with; of a greedy checkpoint's, the settings of calls that sample.
    _given = frozenset[str]()
    _if_sampling = dict[str, Any]()  # noqa: RUF012  # never changed

    if not TYPE_CHECKING:

        def __new__(cls, *values: Any, **settings: Any) -> GenerationConfig:
            self = super().__new__(cls)
            names = [field.name for field in fields(cls)][: len(values)]
            object.__setattr__(self, "_given", frozenset((*names, *settings)))
            object.__setattr__(self, "_if_sampling", {})
            return self

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))

    def override(self, **given: Any) -> GenerationConfig:
        """This config with those of the given values that are not None.

        Where this config is greedy, a top_k above 0, a top_p below 1 or a min_p above 0 switches sampling on, at
        temperature 1. Raises TypeError for a name that is not a setting, ValueError for a value out of range.
        """
        given = {name: value for name, value in given.items() if value is not None}
        known = SamplingSettings.__annotations__
        if unknown := sorted(set(given) - set(known)):
            settings = ", ".join(sorted(known))
            raise TypeError(f"{unknown[0]} is not a setting of generation; the settings are {settings}")
        result = self._with(given)
        if self.temperature > 0 or ("temperature" in given and result.temperature == 0):
            return result
        cuts = any(name in given and getattr(result, name) != off for name, off in SAMPLING_OFF.items())
        if result.temperature == 0 and not cuts:
            return result
        return self._with({"temperature": 1.0, **self._if_sampling, **given})

    def _with_config(self, config: GenerationConfig) -> GenerationConfig:
        """This config with the settings that another was made with, and what that one says to be unsupported."""
        given = {name: getattr(config, name) for name in config._given}
        return self._with({**given, "unsupported": config.unsupported})

    def _with(self, given: Mapping[str, Any]) -> GenerationConfig:
        result = replace(self, **given)
        object.__setattr__(result, "_given", self._given | set(given))
        object.__setattr__(result, "_if_sampling", self._if_sampling)
        return result


_init = inspect.signature(GenerationConfig.__init__)
# `__new__` would hide the settings from help() and editors.
setattr(  # noqa: B010  # a class declares no such attribute
    GenerationConfig,
    "__signature__",
    _init.replace(parameters=list(_init.parameters.values())[1:]),
)


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
    sampling: dict[str, Any] = {
        "temperature": config.number("temperature", 1.0),
        "top_k": config.size("top_k", TRANSFORMERS_TOP_K, 0),
        "top_p": config.number("top_p", 1.0),
        "min_p": config.number("min_p", 0.0),
    }
    try:
        found = GenerationConfig(
            **(sampling if samples else {}),
            repetition_penalty=config.number("repetition_penalty", 1.0),
            **{name: config.get(name) for name in HONOURED_KEYS if values.get(name) is not None},
            eos=tuple(eos),
            unsupported=unsupported,
        )
    except ValueError as error:
        raise UnsupportedConfig(f"{where}: {error}") from None
    if not samples:
        named = {name: value for name, value in sampling.items() if values.get(name) is not None}
        object.__setattr__(found, "_if_sampling", named)
    return found


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
    """The call's settings, over those of the given config, over the checkpoint's, over the defaults.

    Raises UnsupportedConfig where the config asks for what is not supported.
    """
    given = config
    config = attached(model)
    if given is not None:
        if not isinstance(given, GenerationConfig):
            raise TypeError(
                f"generation_config must be a GenerationConfig or None, not {type(given).__name__}"
            )
        config = config._with_config(given)
    if config.unsupported:
        raise UnsupportedConfig(
            f"generation_config.json asks for {', '.join(config.unsupported)}, which is not supported; "
            f"pass a generation_config of your own to generate without it"
        )
    return config.override(**settings)
