"""convert(): any checkpoint that loads becomes safetensors that both transformers and streamllm read."""

import json
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

import streamllm
from streamllm.convert import convert
from tests import tiny
from tests.checkpoints import Variant, make
from tests.parity import grid
from tests.tiny import CONFIG, INDEX, SINGLE

WHOLE, TENSORS = tiny.checkpoint(), tiny.tensors()
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
TOKENS = torch.tensor([[1, 2, 3, 150, 5]])


def logits(folder):
    return streamllm.load_model(folder, device="cpu")(TOKENS)


def of_transformers(folder):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    with torch.no_grad():
        return model(TOKENS).logits


def stored(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def pickled(tensors, **options):
    import io

    out = io.BytesIO()
    torch.save(tensors, out, **options)
    return out.getvalue()


def without(files, *names):
    return {name: data for name, data in files.items() if name not in names}


OLD = without(WHOLE, SINGLE) | {"pytorch_model.bin": pickled(OrderedDict(TENSORS))}


def old_shards():
    names = sorted(TENSORS)
    parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    index = {"metadata": {}, "weight_map": {name: part for part, inside in parts.items() for name in inside}}
    files = {part: pickled({name: TENSORS[name] for name in inside}) for part, inside in parts.items()}
    return without(WHOLE, SINGLE) | files | {"pytorch_model.bin.index.json": json.dumps(index).encode()}


SOURCES = {
    "single": WHOLE,
    "sharded": tiny.checkpoint(shards=3),
    "pickle": OLD,
    "pickles": old_shards(),
    "pickle of an old torch": OLD
    | {"pytorch_model.bin": pickled(TENSORS, _use_new_zipfile_serialization=False)},
    "without prefix": WHOLE | {SINGLE: save({n.removeprefix("model."): t for n, t in TENSORS.items()})},
    "with a stored rotary table": WHOLE
    | {SINGLE: save(TENSORS | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})},
}


@pytest.mark.parametrize("size", ["5GB", 20_000, "1KB"])
@pytest.mark.parametrize("source", SOURCES)
def test_weights_stay_the_same(tmp_path, source, size):
    expected = logits(tiny.write(tmp_path / "expected", WHOLE))
    out = convert(
        tiny.write(tmp_path / "in", SOURCES[source]), tmp_path / "out", max_shard_size=size, allow_pickle=True
    )
    torch.testing.assert_close(logits(out), expected, rtol=0, atol=1e-5)
    found = stored(out)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    weights = sorted(path.name for path in out.glob("*.safetensors"))
    if size == "5GB":
        assert weights == [SINGLE]
        assert not (out / INDEX).exists()
    else:
        places = json.loads((out / INDEX).read_text())["weight_map"]
        assert sorted(set(places.values())) == weights
        assert all(name.endswith(f"-of-{len(weights):05}.safetensors") for name in weights)
    assert json.loads((out / "config.json").read_text()) == CONFIG
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == WHOLE[name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "in", "out"]


def test_chat_templates_are_copied(tmp_path):
    templates = {"chat_template.jinja": b"plain", "additional_chat_templates/tool_use.jinja": b"with tools"}
    out = convert(tiny.write(tmp_path / "in", WHOLE | templates), tmp_path / "out")
    assert streamllm.load_tokenizer(out).chat_template == {"default": "plain", "tool_use": "with tools"}


@pytest.mark.parametrize("source", ["single", "pickles", "without prefix"])
def test_transformers_reads_the_result(tmp_path, source):
    folder = tiny.write(tmp_path / "in", SOURCES[source])
    out = convert(folder, tmp_path / "out", max_shard_size="20KB", allow_pickle=True)
    torch.testing.assert_close(of_transformers(out), logits(out), rtol=0, atol=1e-5)


FAMILIES = {
    "mistral": grid.LLAMA | {"model_type": "mistral", "sliding_window": 16},
    "qwen2": grid.LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": grid.LLAMA | {"model_type": "qwen3", "head_dim": 32},
    "gpt_neox": grid.NEOX,
    "falcon": grid.FALCON,
    "falcon 40b": grid.FALCON_40B,
    "falcon rw": grid.FALCON_RW,
    "mpt": grid.MPT,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family(tmp_path, family):
    folder = make(tmp_path / "in", Variant("", FAMILIES[family]))
    out = convert(folder, tmp_path / "out", max_shard_size="50KB")
    found, whole = stored(out), stored(folder)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert torch.equal(of_transformers(out), of_transformers(folder))


@pytest.mark.parametrize("base", ["falcon", "falcon 40b", "falcon rw"])
@pytest.mark.parametrize("model_type", ["falcon", "RefinedWebModel"])
def test_old_falcon_config_is_renewed(tmp_path, base, model_type):
    """transformers reads an old config as 71 heads, or not at all without the code of its repository."""
    folder = make(tmp_path / "in", Variant("", FAMILIES[base]))
    expected = of_transformers(folder)
    old = json.loads((folder / "config.json").read_text()) | {
        "model_type": model_type,
        "auto_map": {"AutoModel": "x.Y"},
    }
    old |= {"n_layer": old.pop("num_hidden_layers"), "n_head": old.pop("num_attention_heads")}
    kv_heads = old.pop("num_kv_heads", None)
    if old.pop("new_decoder_architecture", False):
        old["n_head_kv"] = kv_heads
    (folder / "config.json").write_text(json.dumps(old))
    out = convert(folder, tmp_path / "out")
    assert torch.equal(of_transformers(out), expected)
    assert "auto_map" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("kept", [(EMBED, HEAD), (EMBED,), (HEAD,)], ids=["both", "embedding", "head"])
def test_tied_head(tmp_path, kept):
    alone = {name: tensor for name, tensor in TENSORS.items() if name not in (EMBED, HEAD)}
    files = WHOLE | {
        "config.json": json.dumps(CONFIG | {"tie_word_embeddings": True}).encode(),
        SINGLE: save(alone | {name: TENSORS[EMBED].clone() for name in kept}),
    }
    folder = tiny.write(tmp_path / "in", files)
    out = convert(folder, tmp_path / "out")
    assert stored(out).keys() == TENSORS.keys() - {HEAD}
    torch.testing.assert_close(of_transformers(out), logits(folder), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*ties the head")
def test_config_ties_a_head_that_the_files_hold_apart(tmp_path):
    folder = tiny.write(
        tmp_path / "in", WHOLE | {"config.json": json.dumps(CONFIG | {"tie_word_embeddings": True}).encode()}
    )
    out = convert(folder, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(of_transformers(out), logits(folder), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16, "float64"])
def test_weights_are_cast(tmp_path, dtype):
    out = convert(tiny.write(tmp_path / "in", WHOLE), tmp_path / "out", dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {tensor.dtype for tensor in stored(out).values()} == {wanted}
    assert logits(out).dtype == wanted == of_transformers(out).dtype


def test_each_tensor_keeps_its_type_without_a_cast(tmp_path):
    mixed = TENSORS | {NORM: TENSORS[NORM].double(), HEAD: TENSORS[HEAD].half()}
    out = convert(
        tiny.write(tmp_path / "in", WHOLE | {SINGLE: save(mixed)}), tmp_path / "out", max_shard_size="10KB"
    )
    assert all(torch.equal(tensor, mixed[name]) for name, tensor in stored(out).items())
    assert {t.dtype for t in stored(out).values()} == {torch.float64, torch.float32, torch.float16}


def test_errors_leave_no_files(tmp_path):
    folder = tiny.write(tmp_path / "in", WHOLE)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="exists already and is not empty: give a new folder"):
        convert(folder, tmp_path / "full")
    for size in ("5 bananas", "-1", 0, "", None):
        with pytest.raises(ValueError, match="max_shard_size is"):
            convert(folder, tmp_path / "out", max_shard_size=size)
    with pytest.raises(ValueError, match="dtype is 'int8'; supported: float64"):
        convert(folder, tmp_path / "out", dtype="int8")
    (folder / SINGLE).write_bytes(WHOLE[SINGLE][:-1])
    with pytest.raises(streamllm.CheckpointError):
        convert(folder, tmp_path / "out")
    with pytest.raises(streamllm.CheckpointNotFound):
        convert(tmp_path / "none", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "in"]


# Pickles.


def test_pickles_need_permission(tmp_path):
    folder = tiny.write(tmp_path / "in", OLD)
    pattern = (
        r"only as pytorch_model.bin, a pickle, .* allow_pickle=True \(--allow-pickle\), "
        r".*'streamllm convert .* NEW_FOLDER --allow-pickle'"
    )
    for refuse in (streamllm.load, streamllm.load_model, lambda folder: convert(folder, tmp_path / "out")):
        with pytest.raises(streamllm.UnsupportedConfig, match=pattern):
            refuse(folder)
    model, _ = streamllm.load(folder, allow_pickle=True, device="cpu")
    expected = logits(tiny.write(tmp_path / "expected", WHOLE))
    torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-5)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (exec, (f"open({str(self.mark)!r}, 'w')",))


def archive(tmp_path, compression):
    """The pickle in a compressed archive."""
    plain = tmp_path / "plain.bin"
    plain.write_bytes(pickled(TENSORS))
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(tmp_path / "made.bin", "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return (tmp_path / "made.bin").read_bytes()


HOSTILE = {
    "code": (lambda tmp: pickle.dumps(Evil(tmp / "ran")), "cannot be read as a pickle of tensors"),
    "code in an archive": (
        lambda tmp: pickled({"a": Evil(tmp / "ran")}),
        "cannot be read as a pickle of tensors",
    ),
    "empty": (lambda tmp: b"", "cannot be read as a pickle of tensors"),
    "noise": (lambda tmp: b"\x80\x02" + bytes(range(256)) * 4, "cannot be read as a pickle of tensors"),
    "half of the file": (
        lambda tmp: OLD["pytorch_model.bin"][:5000],
        "cannot be read as a pickle of tensors",
    ),
    "a list": (lambda tmp: pickled([1, 2]), "holds a list, not tensors by name"),
    "numbers": (lambda tmp: pickled(TENSORS | {"a": 7}), "'a' is not a plain tensor"),
    "numbers as names": (lambda tmp: pickled({7: torch.ones(1)}), "not tensors by name"),
    "a sparse tensor": (lambda tmp: pickled({NORM: torch.eye(9).to_sparse()}), "is not a plain tensor"),
    "one number expanded to a trillion": (
        lambda tmp: pickled({NORM: torch.ones(1).expand(10**6, 10**6)}),
        "claims to be larger than the file",
    ),
    "compressed": (lambda tmp: archive(tmp, zipfile.ZIP_DEFLATED), "is a compressed archive"),
    "a missing tensor": (lambda tmp: pickled(without(TENSORS, NORM)), "lack the weights of norm.weight"),
    "integers": (lambda tmp: pickled(TENSORS | {NORM: torch.ones(16).long()}), "stored as torch.int64"),
}


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles(tmp_path, case):
    make, pattern = HOSTILE[case]
    folder = tiny.write(tmp_path / "in", OLD | {"pytorch_model.bin": make(tmp_path)})
    with pytest.raises(streamllm.CheckpointError, match=pattern) as caught:
        streamllm.load_model(folder, allow_pickle=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_pickled_views_are_written_contiguously(tmp_path):
    both = TENSORS | {NORM: torch.stack([TENSORS[NORM]] * 2)[1], EMBED: TENSORS[EMBED].T.contiguous().T}
    folder = tiny.write(tmp_path / "in", OLD | {"pytorch_model.bin": pickled(both)})
    out = convert(folder, tmp_path / "out", allow_pickle=True)
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in stored(out).items())


def test_command_line(tmp_path):
    tiny.write(tmp_path / "in", OLD)
    command = [
        sys.executable,
        "-m",
        "streamllm",
        "convert",
        "in",
        "out",
        "--max-shard-size",
        "20KB",
        "--dtype",
        "float16",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: in has its weights only as pytorch_model.bin, a pickle")
    done = subprocess.run(
        [*command, "--allow-pickle"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "out/config.json" in done.stdout
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {torch.float16}
