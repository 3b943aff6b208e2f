"""Real tokenizers, compared with transformers (tokenizer.json) or sentencepiece (tokenizer.model)."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from streamllm.tokenizer import Tokenizer, TokenizerError, load_tokenizer_files

COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MIN_BYTES = 50_000  # of a vocabulary

SEEDS = [
    "Hello, world! How are you?",
    " leading space",
    "trailing space ",
    "  two  spaces  ",
    "\n\n\ttabs\r\nlines\n",
    "def f(x):\n    return [x ** 2 for x in range(10)]  # done",
    "https://example.org/a?b=c&d=%20e",
    "3.14159 1,000,000 1e-5",
    "na\xefve Stra\xdfe \ufb01anc\xe9e \u21165 \xbd \xb2",
    "Привет, как дела?",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3001\u3067\u3059\u3002",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "Ελληνικά κείμενα",
    "é ñ combining",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd",
    "\u2581metaspace\u2581",
    "\ufeffbom \u200bzero\u2028line",
    "'s 't 're don't I'll we've",
    "aaaaaaaaaaaaaaaaaaaaaaaa",
    '{"key": [1, 2.5, null, true]}',
    "SELECT * FROM t WHERE a='b';",
    "<html><body>&amp;</body></html>",
    "\x00\x01\x7f",
    "",
]


class Found(NamedTuple):
    """A tokenizer among the files."""

    name: str
    file: Path
    kind: str  # what the file must be called


def find_tokenizers(folders: Iterable[Path]) -> Iterator[Found]:
    """Every tokenizer once, by its content."""
    seen: set[str] = set()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            kind = _kind(path)
            if kind is None:
                continue
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest not in seen:
                seen.add(digest)
                yield Found(str(path.relative_to(folder)), path, kind)


def _kind(path: Path) -> str | None:
    if not path.is_file() or path.stat().st_size < MIN_BYTES:
        return None
    if path.suffix == ".json":
        start = path.read_bytes()[:4096]
        if b'"added_tokens"' in start or b'"truncation"' in start:
            return "tokenizer.json"
    elif ".model" in path.name and b"<unk>" in path.read_bytes()[:200]:
        return "tokenizer.model"
    return None


def texts_for(special: list[str], count: int) -> list[str]:
    """The same texts for each call: sentences, their joins with special tokens, and random characters."""
    rng = random.Random(1)
    texts = list(SEEDS)
    while len(texts) < count:
        parts = [rng.choice(SEEDS) for _ in range(rng.randrange(1, 4))]
        if special and rng.random() < 0.4:
            parts.insert(rng.randrange(len(parts) + 1), rng.choice(special))
        if rng.random() < 0.2:
            parts.append(
                "".join(
                    chr(rng.choice([rng.randrange(32, 127), rng.randrange(160, 0x3000)])) for _ in range(9)
                )
            )
        texts.append(rng.choice(["", " ", "\n"]).join(parts))
    return texts[:count]


def compare_tokenizer(found: Found, count: int) -> tuple[object, ...]:
    """A row: how many texts are encoded and decoded as by the reference, whole, token by token and in pieces."""
    folder = Path(tempfile.mkdtemp())
    try:
        shutil.copyfile(found.file, folder / found.kind)
        for name in COMPANIONS:
            if (found.file.parent / name).is_file():
                shutil.copyfile(found.file.parent / name, folder / name)
        try:
            ours = load_tokenizer_files(folder)
        except TokenizerError as error:
            return found.name, "refused", 0, 0, 0, 0, str(error)[:150]
        if found.kind == "tokenizer.json":
            return found.name, "transformers", *_against_transformers(ours, folder, count)
        return found.name, "sentencepiece", *_against_sentencepiece(ours, folder, count)
    finally:
        shutil.rmtree(folder)


def _against_transformers(ours: Tokenizer, folder: Path, count: int) -> tuple[object, ...]:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    special = [token.content for token in theirs.added_tokens_decoder.values()][:200]

    def decoded(ids: list[int], skip: bool) -> str:
        text: str = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        return text

    return _compared(ours, texts_for(special, count), lambda text: theirs(text)["input_ids"], decoded)


def _against_sentencepiece(ours: Tokenizer, folder: Path, count: int) -> tuple[object, ...]:
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    before = ours.encode("")

    def decoded(ids: list[int], skip: bool) -> str | None:
        text: str = theirs.decode(ids)
        return text if skip else None  # sentencepiece never shows control tokens

    return _compared(ours, texts_for([], count), lambda text: before + theirs.encode(text), decoded)


def _compared(ours: Tokenizer, texts: list[str], encode: Any, decode: Any) -> tuple[object, ...]:
    rng = random.Random(2)
    right = [0, 0, 0, 0]
    first: dict[str, str] = {}
    for text in texts:
        ids, expected = ours.encode(text), encode(text)
        right[0] += ids == expected
        if ids != expected:
            first.setdefault("encode", f"{text[:40]!r}: {ids[:12]}, reference {expected[:12]}")
        same = True
        for skip in (True, False):
            wanted = decode(expected, skip)
            if wanted is not None and ours.decode(expected, skip_special_tokens=skip) != wanted:
                same = False
                got = ours.decode(expected, skip_special_tokens=skip)
                first.setdefault("decode", f"{got[:60]!r}, reference {wanted[:60]!r}")
        right[1] += same
        decoder = ours.decoder()
        printed = "".join(map(decoder.push, expected)) + decoder.flush()
        right[2] += printed == ours.decode(expected)
        right[3] += _in_pieces(ours, text, rng) == ours.decode(ids)
    return *right, json.dumps(first, ensure_ascii=False) if first else ""


def _in_pieces(ours: Tokenizer, text: str, rng: random.Random) -> str:
    """A text that is encoded in two pieces, decoded. The cut is not inside a special token."""
    cut = text.find(" ", rng.randrange(len(text) + 1))
    cut = len(text) if cut < 0 else cut
    ids = ours.encode_piece(text[:cut])
    ids += ours.encode_piece(text[cut:], continuation=True, after=ids[-1] if ids else None)
    return ours.decode(ids)
