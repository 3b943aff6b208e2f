"""Encoding a text piece by piece, as a stream is fed."""

import json
import random

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from streamllm.tokenizer import TokenizerError, load_tokenizer_files
from tests.unit.tokenizer import samples
from tests.unit.tokenizer.samples import JSON, PIECES, TEXTS, write

PLAIN = [text for text in TEXTS if "<" not in text and "\u2581" not in text and "\u0000" not in text]
# WordPiece and WordLevel split at words, so a cut inside a word changes it.
SUBWORDS = [make.__name__ for make in JSON[:4]]


def metaspace(scheme):
    library = samples.llama()
    library.normalizer = None
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return library


def byte_level_with_prefix():
    library = samples.byte_level()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return library


def saved(folder, library, config=None):
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    write(folder, tokenizer_config=config or {})
    return load_tokenizer_files(folder)


def without_merges(library):
    """The same tokenizer, whose ids do not depend on how a text is cut."""
    state = json.loads(library.to_str())
    state["model"]["merges"] = []
    return Tokenizer.from_str(json.dumps(state))


def pieces(rng, text):
    cuts = sorted(rng.sample(range(1, len(text)), min(len(text) - 1, 3))) if text else []
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def encoded(tokenizer, parts, **options):
    """The ids of a stream that is fed these parts."""
    ids, started = [], False
    for part in parts:
        after = ids[-1] if ids else None
        ids += tokenizer.encode_piece(part, continuation=started, after=after, **options)
        started = True
    return ids


MAKERS = {
    "byte_level": samples.byte_level,
    "byte_level_with_prefix": byte_level_with_prefix,
    "llama": samples.llama,
    "gemma": samples.gemma,
    "metaspace_always": lambda: metaspace("always"),
    "metaspace_first": lambda: metaspace("first"),
    "metaspace_never": lambda: metaspace("never"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_pieces_have_the_ids_of_the_whole_text(name, tmp_path):
    """Without merges the ids are the same for any cuts; special tokens may be next to a cut, but not across it."""
    tokenizer = saved(tmp_path, without_merges(MAKERS[name]()))
    rng = random.Random(5)
    for text in PLAIN:
        for _ in range(10):
            assert encoded(tokenizer, pieces(rng, text)) == tokenizer.encode(text)
    for parts in (
        ["</s>", "hello"],
        ["hello</s>", "world"],
        ["hello", "</s>world</s> x"],
        ["a", "b</s>c", "d", "</s></s>", "e"],
    ):
        assert encoded(tokenizer, parts) == tokenizer.encode("".join(parts))


@pytest.mark.parametrize("name", [*SUBWORDS, *(name for name in PIECES if name != "sp_suffix")])
def test_pieces_decode_to_what_the_whole_text_decodes_to(name, folders):
    tokenizer = load_tokenizer_files(folders(name)[0])
    # Most models here collapse spaces, but not across a cut, and join a letter with its accent.
    collapses = name in PIECES and name not in ("sp_plain", "sp_no_prefix_no_collapse")
    rng = random.Random(6)
    for text in PLAIN:
        if collapses and "\u0301" in text:
            continue
        for _ in range(10):
            found = tokenizer.decode(encoded(tokenizer, pieces(rng, text)))
            expected = tokenizer.decode(tokenizer.encode(text))
            if collapses:
                found, expected = " ".join(found.split()), " ".join(expected.split())
            assert found == expected


@pytest.mark.parametrize("name", ["llama", "unigram", "sp_plain", "sp_open_llama", "sp_other_ids"])
def test_a_continuation_has_no_prefix_space(name, folders):
    tokenizer = load_tokenizer_files(folders(name)[0])
    ids = encoded(tokenizer, ["hello wor", "ld", "\nUser: x", " y"])
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode("hello world\nUser: x y"))
    assert ids[0] == tokenizer.encode("hello wor")[0]


def test_older_llama_has_a_prefix_behind_special_tokens_only_if_the_last_id_is_known(folders):
    tokenizer = load_tokenizer_files(folders("llama")[0])
    hello, prefixed = tokenizer.token_to_id("hello"), tokenizer.token_to_id("\u2581hello")
    assert tokenizer.encode("a</s>hello")[-1] == prefixed
    assert tokenizer.encode_piece("hello", continuation=True) == [hello]
    assert tokenizer.encode_piece("hello", continuation=True, after=2) == [prefixed]
    assert tokenizer.encode_piece("hello</s>hello", continuation=True) == [hello, 2, prefixed]


def test_bos_is_added_once(tmp_path):
    tokenizer = saved(tmp_path, samples.llama(), {"bos_token": "<s>", "eos_token": "</s>"})
    assert tokenizer.encode("<s>hello")[:2] == [1, 1]  # as transformers
    assert tokenizer.encode_piece("<s>hello") == tokenizer.encode("hello")
    assert tokenizer.encode_piece("<s>hello", bos=True) == tokenizer.encode("hello")
    assert tokenizer.encode_piece("hello") == tokenizer.encode("hello")
    assert tokenizer.encode_piece("") == [1]
    assert tokenizer.encode_piece("hello", bos=False) == tokenizer.encode("hello")[1:]
    assert tokenizer.encode_piece("", continuation=True) == []
    assert tokenizer.encode_piece("hello", continuation=True, bos=True)[0] == 1
    assert tokenizer.encode_piece("<s>", special_tokens=False)[:2] == [1, tokenizer.token_to_id("\u2581")]


def test_bos_can_be_asked_for_and_refused(tmp_path, folders):
    tokenizer = saved(tmp_path, samples.byte_level(), {"bos_token": "<s>", "eos_token": "</s>"})
    hello = tokenizer.encode("hello")
    assert not tokenizer.adds_bos
    assert tokenizer.encode_piece("hello") == hello
    assert tokenizer.encode_piece("hello", bos=True) == [tokenizer.bos_token_id, *hello]
    tokenizer.adds_bos = tokenizer.adds_eos = True
    assert tokenizer.encode("hello") == [tokenizer.bos_token_id, *hello, tokenizer.eos_token_id]
    assert tokenizer.encode("hello", add_special_tokens=False) == hello
    assert tokenizer.encode_piece("hello") == [tokenizer.bos_token_id, *hello]
    tokenizer.adds_bos = tokenizer.adds_eos = False
    assert tokenizer.encode("hello") == hello
    nameless = load_tokenizer_files(folders("byte_level")[0])
    with pytest.raises(TokenizerError, match="no bos_token"):
        nameless.encode_piece("hello", bos=True)


def test_eos_of_the_post_processor_is_not_in_a_stream(tmp_path):
    library = samples.byte_level()
    library.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    names = {"bos_token": "</s>", "eos_token": "</s>", "add_eos_token": False}
    tokenizer = saved(tmp_path / "plain", library, names)
    hello = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [*hello, 0]
    assert tokenizer.encode_piece("hello") == hello
    # transformers' class for GPT-NeoX does not use the post-processor.
    names["tokenizer_class"] = "GPTNeoXTokenizer"
    assert saved(tmp_path / "neox", library, names).encode("hello") == hello


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("name", ["llama", "byte_level", "metaspace_always"])
def test_special_tokens_in_a_text_are_text_if_asked(name, normalized, tmp_path):
    library = MAKERS[name]()
    state = json.loads(library.to_str())
    for token in state["added_tokens"]:
        token["normalized"] = normalized
    tokenizer = saved(tmp_path, Tokenizer.from_str(json.dumps(state)))
    for text in ("<s>", "hello</s>hello", "<s> </s>", "</s></s>\u0000"):
        for continuation in (True, False):
            ids = tokenizer.encode_piece(text, special_tokens=False, continuation=continuation, bos=False)
            assert not {1, 2, library.token_to_id("<s>"), library.token_to_id("</s>")} & set(ids)
            assert tokenizer.decode(ids).removeprefix(" ") == text
    # Added tokens that are not special stay what they are.
    assert tokenizer.token_to_id("<x>") in tokenizer.encode_piece("hello <x>", special_tokens=False)


def test_special_tokens_that_the_vocabulary_finds_in_text_are_cut(tmp_path):
    """A unigram vocabulary holds its special tokens as pieces."""
    library = samples.unigram()
    tokenizer = saved(tmp_path, library)
    assert tokenizer.encode("a</s>") == [*tokenizer.encode("a"), 2]
    ids = tokenizer.encode_piece("a</s>b<s>", special_tokens=False)
    assert not {1, 2} & set(ids)
    names = {"[UNK]": 0, "<s>": 1, "<": 2, "s>": 3}
    library = Tokenizer(models.WordLevel(names, unk_token="[UNK]"))
    library.add_special_tokens(["<s>"])
    tokenizer = saved(tmp_path, library)
    assert tokenizer.encode_piece("<s>", special_tokens=False) == [2, 3]


def test_sentencepiece_special_tokens_in_a_text_are_text_if_asked(folders):
    tokenizer = load_tokenizer_files(folders("sp_plain")[0])
    for text in ("<s>", "hello</s>hello", "<user></s>"):
        ids = tokenizer.encode_piece(text, special_tokens=False, bos=False)
        assert not {1, 2} & set(ids)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode_piece("<s>x", special_tokens=True, bos=False)[0] == 1
    assert tokenizer.encode_piece("<s>x")[:2] != [1, 1]


def test_spaces_between_two_pieces_are_kept_by_strip(tmp_path):
    library = samples.gemma()
    library.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(" ", "\u2581")])
    tokenizer = saved(tmp_path, without_merges(library))
    for parts in (["a ", "b"], ["a", " b"], ["  a", " b ", "c"]):
        assert encoded(tokenizer, parts) == tokenizer.encode("".join(parts))


def test_flags_of_added_tokens_act_in_a_piece(tmp_path):
    library = samples.byte_level()
    library.add_special_tokens([AddedToken("<left>", lstrip=True), AddedToken("<right>", rstrip=True)])
    tokenizer = saved(tmp_path, library)
    for text in ("a <left> b", "a <right> b", "<left><right>"):
        assert tokenizer.encode_piece(text, continuation=True) == tokenizer.encode(text)
