"""Folders that other tools left incomplete: pointers of git-lfs, indexes of shards that are gone, quantised tensors."""

import json
import os

import pytest
import torch
from safetensors.torch import save

import streamllm
from streamllm import CheckpointError, TokenizerError, UnsupportedConfig
from streamllm.convert import convert
from streamllm.tokenizer import load_tokenizer_files
from tests.unit.hostile.samples import (
    GENERATION,
    HEAD,
    INDEX,
    INTACT,
    LFS,
    NORM,
    SHARDED,
    SHARDS,
    SINGLE,
    TENSORS,
    TOKENIZER,
    build,
    check_refused,
    link,
    load_and_run,
)

POINTERS = {
    "config.json": INTACT,
    SINGLE: INTACT,
    TOKENIZER: INTACT,
    GENERATION: INTACT,
    "tokenizer_config.json": INTACT,
    "special_tokens_map.json": INTACT,
    "added_tokens.json": INTACT,
    "chat_template.jinja": INTACT,
    "additional_chat_templates/tool_use.jinja": INTACT,
    "tokenizer.model": {name: data for name, data in INTACT.items() if name != TOKENIZER},
    INDEX: SHARDED,
    SHARDS[1]: SHARDED,
}


@pytest.mark.parametrize("name", POINTERS)
def test_a_git_lfs_pointer_is_named_in_every_file(tmp_path, name):
    check_refused(tmp_path, POINTERS[name] | {name: LFS}, f"{name} is a git-lfs pointer.* run 'git lfs pull'")


def test_a_pickle_may_be_a_pointer(tmp_path):
    files = {name: data for name, data in INTACT.items() if name != SINGLE} | {"pytorch_model.bin": LFS}
    with pytest.raises(CheckpointError, match="is a git-lfs pointer"):
        streamllm.load(build(tmp_path, files), allow_pickle=True)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_convert_copies_no_pointer(tmp_path, name):
    build(tmp_path / "in", INTACT | {name: LFS})
    with pytest.raises(CheckpointError, match=f"{name} is a git-lfs pointer"):
        convert(tmp_path / "in", tmp_path / "out")


def test_a_single_file_wins_over_a_stale_index(tmp_path):
    """The model was saved in shards, and then again in one file: transformers reads that one."""
    changed = {**TENSORS, NORM: TENSORS[NORM] * 2}
    expected = load_and_run(build(tmp_path / "changed", INTACT | {SINGLE: save(changed)}))
    gone = {INDEX: SHARDED[INDEX]}
    for name, files in {"gone": gone, "there": SHARDED}.items():
        found = load_and_run(build(tmp_path / name, INTACT | files | {SINGLE: save(changed)}))
        torch.testing.assert_close(found, expected)


def test_a_single_file_that_lacks_tensors_of_the_index_is_ignored(tmp_path):
    expected = load_and_run(build(tmp_path / "shards", SHARDED))
    stray = {name: tensor for name, tensor in TENSORS.items() if name != HEAD}
    found = load_and_run(build(tmp_path / "both", SHARDED | {SINGLE: save(stray)}))
    torch.testing.assert_close(found, expected)


LAYER = "model.layers.0.self_attn.q_proj"
QUANTISED = {
    "MLX": [f"{LAYER}.scales", f"{LAYER}.biases"],
    "bitsandbytes, 4 bits": [f"{LAYER}.weight.absmax", f"{LAYER}.weight.quant_state.bitsandbytes__nf4"],
    "bitsandbytes, 8 bits": [f"{LAYER}.SCB", f"{LAYER}.weight_format"],
    "GPTQ": [f"{LAYER}.qweight", f"{LAYER}.qzeros", f"{LAYER}.scales", f"{LAYER}.g_idx"],
    "8-bit floats": [f"{LAYER}.weight_scale_inv"],
    "compressed-tensors": [f"{LAYER}.weight_packed", f"{LAYER}.weight_scale", f"{LAYER}.weight_shape"],
}


@pytest.mark.parametrize("case", QUANTISED)
def test_quantised_files_are_named_without_a_quantization_config(tmp_path, case):
    extra = {name: torch.zeros(4, dtype=torch.uint8) for name in QUANTISED[case]}
    files = INTACT | {SINGLE: save(TENSORS | extra)}
    with pytest.raises(UnsupportedConfig, match="belong to a quantised checkpoint"):
        streamllm.load(build(tmp_path, files))


def test_whole_numbers_are_quantised_too(tmp_path):
    files = INTACT | {SINGLE: save({**TENSORS, NORM: TENSORS[NORM].to(torch.int8)})}
    with pytest.raises(UnsupportedConfig, match="quantised checkpoints are not supported"):
        streamllm.load(build(tmp_path, files))


def test_info_shows_the_file_that_is_read(tmp_path):
    from streamllm.info import describe
    from streamllm.weights.checkpoint import Checkpoint
    from streamllm.weights.source import resolve

    build(tmp_path, INTACT | {INDEX: json.dumps({"weight_map": {NORM: "gone.safetensors"}}).encode()})
    lines = [line for _, line in describe(Checkpoint(resolve(tmp_path)))]
    assert any(line.startswith(SINGLE) for line in lines)
    assert not any("gone" in line for line in lines)


TEMPLATES = {f"additional_chat_templates/{name}.jinja": name.encode() for name in ("tool_use", "rag")}


def test_templates_in_files_are_all_kept(tmp_path):
    build(tmp_path / "in", INTACT | TEMPLATES)
    expected = {"rag": "rag", "tool_use": "tool_use"}
    assert streamllm.load_tokenizer(tmp_path / "in").chat_template == expected
    convert(tmp_path / "in", tmp_path / "out")
    assert streamllm.load_tokenizer(tmp_path / "out").chat_template == expected


@pytest.mark.parametrize("make", [os.mkfifo, link("/etc/hostname")], ids=["pipe", "link"])
@pytest.mark.parametrize("name", ["additional_chat_templates/x.jinja", "chat_template.jinja"])
def test_templates_are_guarded_as_other_files_are(tmp_path, name, make):
    folder = build(tmp_path / "in", INTACT | TEMPLATES)
    make(folder / name)
    for attempt in (
        lambda: streamllm.load_tokenizer(folder),
        lambda: convert(folder, tmp_path / "out"),
        lambda: load_tokenizer_files(folder),
    ):
        with pytest.raises(
            (CheckpointError, TokenizerError), match=r"a pipe or a device|a link out of the folder"
        ):
            attempt()


def test_the_folder_of_templates_may_not_be_a_link_out(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.jinja").write_text("x")
    folder = build(tmp_path / "in", INTACT)
    (folder / "additional_chat_templates").symlink_to(tmp_path / "outside")
    for load in (streamllm.load_tokenizer, load_tokenizer_files):
        with pytest.raises((CheckpointError, TokenizerError), match="a link out of the folder"):
            load(folder)
