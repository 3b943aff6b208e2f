"""The settings against repetition, and those that are lists: errors, and generation_config.json."""

from __future__ import annotations

import math

import pytest

from streamllm.generation_config import GenerationConfig, SamplingSettings, read_generation_config
from streamllm.weights.errors import UnsupportedConfig

WRONG = {
    "presence_penalty": [math.inf, math.nan, "high", True],
    "frequency_penalty": [-math.inf, "high"],
    "repeat_last_n": [-2, 1.5, "all", True],
    "no_repeat_ngram_size": [-1, 2.0, True],
    "bad_words_ids": [[1, 2], [[]], [[1], [-1]], [["a"]], "abc", 5],
    "min_new_tokens": [-1, 1.5],
    "suppress_tokens": [5, [-1], ["a"], [[1]], [True]],
    "begin_suppress_tokens": [5, [1.0]],
    "logit_bias": [{1: math.inf}, {1: math.nan}, {1: "a"}, {"1": 2.0}, {-1: 2.0}, 5, [1, 2]],
    "dry_multiplier": [-0.1, math.inf, math.nan],
    "dry_base": [0.99, math.inf],
    "dry_allowed_length": [0, 2.5],
    "dry_penalty_last_n": [-2, 0.5],
    "dry_sequence_breakers": ["\n", [""], [[]], [[-1]], [5]],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be .*, not "):
        GenerationConfig(**{name: value})
    with pytest.raises(ValueError, match=f"^{name} must be "):
        GenerationConfig().override(**{name: value})


def test_lists_become_tuples_and_configs_stay_hashable() -> None:
    config = GenerationConfig().override(
        bad_words_ids=[[1, 2], [3]], suppress_tokens=[1], begin_suppress_tokens=(), logit_bias={7: 1, 2: -math.inf},
        dry_sequence_breakers=["\n", [4, 5]], repeat_last_n=-1, dry_penalty_last_n=0,
    )  # fmt: skip
    assert config.bad_words_ids == ((1, 2), (3,))
    assert config.logit_bias == ((2, -math.inf), (7, 1.0))
    assert config.dry_sequence_breakers == ("\n", (4, 5))
    assert hash(config) == hash(config.override())
    assert config.override() == config
    assert config.temperature == 0, "these settings leave greedy decoding greedy"


def test_every_setting_is_a_field() -> None:
    fields = set(GenerationConfig.__dataclass_fields__) - {"unsupported"}
    assert set(SamplingSettings.__annotations__) == fields


def test_generation_config_json_may_ask_for_them() -> None:
    values = {
        "no_repeat_ngram_size": 3, "bad_words_ids": [[5], [6, 7]], "min_new_tokens": 2, "suppress_tokens": [1],
        "begin_suppress_tokens": [220, 50256],
    }  # fmt: skip
    assert read_generation_config(values) == GenerationConfig(
        no_repeat_ngram_size=3,
        bad_words_ids=((5,), (6, 7)),
        min_new_tokens=2,
        suppress_tokens=(1,),
        begin_suppress_tokens=(220, 50256),
    )
    assert read_generation_config(dict.fromkeys(values)) == GenerationConfig()
    for name in values:
        with pytest.raises(UnsupportedConfig, match=rf"generation_config\.json.*{name}"):
            read_generation_config({name: "wrong"})
