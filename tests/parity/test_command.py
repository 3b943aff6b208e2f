"""streamllm parity: correct checkpoints pass, and a fault is found in the module that has it."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamllm
import streamllm.cache
from streamllm.cache import rolling_cache
from streamllm.cli import main
from streamllm.models.step import Plan
from streamllm.parity import compare, compare_streaming, logits
from streamllm.parity.hooks import hooked
from tests.checkpoints import Tensors, Variant, make, respell
from tests.parity.cases import Case
from tests.parity.grid import LLAMA

# one of each family, with every tensor in one file
FAMILIES = [
    "llama-gqa",
    "gpt_neox-pythia",
    "falcon-7b",
    "falcon-40b-biased",
    "mpt-7b",
    "mistral-v0.3",
    "qwen3-8b",
]
TOKENS = 70


@pytest.fixture
def made(cases: Callable[[str], Case]) -> Callable[[str], Path]:
    """Returns the folder of a variant of the grid."""
    return lambda name: cases(name).theirs


def broken(good: Path, folder: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy with changed tensors, which this library reads."""
    shutil.copytree(good, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def swap(one: str, other: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        assert tensors[one].shape == tensors[other].shape
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return change


def scale(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            tensors[name] = tensors[name] * 1.1

    return change


def run(capsys, *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["parity", *map(str, args)])
    return end.value.code, *capsys.readouterr()


def test_a_correct_checkpoint_passes(made, capsys) -> None:
    code, out, err = run(capsys, made("llama-gqa"), "--tokens", TOKENS, "--streaming")
    assert code == 0
    assert re.search(r"^against +transformers [\d.]+ \(sdpa\), float32, cpu$", out, re.MULTILINE)
    assert len(re.findall(r"max ≤ 5.0e-05 +ok$", out, re.MULTILINE)) == 3
    assert len(re.findall(r"max ≤ 1.0e-09 +ok$", out, re.MULTILINE)) == 4
    assert "DIFFERS" not in out
    assert out.endswith("the same: you can trust this checkpoint here\n")
    assert max(map(len, out.splitlines())) <= 100
    assert "running it in transformers" in err


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes(made, name: str) -> None:
    assert compare(made(name), tokens=TOKENS).passed
    assert compare_streaming(made(name)).passed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_limit_of_a_half_type_is_its_own_rounding(made, dtype: str) -> None:
    report = compare(made("llama-gqa"), tokens=TOKENS, dtype=dtype)
    assert report.passed
    assert all(row.by_mean and 1e-4 < row.limit < 1e-1 for row in report.rows if row.limit is not None)


def test_frequencies_that_depend_on_the_length_are_compared_at_each_length(made) -> None:
    assert compare(made("llama-dynamic-grown"), tokens=300).passed


L = "model.layers"
BROKEN = {
    "swapped k and v": (
        "llama-gqa", swap(f"{L}.2.self_attn.k_proj.weight", f"{L}.2.self_attn.v_proj.weight"),
        ("layers.2.attention", "model.layers.2.self_attn"),
        ["layers.2.attention.k", "layers.2.attention.v"],
        [f"{L}.2.self_attn.k_proj.weight", f"{L}.2.self_attn.v_proj.weight"],
    ),
    "swapped gate and up": (
        "llama-gqa", swap(f"{L}.1.mlp.gate_proj.weight", f"{L}.1.mlp.up_proj.weight"),
        ("layers.1.mlp", "model.layers.1.mlp"), ["layers.1.mlp.gate", "layers.1.mlp.up"],
        [f"{L}.1.mlp.gate_proj.weight", f"{L}.1.mlp.up_proj.weight"],
    ),
    "swapped layers": (
        "mistral-v0.3", swap(f"{L}.1.mlp.down_proj.weight", f"{L}.2.mlp.down_proj.weight"),
        ("layers.1.mlp", "model.layers.1.mlp"), ["layers.1.mlp.down"], [f"{L}.1.mlp.down_proj.weight"],
    ),
    "scaled norm": (
        "llama-gqa", scale(f"{L}.0.input_layernorm.weight"), ("layers.0", "model.layers.0"),
        ["layers.0.attention_norm"], [f"{L}.0.input_layernorm.weight"],
    ),
    "scaled norm of keys": (
        "qwen3-8b", scale(f"{L}.1.self_attn.k_norm.weight"),
        ("layers.1.attention", "model.layers.1.self_attn"), ["layers.1.attention.k_norm"],
        [f"{L}.1.self_attn.k_norm.weight"],
    ),
    "scaled last norm": (
        "llama-gqa", scale("model.norm.weight"), ("norm", "model.norm"), [], ["model.norm.weight"],
    ),
    "scaled head": ("llama-gqa", scale("lm_head.weight"), ("head", "lm_head"), [], ["lm_head.weight"]),
    "head with two names": (
        "gpt_neox-pythia", scale("embed_out.weight"), ("head", "lm_head"), [], ["embed_out.weight"],
    ),
    "scaled embedding": (
        "mpt-7b", scale("transformer.wte.weight"), ("embed", "transformer.wte"), [],
        ["transformer.wte.weight"],
    ),
    "fused": (
        "gpt_neox-pythia",
        swap("gpt_neox.layers.0.attention.dense.weight", "gpt_neox.layers.1.attention.dense.weight"),
        ("layers.0.attention", "gpt_neox.layers.0.attention"), ["layers.0.attention.o"],
        ["gpt_neox.layers.0.attention.dense.bias", "gpt_neox.layers.0.attention.dense.weight"],
    ),
    "rows of the keys in a fused tensor": (
        "mpt-7b", lambda tensors: tensors["transformer.blocks.2.attn.Wqkv.weight"][70].mul_(2),
        ("layers.2.attention", "transformer.blocks.2.attn"), ["layers.2.attention.k"],
        ["transformer.blocks.2.attn.Wqkv.weight"],
    ),
    "one of two norms with the same input": (
        "falcon-40b-biased", scale("transformer.h.1.ln_mlp.weight"), ("layers.1", "transformer.h.1"),
        ["layers.1.mlp_norm"], ["transformer.h.1.ln_mlp.bias", "transformer.h.1.ln_mlp.weight"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_changed_tensor_is_found(made, tmp_path: Path, fault: str) -> None:
    name, change, module, parts, tensors = BROKEN[fault]
    report = compare(broken(made(name), tmp_path / "broken", change), made(name), tokens=TOKENS)
    assert not report.passed
    found = report.difference
    assert (found.ours, found.theirs) == module
    assert [ours for ours, _ in found.parts] == parts
    assert sorted(stored.name for stored in found.tensors) == tensors
    assert found.before < 1e-4 < found.after


MISREAD = {
    "rotation": ({"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}}, "layers.0.attention"),
    "activation": ({"hidden_act": "gelu"}, "layers.0.mlp"),
    "constant of the norms": ({"rms_norm_eps": 0.1}, "layers.0"),
}


@pytest.mark.parametrize("fault", MISREAD)
def test_a_wrong_reading_of_the_config_is_found_in_the_module_that_it_changes(
    made, tmp_path: Path, fault: str
) -> None:
    changes, where = MISREAD[fault]
    shutil.copytree(made("llama-gqa"), tmp_path / "misread")
    respell(tmp_path / "misread", changes)
    report = compare(tmp_path / "misread", made("llama-gqa"), tokens=TOKENS)
    assert not report.passed
    assert report.difference.ours == where


def test_the_difference_is_printed_and_the_exit_code_is_1(made, tmp_path: Path, capsys, monkeypatch) -> None:
    good, change = made("llama-gqa"), BROKEN["swapped k and v"][1]
    folder = broken(good, tmp_path / "broken", change)
    arguments = logits.transformers_arguments
    monkeypatch.setattr(logits, "transformers_arguments", lambda source, _: arguments(source, good))
    code, out, _ = run(capsys, folder, "--tokens", TOKENS)
    assert code == 1
    assert out.count("DIFFERS") == 3
    for line in (
        r"the first difference is in layer 2: \S+ before it, \S+ after",
        r"  layers.2.attention    model.layers.2.self_attn",
        r"  layers.2.attention.k  model.layers.2.self_attn.k_proj",
        r"  model.layers.2.self_attn.v_proj.weight \[32, 64\] F32 in model.safetensors",
        "NOT the same: please report it",
    ):
        assert re.search(f"^{line}$", out, re.MULTILINE)


def test_where_transformers_ignores_a_key_both_readings_are_shown(made) -> None:
    report = compare(made("mpt-storywriter"), tokens=TOKENS)
    assert report.passed
    assert any("bias_max is 16" in note and "8.0 in transformers" in note for note in report.notes)
    assert [row.limit is None for row in report.rows] == [False, False, True, True]
    assert report.rows[2].maximum > 1e-2


def test_a_config_that_is_refused_here_does_not_pass(made, capsys) -> None:
    code, out, _ = run(capsys, made("mpt-no-alibi"), "--tokens", TOKENS, "--streaming")
    assert code == 1
    assert re.search(r"as the config says: refused, .*alibi is False", out)
    assert out.count(" ok\n") == 2
    assert "refused: this library does not support what transformers ignores in this config" in out


# Streaming: each of these faults is found


def test_eviction_one_token_too_early_is_found(made, monkeypatch) -> None:
    for name in ("llama-gqa", "mpt-7b"):
        for plan in (rolling_cache.plan_token, rolling_cache.plan_chunk):
            monkeypatch.setattr(
                rolling_cache,
                plan.__name__,
                lambda layout, *rest, p=plan: p(replace(layout, window=layout.window - 1), *rest),
            )
            report = compare_streaming(made(name))
            assert not report.passed
            # 4 sinks and 28 recent tokens: with one fewer, token 31 is the first that misses one
            assert "differs is 31," in report.notes[0]
            monkeypatch.undo()


def test_sinks_that_do_not_move_with_the_window_are_found(made, monkeypatch) -> None:
    plan_of_cache = streamllm.SinkCache.plan

    def plan_with_fixed_sinks(*args: object) -> Plan:
        plan = plan_of_cache(*args)
        return replace(
            plan,
            steps={own: replace(step, sink_query_place=step.query_place) for own, step in plan.steps.items()},
        )

    monkeypatch.setattr(streamllm.SinkCache, "plan", plan_with_fixed_sinks)
    for name in ("llama-gqa", "falcon-7b", "mpt-7b"):
        report = compare_streaming(made(name))
        assert not report.passed
        assert "token by token: the first token that differs is 32," in report.notes[0]


# Texts, and errors that a user can cause


def test_a_checkpoint_with_a_tokenizer_is_compared_on_a_text(tmp_path: Path, capsys) -> None:
    from tests.unit.conftest import write_tokenizer

    size = write_tokenizer(tmp_path, bos=True)
    make(tmp_path, Variant("with-tokenizer", {**LLAMA, "num_hidden_layers": 1, "vocab_size": size}))
    code, out, _ = run(capsys, tmp_path, "--tokens", "65")
    assert code == 0
    assert "65 tokens of the built-in text" in out
    (tmp_path / "text").write_text("one two three, naïve ☕")
    code, out, _ = run(capsys, tmp_path, "--text", tmp_path / "text")
    assert code == 0
    assert re.search(r"text +\d\d tokens of the text given", out)
    (tmp_path / "text").write_text("")
    code, _, err = run(capsys, tmp_path, "--text", tmp_path / "text")
    assert (code, err) == (2, "Error: the text has 1 tokens; at least 2 are needed\n")


def test_a_checkpoint_that_cannot_be_compared_is_an_error_of_one_sentence(
    made, tmp_path: Path, capsys
) -> None:
    code, out, err = run(capsys, tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"Error: there is no folder .*\n", err)
    shutil.copytree(made("llama-gqa"), tmp_path / "foreign")
    respell(tmp_path / "foreign", {"model_type": "unheard-of"})
    with pytest.raises(streamllm.CheckpointError, match="transformers cannot load"):
        compare(made("llama-gqa"), tmp_path / "foreign", tokens=TOKENS)
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        compare(made("llama-gqa"), dtype="int8")


def test_without_transformers_the_error_says_how_to_install_it(made, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, err = run(capsys, made("llama-gqa"))
    assert (code, out) == (2, "")
    assert "Error: " in err
    assert "pip install 'streamllm[parity]'" in err
    assert compare_streaming(made("llama-gqa")).passed  # does not need transformers


def test_the_tests_of_one_checkpoint_run_the_same_comparison(made, capsys, monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    options = ["--checkpoint", str(made("llama-gqa")), "-k", "float32 or eviction", "-p", "no:cacheprovider"]
    assert pytest.main(["tests/parity/test_checkpoint.py", *options]) == 0
    assert "2 passed" in capsys.readouterr().out


def test_hooks_are_removed_afterwards(made) -> None:
    model = streamllm.load_model(made("llama-gqa"), device="cpu")
    with hooked(model, ["layers.0", ""], lambda *_: None):
        assert len(model._forward_hooks) == 1
        model(torch.zeros(1, 2, dtype=torch.int64))
    assert not any(module._forward_hooks for module in model.modules())
