"""Random changes of the files of a checkpoint, for tools/fuzz.py: of bytes, of JSON values, of templates."""

from __future__ import annotations

import copy
import json
import random
import re
import struct
from collections.abc import Iterator
from typing import Any

# JSON values are replaced by these.
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 16, 255, 300, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63),
    *(2**64, 10**30, 10**400, 0.5, -0.0, 1e300, -1e300, 1e-300, float("nan"), float("inf")),
    *("", " ", "a", "▁", "\ud800", "\0", "../x", "/etc/passwd", "x" * 300, "<s>", "(a*)*b", "("),
    *("float16", "F16", "I64", "llama", "linear", "yarn", "Sequence", "Regex"),
    *([], [[]], {}, {"a": 1}, [0] * 1000, [1, 2]),
]
# These are inserted into JSON text.
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
    """One change: a bit flipped; bytes inserted, deleted, repeated, replaced by a snippet; or a cut."""
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


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield value, key
        yield from _places(inner)


def mutate_json_values(data: bytes, rng: random.Random) -> bytes:
    """One to four changes of the values and keys. Raises ValueError for bytes that are not JSON."""
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(value))
        if not places:
            break
        holder, key = rng.choice(places)
        kind, other = rng.randrange(8), rng.choice(places)
        old = holder[key]
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[key] = copy.deepcopy(other[0][other[1]])  # without a copy, it could contain itself
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


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """A change of a JSON file: of its values in three of four cases, else of its bytes."""
    if rng.randrange(4):
        try:
            return mutate_json_values(data, rng)
        except (ValueError, RecursionError, TypeError, OverflowError):
            pass
    return mutate_binary(data, rng)


def mutate_binary(data: bytes, rng: random.Random) -> bytes:
    """One to five changes of bytes."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        data = mutate_bytes(data, rng)
    return data


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A change of the length of the header, of the header, of the tensors, or of any bytes."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + size], data[8 + size :]
    kind = rng.randrange(8)
    if kind == 0:
        return mutate_bytes(data, rng)
    if kind == 1:
        length = rng.choice([0, size + rng.choice((-8, -1, 1, 8)), rng.getrandbits(64), len(data)])
        return struct.pack("<Q", length) + header + body
    if kind == 2:
        return struct.pack("<Q", size) + header + mutate_bytes(body, rng)
    header = mutate_json(header, rng)
    return struct.pack("<Q", len(header)) + header + body


_WORDS = re.compile(r"\w+|[^\w\s]+|\s+")
# These are inserted into templates: attempts to reach more than a template may, or to take very long.
ATTACKS = [
    "messages",
    "messages.append",
    "x.__class__",
    "range(10**9)",
    "''.format",
    "{% for a in range(9999) %}",
    "{% endfor %}",
]
ATTACKS += [
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
    """A change of words of a template, or in one of four cases of its bytes."""
    if not rng.randrange(4):
        return mutate_binary(data, rng)
    words = _WORDS.findall(data.decode())
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(words))
        words[at : at + rng.randrange(2)] = rng.choice(
            [[], [rng.choice(words)], [rng.choice(ATTACKS)], words[at : at + 9]]
        )
    return "".join(words).encode()
