"""A small, complete checkpoint with large random weights: a Llama with a byte-level tokenizer, without transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import streamllm
from tests.unit.chat.samples import STYLES

CORPUS = [
    "def once(upon, a_time):\n    return [there + was for there, was in enumerate(a_time) if upon]\n",
    "for name in names:\n    print(name, end='')\n",
    "Die Straße hört nicht auf – 流れは続く, поток без конца, naïve café ☕ 🙂\n",
    "one two three four five six seven eight nine ten eleven twelve, and so on without end.\n",
]
BOS, EOS = "<s>", "</s>"


def write_tokenizer(folder: Path, bos: bool) -> int:
    """Write tokenizer.json into `folder`; with `bos`, it adds BOS to every text. Returns the number of ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": BOS, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return tokenizer.get_vocab_size()


def write_chat_tokenizer(folder: Path) -> int:
    """As `write_tokenizer`, with BOS, the ChatML template and its special tokens."""
    write_tokenizer(folder, bos=True)
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    library.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(STYLES["chatml"])
    return library.get_vocab_size()


def write_llama(folder: Path, vocab_size: int, **changes: object) -> Path:
    """Write config.json and model.safetensors of a two-layer Llama with large random weights."""
    config = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
        "eos_token_id": 1,
        **changes,
    }
    generator = torch.Generator().manual_seed(3)

    def random_weight(*shape: int) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        return 1 + 0.3 * noise if len(shape) == 1 else noise * 1.5 / shape[1] ** 0.5

    C, M, V = 32, 48, vocab_size
    tensors = {"model.embed_tokens.weight": random_weight(V, C), "model.norm.weight": random_weight(C)}
    for n in range(2):
        tensors |= {
            f"model.layers.{n}.{name}.weight": random_weight(*shape)
            for name, shape in {
                "input_layernorm": (C,),
                "self_attn.q_proj": (C, C),
                "self_attn.k_proj": (C // 2, C),
                "self_attn.v_proj": (C // 2, C),
                "self_attn.o_proj": (C, C),
                "post_attention_layernorm": (C,),
                "mlp.gate_proj": (M, C),
                "mlp.up_proj": (M, C),
                "mlp.down_proj": (C, M),
            }.items()
        }
    tensors["lm_head.weight"] = random_weight(V, C)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer adds BOS to every text. Tests must not change it: see `copy`."""
    folder = tmp_path_factory.mktemp("tiny")
    return write_llama(folder, write_tokenizer(folder, bos=True))


@pytest.fixture(scope="session")
def checkpoint_without_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-without-bos")
    return write_llama(folder, write_tokenizer(folder, bos=False))


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of `checkpoint` that a test may change."""
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    return folder


@pytest.fixture(scope="session")
def loaded(checkpoint: Path) -> tuple[torch.nn.Module, streamllm.Tokenizer]:
    return streamllm.load(checkpoint, device="cpu")


@pytest.fixture
def model(loaded) -> torch.nn.Module:
    return loaded[0]


@pytest.fixture
def tokenizer(loaded) -> streamllm.Tokenizer:
    return loaded[1]


@pytest.fixture
def interrupt(model) -> Callable[..., None]:
    """interrupt(name, error, call) raises `error` once, after forward number `call` (from 0) of a module.

    `name` is that of a module within the model, "" for the model itself.
    """
    hooks = []

    def raise_after(name: str, error: BaseException, call: int) -> None:
        left = [call]

        def hook(*_: object) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise error

        hooks.append(model.get_submodule(name).register_forward_hook(hook))

    yield raise_after
    for hook in hooks:
        hook.remove()
