"""The cases of tools/fuzz.py: intact checkpoints, tokenizers and chat templates, each with one file mutated."""

from __future__ import annotations

import io
import json
import random
from typing import Any

import sentencepiece
import torch
from fuzz_mutations import mutate_binary, mutate_json, mutate_safetensors, mutate_template
from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from streamllm.weights import FAMILIES
from streamllm.weights.config_reader import ConfigReader
from streamllm.weights.family import NOT_NEEDED, Fused

TEXT = "Once  upon\ta time, 日本語 👩‍👩‍👧 </s> é\n"

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 300,
    "torch_dtype": "float32",
}
LINEAR = {"type": "linear", "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
}
LONG = {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0, 2.0], "long_factor": [1.0, 3.0]}
NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
OLD = {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}
CONFIGS: list[dict[str, Any]] = [
    SIZES | {"model_type": "llama", "tie_word_embeddings": False},
    SIZES | {"model_type": "llama", "tie_word_embeddings": True, "rope_scaling": LINEAR},
    SIZES | {"model_type": "llama", "rope_parameters": YARN},
    SIZES | {"model_type": "llama", "rope_scaling": LONG, "attention_bias": True, "mlp_bias": True},
    SIZES | {"model_type": "llama", "rope_scaling": LLAMA3, "head_dim": 8},
    SIZES | {"model_type": "llama", "rope_scaling": DYNAMIC},
    SIZES | {"model_type": "mistral", "sliding_window": 8},
    SIZES | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    SIZES | {"model_type": "qwen3", "head_dim": 8},
    SIZES | {"model_type": "gpt_neox", "rotary_pct": 0.5, "use_parallel_residual": True},
    SIZES | {"model_type": "falcon"} | OLD,
    SIZES | {"model_type": "falcon"} | NEW,
    {"model_type": "RefinedWebModel", "hidden_size": 16, "n_layer": 2, "n_head": 4, "vocab_size": 300},
    {
        "model_type": "mpt",
        "d_model": 16,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "vocab_size": 300,
        "attn_config": {"alibi": True},
        "no_bias": True,
        "torch_dtype": "float32",
    },
]

GENERATION = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
    "eos_token_id": [1, 2],
    "repetition_penalty": 1.1,
}

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim }}"
    "{% if not loop.last %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ m.content ~ eos_token }}{% endif %}{% endfor %}"
)
TOOLS = (
    "{%- macro show(x, depth=0) %}{% for k, v in x.items() %}{{ k }}:"
    " {{ v | tojson }}{% endfor %}{% endmacro -%}"
    "{%- set ns = namespace(n=0) %}{% for m in messages if m.content %}{% set ns.n = ns.n + m.content | length %}"
    "{{ show(m) }}{% for i in range(3) %}{{ [i, ns.n] | join(',') }}{% endfor %}{% endfor %}{{ strftime_now('%Y') }}"
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello 👩‍👩‍👧"},
    {"role": "assistant", "content": "Hi."},
]


def random_tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random tensors for a config, with the names of the family's table."""
    family = FAMILIES[config["model_type"]]
    ours = family.read(ConfigReader(config), False)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in family.model(ours).named_parameters()}
    found: dict[str, torch.Tensor] = {}
    for theirs, target in family.tensors.items():
        if target == NOT_NEEDED:
            continue
        for layer in range(ours.layers) if "{}" in theirs else (0,):
            names = target.names if isinstance(target, Fused) else (target,)
            parts = [shapes.get(name.replace("{}", str(layer))) for name in names]
            if all(part is not None for part in parts):
                rows = sum(part[0] for part in parts if part)
                shape = (rows, *parts[0][1:]) if parts[0] else ()
                found[theirs.replace("{}", str(layer))] = torch.randn(shape) * 0.3
    return found


def tokenizers_of_each_kind() -> list[dict[str, bytes]]:
    """Byte-level BPE, BPE with byte tokens as in Llama, and sentencepiece with old and new files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate([*alphabet, "on", "ti", "tim"])}
    level = Tokenizer(models.BPE(vocabulary, [("o", "n"), ("t", "i"), ("ti", "m")]))
    level.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    level.decoder = decoders.ByteLevel()
    level.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True, lstrip=True)])

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "o", "n", "▁o", "▁on"]
    merges = [("▁", "o"), ("▁o", "n")]
    legacy = Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    legacy.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    legacy.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    legacy.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    legacy.add_special_tokens(["<unk>", "<s>", "</s>"])

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT * 3, "one two three", "time and again upon it"] * 20),
        model_writer=trained, vocab_size=300, model_type="bpe", byte_fallback=True, minloglevel=9,
    )  # fmt: skip
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "add_bos_token": True}
    legacy_named = named | {"legacy": True, "model_max_length": 10**30, "tokenizer_class": "LlamaTokenizer"}
    decoder = {"added_tokens_decoder": {"301": {"content": "<pad>", "special": True, "lstrip": False}}}
    return [
        {"tokenizer.json": level.to_str().encode(), "tokenizer_config.json": json.dumps(named).encode()},
        {
            "tokenizer.json": legacy.to_str().encode(),
            "tokenizer_config.json": json.dumps(legacy_named).encode(),
        },
        {
            "tokenizer.model": trained.getvalue(),
            "tokenizer_config.json": json.dumps(named).encode(),
            "special_tokens_map.json": json.dumps({"unk_token": "<unk>"}).encode(),
            "added_tokens.json": b'{"<pad>": 300}',
        },
        {
            "tokenizer.model": trained.getvalue(),
            "tokenizer_config.json": json.dumps(named | decoder).encode(),
        },
    ]


class Bases:
    """The intact checkpoints, tokenizers and templates. They are made once."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.models: list[dict[str, bytes]] = []
        for config in CONFIGS:
            tensors = random_tensors(config)
            names = sorted(tensors)
            files = {
                "config.json": json.dumps(config).encode(),
                "generation_config.json": json.dumps(GENERATION).encode(),
            }
            self.models.append(files | {"model.safetensors": save(tensors)})
            parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
            index = {
                "metadata": {"total_size": 1},
                "weight_map": {n: part for part, inside in parts.items() for n in inside},
            }
            shards = {part: save({n: tensors[n] for n in inside}) for part, inside in parts.items()}
            self.models.append(files | shards | {"model.safetensors.index.json": json.dumps(index).encode()})
        self.tokenizers = tokenizers_of_each_kind()
        self.templates = [{"chat_template.jinja": text.encode()} for text in (CHATML, LLAMA2, TOOLS)]


def make_case(bases: Bases, seed: int, number: int) -> tuple[str, dict[str, bytes]]:
    """The name of the file that is mutated, and all files."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.randrange(20)
    if kind == 0:
        files = dict(rng.choice(bases.templates))
        name = "chat_template.jinja"
    elif kind < 8:
        files = dict(rng.choice(bases.tokenizers))
        name = rng.choice(
            [n for n in files if n in ("tokenizer.json", "tokenizer.model")] * 3 + sorted(files)
        )
    else:
        files = dict(rng.choice(bases.models))
        name = rng.choice(sorted(files))
    if name.endswith(".safetensors"):
        files[name] = mutate_safetensors(files[name], rng)
    else:
        mutate = {"tokenizer.model": mutate_binary, "chat_template.jinja": mutate_template}
        files[name] = mutate.get(name, mutate_json)(files[name], rng)
    return name, files
