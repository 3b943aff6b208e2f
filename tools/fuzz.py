"""Fuzzer: checkpoints whose headers, indexes, configs and tokenizers are mutated at random.

    python tools/fuzz.py --cases 100000 --seed 1

Every case must end in one of the library's own exceptions, or in a model (or tokenizer) that works. Another
exception, a crash, a hang of more than 10 s or memory out of proportion to the files is a failure, and the
exit code is 1. A case is made from the seed and its number alone: `--seed 1 --first 4711 --cases 1 --keep
DIR` makes it again and keeps its files.

The cases run in a child process, so that a crash or a hang ends that, and not the run.
"""

from __future__ import annotations

import collections
import copy
import json
import os
import random
import re
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save
from tqdm import tqdm

import streamllm
from streamllm.chat import ChatTemplateError, render
from streamllm.weights import FAMILIES
from streamllm.weights.config_reader import ConfigReader
from streamllm.weights.family import NOT_NEEDED, Fused

SECONDS = 10  # of work for one case
MEGABYTES = 64  # for one case, beyond 12 times its files
BATCH = 2000  # cases of one child

OWN = (streamllm.CheckpointError, streamllm.TokenizerError, ChatTemplateError)
TEXT = "Once  upon\ta time, 日本語 👩‍👩‍👧 </s> é\n"

SMALL = {
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
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0, 2.0], "long_factor": [1.0, 3.0]}
NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
OLD = {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}
CONFIGS: list[dict[str, Any]] = [
    SMALL | {"model_type": "llama", "tie_word_embeddings": False},
    SMALL | {"model_type": "llama", "tie_word_embeddings": True, "rope_scaling": LINEAR},
    SMALL | {"model_type": "llama", "rope_parameters": YARN},
    SMALL | {"model_type": "llama", "rope_scaling": LONG, "attention_bias": True, "mlp_bias": True},
    SMALL | {"model_type": "llama", "rope_scaling": LLAMA3, "head_dim": 8},
    SMALL | {"model_type": "llama", "rope_scaling": DYNAMIC},
    SMALL | {"model_type": "mistral", "sliding_window": 8},
    SMALL | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    SMALL | {"model_type": "qwen3", "head_dim": 8},
    SMALL | {"model_type": "gpt_neox", "rotary_pct": 0.5, "use_parallel_residual": True},
    SMALL | {"model_type": "falcon"} | OLD,
    SMALL | {"model_type": "falcon"} | NEW,
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


def base_tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random tensors on disk for a config, from the family's own table of names."""
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
    """Byte-level with merges, sentencepiece-like with byte tokens, and sentencepiece itself."""
    import io

    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

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


# Mutations.

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 16, 255, 300, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63),
    *(2**64, 10**30, 10**400, 0.5, -0.0, 1e300, -1e300, 1e-300, float("nan"), float("inf")),
    *("", " ", "a", "▁", "\ud800", "\0", "../x", "/etc/passwd", "x" * 300, "<s>", "(a*)*b", "("),
    *("float16", "F16", "I64", "llama", "linear", "yarn", "Sequence", "Regex"),
    *([], [[]], {}, {"a": 1}, [0] * 1000, [1, 2]),
]
SNIPPETS = [
    b"null",
    b"-1",
    b"1e999",
    b'""',
    b"[]",
    b"{}",
    b"NaN",
    b"\\ud800",
    b"\0",
    b"\xff",
    b"9" * 40,
    b"[" * 3000,
    b'{"a":' * 3000,
]
SNIPPETS += [b",", b":", b'"', b"\\", b"}", b"]"]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(len(data) + 1), min(len(data), int(rng.expovariate(0.1)))
    kind = rng.randrange(7)
    if kind == 0 and data:
        at = rng.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
    if kind == 2:
        return data[:at] + data[at + length :]
    if kind == 3:
        return data[:at] + data[at : at + length] * rng.choice((2, 3, 50)) + data[at + length :]
    if kind == 4:
        return data[:at]
    return data[:at] + rng.choice(SNIPPETS) + data[at + rng.choice((0, length)) :]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield value, key
        yield from places(inner)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        spots = list(places(value))
        if not spots:
            break
        holder, key = rng.choice(spots)
        kind, other = rng.randrange(8), rng.choice(spots)
        old = holder[key]
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[key] = copy.deepcopy(other[0][other[1]])  # a copy, or it might come to contain itself
        elif kind == 2 and isinstance(holder, dict):
            holder[rng.choice([str(other[1]), "x", "", "../x", str(key) + "x"])] = holder.pop(key)
        elif kind == 3 and isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(rng.choice([old, *VALUES])))
        elif kind == 4 and isinstance(old, (int, float)):
            number = rng.choice([old + 1, old - 1, -old, old * 2, old * 1000, old / 3, str(old), [old]])
            holder[key] = number
        elif kind == 5 and isinstance(old, str) and old:
            at = rng.randrange(len(old))
            holder[key] = (
                old[:at] + rng.choice(["", "\0", "0", "..", "é", old]) + old[at + rng.randrange(2) :]
            )
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(value).encode()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A JSON file: its values in three cases of four, else its bytes."""
    if rng.randrange(4):
        try:
            return mutate_json(data, rng)
        except (ValueError, RecursionError, TypeError, OverflowError):
            pass
    for _ in range(rng.choice((1, 1, 2, 5))):
        data = mutate_bytes(data, rng)
    return data


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + size], data[8 + size :]
    kind = rng.randrange(8)
    if kind == 0:
        return mutate_bytes(data, rng)
    if kind == 1:
        return (
            struct.pack(
                "<Q", rng.choice([0, size + rng.choice((-8, -1, 1, 8)), rng.getrandbits(64), len(data)])
            )
            + header
            + body
        )
    if kind == 2:
        return struct.pack("<Q", size) + header + mutate_bytes(body, rng)
    header = mutate(header, rng)
    return struct.pack("<Q", len(header)) + header + body


def mutate_model(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 5))):
        data = mutate_bytes(data, rng)
    return data


WORDS = re.compile(r"\w+|[^\w\s]+|\s+")
ESCAPES = [
    "messages",
    "messages.append",
    "x.__class__",
    "range(10**9)",
    "''.format",
    "{% for a in range(9999) %}",
    "{% endfor %}",
]
ESCAPES += [
    "*",
    "* 10**9",
    "** 9**9",
    "| join",
    "| map('list') | list",
    "{{ self }}",
    "cycler",
    "% 0",
    "[::-1]",
    "|batch(0)",
]


def mutate_template(data: bytes, rng: random.Random) -> bytes:
    if not rng.randrange(4):
        return mutate_model(data, rng)
    words = WORDS.findall(data.decode())
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(words))
        words[at : at + rng.randrange(2)] = rng.choice(
            [[], [rng.choice(words)], [rng.choice(ESCAPES)], words[at : at + 9]]
        )
    return "".join(words).encode()


# One case.


class Bases:
    """What is mutated: whole checkpoints, made once."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.models: list[dict[str, bytes]] = []
        for config in CONFIGS:
            if config["model_type"] not in FAMILIES:
                continue
            tensors = base_tensors(config)
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


GENERATION = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
    "eos_token_id": [1, 2],
    "repetition_penalty": 1.1,
}


def case(bases: Bases, seed: int, number: int) -> tuple[str, dict[str, bytes]]:
    """The name of what is mutated, and the files."""
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
        other = {"tokenizer.model": mutate_model, "chat_template.jinja": mutate_template}
        files[name] = other.get(name, mutate)(files[name], rng)
    return name, files


def attempt(folder: Path, name: str) -> str:
    """What became of a case: "loaded", or the name of our exception. Anything else raises."""
    try:
        if name == "chat_template.jinja":
            template = (folder / name).read_text(encoding="utf-8", errors="replace")
            text = render(template, MESSAGES, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
            assert isinstance(text, str)
            return "loaded"
        if not (folder / "config.json").exists():
            tokenizer = streamllm.load_tokenizer(folder)
            for special in (True, False):
                ids = tokenizer.encode(TEXT, add_special_tokens=special)
                assert isinstance(tokenizer.decode(ids, skip_special_tokens=special), str)
            tokenizer.decode(range(0, tokenizer.vocab_size, 1 + tokenizer.vocab_size // 400))
            return "loaded"
        model = streamllm.load_model(folder, device="cpu")
        logits = model(torch.tensor([[0, 0, 0]]))  # the token that every vocabulary has
        assert logits.shape[:2] == (1, 3)
        return "loaded"
    except OWN as error:
        message = str(error)
        assert message, "an error without words"
        assert len(message) < 2000, f"an error of {len(message)} characters"
        return type(error).__name__


def status(field: str) -> int:
    found = re.search(field + r":\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) >> 10 if found else 0


def child(bases: Bases, seed: int, numbers: range, keep: Path | None, out: int) -> None:
    """Runs cases and writes a line for each as it begins and one as it ends."""

    def tell(*fields: object) -> None:
        os.write(out, (json.dumps(fields) + "\n").encode())

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries print what they think of such files
    measured = True
    limit = status("VmSize") + 4096 << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # rather an error than the machine's last page
    with tempfile.TemporaryDirectory() as space:
        for number in numbers:
            name, files = case(bases, seed, number)
            folder = keep or Path(space) / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            for file, data in files.items():
                (folder / file).write_bytes(data)
            tell(number, name)
            try:
                Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
            except OSError:
                measured = False
            before, begun = status("VmRSS"), time.process_time()
            try:
                outcome, fault = attempt(folder, name), ""
            except BaseException as error:
                outcome = "failed"
                where = traceback.extract_tb(error.__traceback__)[-1]
                fault = f"{type(error).__name__}: {str(error)[:200]!r} at {Path(where.filename).name}:{where.lineno}"
            if (
                measured
                and status("VmHWM") - before > MEGABYTES + 12 * sum(map(len, files.values())) // 2**20
            ):
                outcome, fault = "failed", f"{status('VmHWM') - before} MB of memory"
            if time.process_time() - begun > SECONDS:
                outcome, fault = "failed", f"{time.process_time() - begun:.0f} s"
            tell(number, name, outcome, fault)
            if keep is None:
                for file in files:
                    (folder / file).unlink()
                folder.rmdir()


def run(
    seed: int,
    first: int,
    cases: int,
    seconds: float | None = None,
    keep: Path | None = None,
    say: Callable[[str], object] = print,
) -> tuple[collections.Counter[tuple[str, str]], list[tuple[int, str, str]]]:
    """Counts of (file mutated, outcome), and the failures as (number, file, what happened)."""
    torch.set_num_threads(1)  # no threads may run when a process forks
    bases = Bases()
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    failures: list[tuple[int, str, str]] = []
    end = time.monotonic() + seconds if seconds else None
    number, last = first, first + cases
    with tqdm(total=cases, unit="case", disable=None) as bar:
        while number < last and (end is None or time.monotonic() < end):
            receive, send = os.pipe()
            process = os.fork()
            if process == 0:
                os.close(receive)
                code = 1
                try:
                    child(bases, seed, range(number, min(number + BATCH, last)), keep, send)
                    code = 0
                finally:
                    os._exit(code)
            os.close(send)
            begun: tuple[int, str] | None = None
            for fields in lines(receive, 6 * SECONDS):  # by the clock, and others may work here
                if fields is None:
                    os.kill(process, signal.SIGKILL)
                    break
                if len(fields) == 2:
                    begun = fields[0], fields[1]
                    continue
                counts[fields[1], fields[2]] += 1
                if fields[2] == "failed":
                    failures.append((fields[0], fields[1], fields[3]))
                    say(f"case {fields[0]} ({fields[1]}): {fields[3]}")
                number, begun = fields[0] + 1, None
                bar.update()
                if end is not None and time.monotonic() > end:
                    os.kill(process, signal.SIGKILL)
                    break
            os.close(receive)
            _, code = os.waitpid(process, 0)
            stopped = end is not None and time.monotonic() > end
            if code != 0 and not stopped:
                if begun is None:
                    raise RuntimeError("the child process failed outside of a case")
                hung = os.WIFSIGNALED(code) and os.WTERMSIG(code) == signal.SIGKILL
                what = "hangs" if hung else f"the process died ({os.waitstatus_to_exitcode(code)})"
                counts[begun[1], "failed"] += 1
                failures.append((*begun, what))
                say(f"case {begun[0]} ({begun[1]}): {what}")
                number = begun[0] + 1
                bar.update()
    return counts, failures


def lines(pipe: int, patience: float) -> Iterator[Any]:
    """The lines of a pipe as they come; None after `patience` seconds without one."""
    held = b""
    while True:
        if not select.select([pipe], [], [], patience)[0]:
            yield None
            return
        data = os.read(pipe, 65536)
        if not data:
            return
        *whole, held = (held + data).split(b"\n")
        yield from map(json.loads, whole)


@click.command()
@click.option("--cases", default=100_000, show_default=True)
@click.option("--first", default=0, show_default=True, help="Number of the first case.")
@click.option("--seed", default=0, show_default=True)
@click.option("--seconds", type=float, help="Stop after this time, however many cases are left.")
@click.option(
    "--keep", type=click.Path(path_type=Path), help="With --cases 1: a folder for the case's files."
)
def main(cases: int, first: int, seed: int, seconds: float | None, keep: Path | None) -> None:
    """Mutate checkpoints at random; what is not one of our exceptions is a failure."""
    if keep is not None and cases != 1:
        raise click.UsageError("--keep is for a single case: add --cases 1")
    begun = time.monotonic()
    counts, failures = run(seed, first, cases, seconds, keep, lambda text: tqdm.write(text, file=sys.stdout))
    outcomes = sorted({outcome for _, outcome in counts})
    click.echo(" " * 32 + "".join(f"{outcome:>19}" for outcome in outcomes))
    for file in sorted({file for file, _ in counts}):
        click.echo(f"{file:32}" + "".join(f"{counts[file, outcome]:19,}" for outcome in outcomes))
    took = time.monotonic() - begun
    click.echo(f"seed {seed}: {sum(counts.values()):,} cases in {took:,.0f} s, {len(failures):,} failures")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
