"""Decoding token by token."""

import random
import re
import tracemalloc

import pytest

from streamllm.tokenizer import TokenizerError, load_tokenizer_files
from tests.unit.tokenizer.samples import FAMILY, JSON, PIECES, TEXTS, has_mixed_bytes, random_ids

ALL = [*(make.__name__ for make in JSON), *PIECES]


def stream(tokenizer, ids, **options):
    decoder = tokenizer.decoder(**options)
    return [decoder.push(index) for index in ids], decoder.flush()


@pytest.mark.parametrize("name", ALL)
def test_pieces_of_a_stream_join_to_the_whole_text(name, folders):
    """After each token, the printed text and the held bytes are the decoding of the ids so far."""
    folder, library = folders(name)
    tokenizer = load_tokenizer_files(folder)
    rng = random.Random(3)
    cases = [tokenizer.encode(text) for text in TEXTS]
    cases += [random_ids(rng, tokenizer.vocab_size + 2, [1, 2, *range(200, 210)], 30) for _ in range(60)]
    reference = library.decode if name not in PIECES else None
    for ids in cases:
        for skip in (True, False):
            decoder = tokenizer.decoder(skip_special_tokens=skip)
            printed = ""
            for count, index in enumerate(ids, 1):
                printed += decoder.push(index)
                held = tokenizer.decoder(skip_special_tokens=skip)
                whole = "".join(map(held.push, ids[:count])) + held.flush()
                assert whole.startswith(printed)
                assert set(whole[len(printed) :]) <= {"\ufffd"}  # only incomplete characters are held back
                if reference and not has_mixed_bytes(library, ids[:count], skip):
                    assert whole == reference(ids[:count], skip_special_tokens=skip)
            assert printed + decoder.flush() == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["byte_level", "llama", "gemma"])
def test_incomplete_characters_are_not_printed(name, folders):
    tokenizer = load_tokenizer_files(folders(name)[0])
    for text in TEXTS:
        pieces, rest = stream(tokenizer, tokenizer.encode(text))
        assert "\ufffd" not in "".join(pieces)
        assert rest == ""
    ids = tokenizer.encode(FAMILY, add_special_tokens=False)
    pieces, _ = stream(tokenizer, ids)
    if name != "byte_level":  # where the emoji may be one token
        assert len(ids) > len(FAMILY) == sum(map(bool, pieces))  # each character as soon as it is whole


@pytest.mark.parametrize("name", ["byte_level", "llama", "gemma", "sp_no_prefix_no_collapse"])
def test_decoding_inverts_encoding(name, folders):
    folder, library = folders(name)
    tokenizer = load_tokenizer_files(folder)
    for text in TEXTS:
        if name.startswith("sp_") and library.unk_id() in library.encode(text):
            continue
        if not re.search("</?s>|[\u2581\ufb01\u2116\u0000]|<0x", text) or name == "byte_level":
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids, skip_special_tokens=name != "byte_level") == text


def test_leading_space_is_dropped_only_at_the_start(folders):
    for name in ("llama", "sp_open_llama", "sp_unigram", "byte_level"):
        folder, _ = folders(name)
        tokenizer = load_tokenizer_files(folder)
        prompt = tokenizer.encode("hello")
        more = tokenizer.encode(
            " hello hello" if name == "byte_level" else "hello hello", add_special_tokens=False
        )
        decoder = tokenizer.decoder()
        first = "".join(map(decoder.push, prompt))
        assert first + decoder.flush() == "hello"
        assert "".join(map(decoder.push, more)) == " hello hello"
        if name != "byte_level":
            assert tokenizer.decode(more) == "hello hello"
            begin = [tokenizer.bos_token_id or 1, *more]
            assert tokenizer.decode(begin) == "hello hello"


def test_stream_continues_after_flush(folders):
    tokenizer = load_tokenizer_files(folders("byte_level")[0])
    ids = tokenizer.encode("日")
    assert len(ids) > 1
    decoder = tokenizer.decoder()
    assert decoder.push(ids[0]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""
    assert "".join(map(decoder.push, ids)) == "日"


@pytest.mark.parametrize("name", ["byte_level", "llama", "sp_unigram_bytes"])
def test_long_stream_uses_constant_memory(name, folders):
    tokenizer = load_tokenizer_files(folders(name)[0])
    rng = random.Random(4)
    ids = [rng.randrange(tokenizer.vocab_size + 3) for _ in range(20_000)]
    ids += [tokenizer.token_to_id("<0xF0>") or 0] * 2_000  # never a whole character
    decoder = tokenizer.decoder()
    for index in ids:
        decoder.push(index)
    tracemalloc.start()
    try:
        for index in ids:
            decoder.push(index)
        assert tracemalloc.get_traced_memory()[1] < 4_000
    finally:
        tracemalloc.stop()
    assert len(decoder.flush()) <= 3


def test_ids_outside_the_vocabulary_decode_to_nothing(folders):
    for name in ("byte_level", "llama", "sp_open_llama", "no_decoder"):
        tokenizer = load_tokenizer_files(folders(name)[0])
        assert tokenizer.decode([tokenizer.vocab_size, 2**32, 2**70]) == ""
        with pytest.raises(TokenizerError, match="token id -1"):
            tokenizer.decode([-1])
        with pytest.raises(TypeError):
            tokenizer.decode([1.5])
    assert load_tokenizer_files(folders("no_decoder")[0]).decode([1, 3, 2]) == "hello world"
