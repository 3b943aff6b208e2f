"""Small tokenizers of both libraries, made here, and texts that show their differences."""

import io
import json
import re

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

# One emoji of four people and three joiners.
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
TEXTS = [
    "",
    " ",
    "   ",
    "hello world",
    " hello",
    "  two  spaces  ",
    "hello \n\n\tworld\n",
    "\n",
    "def f(x):\n    return x  # done",
    "日本語のテキスト、です。",
    "e\u0301 n\u0303 \u0e01\u0e49 \u05d1\u05bc",  # combining marks
    f"a{FAMILY}b {FAMILY}{FAMILY}",
    "\U0001f1e9\U0001f1ea\U0001f44d\U0001f3fd",  # a flag of two characters, a thumb with a skin colour
    "</s>",
    "hello</s>world",
    "hello </s> world<s>",
    "<x>hello<x><x> <x>",
    "\u2581hello\u2581",
    "\ufeffbom\u0000nul\u2028line",
    "naïve Straße ﬁn №",
    "<0x41><0xE2>",
    "xyz" * 50,
]
CORPUS = [text for text in TEXTS if "<" not in text] * 5


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["</s>", "<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Not special. Two have characters that GPT-2's alphabet uses for bytes.
    tokenizer.add_tokens(["<x>", "é é", "日本é"])
    return tokenizer


def llama():
    """As Llama-2's: the normaliser adds a prefix, and unknown characters become byte tokens."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    names += sorted({character for text in CORPUS for character in text} - set(" 本\U0001f469\u0301"))
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u2581", "hello"), ("\u2581", "\u2581")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    prepend, replace = normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([prepend, replace])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens(["<x>", " <y> "])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def gemma():
    """As `llama`, but a leading space is part of the text."""
    tokenizer = llama()
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    stages = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(stages)
    return tokenizer


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
        ),
    )
    return tokenizer


def word_piece():
    names = ["[UNK]", "hello", "world", "##s", "a", "##b", ".", "##.", "'", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[SEP]"])
    return tokenizer


def no_decoder():
    vocabulary = {"[UNK]": 0, "hello": 1, "world": 2, "a": 4}  # no token has id 3
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


# The makers of tokenizer.json, and the options of tokenizer.model by name.
JSON = [byte_level, llama, gemma, unigram, word_piece, no_decoder]
PIECES = {
    "sp_plain": {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.98,
        "user_defined_symbols": ["<user>", " sp "],
        "control_symbols": ["<ctl>"],
    },
    # The default normaliser collapses runs of spaces.
    "sp_open_llama": {"model_type": "bpe", "vocab_size": 420, "byte_fallback": True},
    "sp_unigram": {"model_type": "unigram", "vocab_size": 150},
    "sp_unigram_bytes": {
        "model_type": "unigram",
        "vocab_size": 400,
        "byte_fallback": True,
        "unk_surface": "?",
    },
    "sp_no_prefix": {"model_type": "unigram", "vocab_size": 150, "add_dummy_prefix": False},
    "sp_no_prefix_no_collapse": {
        "model_type": "unigram",
        "vocab_size": 150,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
    },
    "sp_collapse": {"model_type": "unigram", "vocab_size": 150, "remove_extra_whitespaces": False},
    "sp_suffix": {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "treat_whitespace_as_suffix": True,
    },
    "sp_other_ids": {
        "model_type": "unigram",
        "vocab_size": 150,
        "unk_id": 3,
        "bos_id": -1,
        "eos_id": 0,
        "pad_id": 1,
    },
}


def train(options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=2, hard_vocab_limit=False, **options
    )
    return model.getvalue()


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def random_ids(rng, size, favourites, length=14):
    """Random ids, 60 % from a few favourites, so that bytes, spaces and special tokens often meet."""
    favourites = favourites or range(size)
    return [rng.choice(favourites) if rng.random() < 0.6 else rng.randrange(size) for _ in range(length)]


def tokens_of(library, ids, skip):
    special = {token.content for token in library.get_added_tokens_decoder().values() if token.special}
    names = [library.id_to_token(index) for index in ids]
    return [name for name in names if name is not None and not (skip and name in special)]


def has_mixed_bytes(library, ids, skip):
    """Whether a run of byte tokens forms some characters and has other bytes, too.

    This is the only case in which we decode differently from the tokenizers library.
    """
    runs = re.findall("(?:<0x..>)+", "".join(tokens_of(library, ids, skip)))
    for run in runs:
        data = bytes(int(byte, 16) for byte in re.findall("<0x(..)>", run))
        whole = data.decode("utf-8", "ignore")
        if whole and whole.encode() != data:
            return True
    return False
