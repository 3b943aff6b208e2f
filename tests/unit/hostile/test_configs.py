"""Values of config.json that are wrong or not supported."""

import json
from typing import Any

import pytest

from streamllm.weights.checkpoint.checkpoint import read_config
from streamllm.weights.config_reader import ConfigReader
from streamllm.weights.errors import UnsupportedConfig
from tests.tiny import CONFIG
from tests.unit.hostile.samples import INTACT, build, check_refused, load_and_run, with_config

HUGE = 10**400  # larger than any float

# Changes of config.json, and the error: UnsupportedConfig with key and value, or CheckpointError if the
# config does not fit the files.
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no model_type": ({"model_type": None}, "model_type is None; supported: .*llama"),
    "model_type is a list": ({"model_type": ["llama"]}, "model_type is"),
    "unknown model_type": ({"model_type": "gptj"}, "model_type is 'gptj'; supported"),
    "a quantised checkpoint": ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "a billion layers of a Mistral": (
        {"model_type": "mistral", "num_hidden_layers": 10**9},
        "num_hidden_layers is 1000000000; supported",
    ),
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; supported"),
    "a thousand layers": ({"num_hidden_layers": 1000}, "1000 layers, but the files hold only 21 tensors"),
    "half a layer": ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
    "layers as text": ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
    "layers as a boolean": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "width of 2^62": ({"hidden_size": 2**62}, "hidden_size is"),
    "width below zero": ({"hidden_size": -16}, "hidden_size is -16"),
    "width of infinity": ({"hidden_size": float("inf")}, "hidden_size is inf"),
    "sizes that overflow": (
        {"hidden_size": 2**30, "head_dim": 2**30},
        "no model can have its sizes|has the shape",
    ),
    "a vocabulary of 2^31 - 1": ({"vocab_size": 2**31 - 1}, "has the shape"),
    "heads that do not divide": ({"num_attention_heads": 3}, "num_attention_heads is 3"),
    "key heads that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "an odd width of heads": ({"head_dim": 3}, "head_dim is 3"),
    "eps below zero": ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
    "eps is NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "eps of 10^400": ({"rms_norm_eps": HUGE}, "rms_norm_eps is 1000"),
    "theta is 0": ({"rope_theta": 0}, "rope_theta is 0"),
    "theta of 10^400": ({"rope_theta": HUGE}, "rope_theta is 1000"),
    "unknown activation": ({"hidden_act": "swiglu"}, "hidden_act is 'swiglu'"),
    "activation is a list": ({"hidden_act": ["silu"]}, "hidden_act is"),
    "unknown dtype": ({"torch_dtype": "float3"}, "torch_dtype is 'float3'"),
    "scaling is text": ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
    "unknown scaling": ({"rope_scaling": {"type": "magic"}}, "type is 'magic'"),
    "scaling by 0": ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
    "scaling by 10^400": ({"rope_scaling": {"type": "linear", "factor": HUGE}}, "factor is 1000"),
    "too few divisors": ({"rope_scaling": {"type": "longrope", "short_factor": [1]}}, "short_factor is"),
    "layer types are lists": (
        {"model_type": "qwen2", "layer_types": [["full_attention"]] * 2},
        "layer_types is",
    ),
    "divisors of 0": ({"rope_scaling": {"type": "longrope", "short_factor": [0] * 2}}, "short_factor is"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_wrong_values(tmp_path, case):
    check_refused(tmp_path, with_config(**CONFIGS[case][0]), CONFIGS[case][1])


def test_values_nested_as_deeply_as_json_allows(tmp_path):
    """At some depth, Python can still parse a value but not print it."""
    text = json.dumps(CONFIG | {"head_dim": "HERE"}).replace('"HERE"', "%s")
    for depth in range(800, 1000):
        value = "[" * depth + "]" * depth
        files = INTACT | {"config.json": (text % value).encode()}
        check_refused(
            tmp_path / str(depth), files, r"head_dim is (\[|a deeply nested list)|nested too deeply"
        )


def test_rope_types_without_a_required_key_are_refused(tmp_path):
    """transformers refuses them too. Each type has its own keys."""
    complete = {
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 2.0},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "yarn": {"factor": None},
        "longrope": {"short_factor": [1.0] * 2, "long_factor": [1.0] * 2},
    }
    for kind, keys in complete.items():
        scaling = {"rope_type": kind, **keys}
        load_and_run(build(tmp_path / kind, with_config(rope_scaling=scaling)))
        for name in keys:
            less = {key: value for key, value in scaling.items() if key != name}
            files = with_config(rope_scaling=less)
            pattern = f"has no {name}, and rope_type {kind} needs it|{name} is None"
            check_refused(tmp_path / f"{kind}-{name}", files, pattern)


# Values that made a number or a tensor overflow.
OVERFLOWS: dict[str, tuple[dict[str, Any], str]] = {
    "factor": ({"rope_scaling": {"type": "linear", "factor": 1e308}}, "factor is 1e.308"),
    "factor of dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 1e308}}, "factor is 1e.308"),
    "factor of yarn": ({"rope_scaling": {"type": "yarn", "factor": 1e308}}, "factor is 1e.308"),
    "beta_fast": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 1e308}},
        "beta_fast is 1e.308",
    ),
    "beta_slow": ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_slow": 1e-320}}, "beta_fast is 32"),
    "mscale": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1e308, "mscale_all_dim": 1e308}},
        "mscale is 1e.308",
    ),
    "attention_factor": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 1e308}},
        "attention_factor is 1e.308",
    ),
    "small factor": ({"rope_scaling": {"type": "linear", "factor": 1e-300}}, "factor is 1e-300"),
    "rope_theta": ({"rope_theta": 1e308}, r"config\.json of .*: rope_theta is 1e.308"),
    "small rope_theta": ({"rope_theta": 1e-300}, r"config\.json of .*: rope_theta is 1e-300"),
}


@pytest.mark.parametrize("case", OVERFLOWS)
def test_values_that_overflow(tmp_path, case):
    check_refused(tmp_path, with_config(**OVERFLOWS[case][0]), OVERFLOWS[case][1])


@pytest.mark.parametrize("value", [1e308, -1e308, 5, -1])
def test_share_of_rotary_dimensions_of_gpt_neox(value):
    values = {"model_type": "gpt_neox", "rotary_pct": value}
    with pytest.raises(UnsupportedConfig, match="rotary_pct is"):
        read_config(ConfigReader(values))


@pytest.mark.parametrize("name", ["clip_qkv", "softmax_scale", "alibi_bias_max"])
def test_large_numbers_of_mpt(name):
    values = {"model_type": "mpt", "attn_config": {"alibi": True, name: 1e308}}
    with pytest.raises(UnsupportedConfig, match=f"{name} is 1e"):
        read_config(ConfigReader(values))
