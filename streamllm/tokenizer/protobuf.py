"""The two facts of a sentencepiece model that the library does not tell, read from the file itself.

The file is a protobuf message; sentencepiece_model.proto of the sentencepiece library defines its fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_NORMALIZER_SPEC, _DENORMALIZER_SPEC = 3, 5  # fields of ModelProto
_CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 2, 3, 4  # fields of NormalizerSpec

# Appended to a model, this sets normalizer_spec { add_dummy_prefix: false }: later fields win.
WITHOUT_PREFIX_SPACE = b"\x1a\x02\x18\x00"
WITH_PREFIX_SPACE = b"\x1a\x02\x18\x01"


class DamagedModel(Exception):
    """The bytes are not a protobuf message."""


class HasDenormalizer(Exception):
    """The model rewrites decoded text as a whole."""


def decoding_drops_spaces(model: bytes) -> tuple[bool, bool]:
    """Whether decoding drops one space at the start of a text, and whether it drops all spaces there.

    Raises DamagedModel or HasDenormalizer.
    """
    dummy_prefix = remove_extra = 1
    try:
        for field, value in _fields(model):
            if field == _DENORMALIZER_SPEC and any(
                inner == _CHARSMAP and charsmap for inner, charsmap in _fields(value)
            ):
                raise HasDenormalizer
            if field == _NORMALIZER_SPEC:
                for inner, flag in _fields(value):
                    dummy_prefix = flag if inner == _ADD_DUMMY_PREFIX else dummy_prefix
                    remove_extra = flag if inner == _REMOVE_EXTRA_WHITESPACES else remove_extra
    except (IndexError, TypeError) as error:
        raise DamagedModel from error
    return bool(dummy_prefix or remove_extra), bool(remove_extra)


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: (number, value), a whole number or bytes.

    Raises IndexError or TypeError if the bytes are no message.
    """
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte: int = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise IndexError("a number of more than 64 bits")

    while position < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        if wire_type not in (1, 2, 5):
            raise IndexError(f"wire type {wire_type}")
        size = {1: 8, 5: 4}.get(wire_type) or varint()
        if wire_type == 2 and size == 0:
            yield number, b""
            continue
        if position + size > len(message):
            raise IndexError("a field that ends after the message")
        yield number, message[position : position + size]
        position += size
