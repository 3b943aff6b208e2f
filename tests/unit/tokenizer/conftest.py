"""The sample tokenizers on disk."""

import pytest
import sentencepiece

from tests.unit.tokenizer import samples
from tests.unit.tokenizer.samples import PIECES, train


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """get(name): the folder of a sample tokenizer, and the library's own object for it."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("tokenizer")
            if name in PIECES:
                data = train(PIECES[name])
                (folder / "tokenizer.model").write_bytes(data)
                made[name] = folder, sentencepiece.SentencePieceProcessor(model_proto=data)
            else:
                library = getattr(samples, name)()
                library.save(str(folder / "tokenizer.json"))
                made[name] = folder, library
        return made[name]

    return get
