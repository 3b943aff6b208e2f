"""The tokens that are compared: a text, or random ids where a checkpoint has no tokenizer."""

from __future__ import annotations

import torch
from torch import Tensor

from streamllm.loading import load_tokenizer
from streamllm.tokenizer import TOKENIZER_FILES
from streamllm.weights.checkpoint import Checkpoint
from streamllm.weights.source import Source

TEXT = """\
A stream has no last page. Its reader remembers the last few lines and forgets the rest, except for the very
beginning, which turns out to carry more weight than its words deserve: the first few tokens of a text are
looked at by every later one, whatever they are. Take them away and the reader loses the thread at once; keep
them, and a short memory is enough to continue forever.

On Tuesday, 14 March 1893, the harbour master wrote: "Wind from the north-east, 11 knots; three ships in,
none out. The new lamp (cost: £42.50) burns well." Nobody answered. Was it true? It hardly mattered; by the
evening the fog had swallowed the lamp, the ships and the sea.

def moving_average(values, width=5):
    \"\"\"The mean of the last `width` values, one for each that comes.\"\"\"
    recent, total = [], 0.0
    for index, value in enumerate(values):
        recent.append(value)
        total += value
        if len(recent) > width:
            total -= recent.pop(0)
        yield index, total / len(recent)

for i, mean in moving_average([3, 1, 4, 1, 5, 9, 2, 6], width=3):
    print(f"{i:>2}: {mean:.2f}")

SELECT name, COUNT(*) AS visits FROM harbour WHERE year BETWEEN 1890 AND 1899 GROUP BY name ORDER BY 2 DESC;

{"ships": [{"name": "Aurora", "tons": 812}, {"name": "Bella", "tons": null}], "lamp": true}

Voilà: naïve résumés, 東京 and Москва, ½ + ¼ = ¾, and a tab\tbetween two words.
"""


def tokens_to_compare(
    source: Source, checkpoint: Checkpoint, text: str | None, count: int, longest: int | None
) -> tuple[Tensor, str]:
    """Up to `count` ids, int64 [1, T], and a description of them for the report.

    text: None takes the built-in one, repeated until it is long enough. longest: the most tokens that
    transformers accepts, None for no limit. Raises ValueError for a text without a tokenizer, a text of fewer
    than 2 tokens, and ids outside the model's vocabulary.
    """
    if count < 2:
        raise ValueError(f"tokens must be at least 2, not {count}")
    count = count if longest is None else min(count, longest)
    vocab_size = checkpoint.config.vocab_size
    if not any(source.find(name) for name in TOKENIZER_FILES[:2]):
        if text is not None:
            raise ValueError(f"{source.name} has no tokenizer to read a text with: leave the text out")
        ids = torch.randint(
            0,
            vocab_size,
            (1, count),
            generator=torch.Generator("cpu").manual_seed(0),
            dtype=torch.int64,
            device="cpu",
        )
        return ids, "random tokens (the checkpoint has no tokenizer)"
    commit = getattr(source, "commit", None)
    name = source.name if commit is not None else source.file("config.json").parent
    tokenizer = load_tokenizer(name, revision=commit)
    found = tokenizer.encode(TEXT if text is None else text)
    while text is None and len(found) < count:
        found += tokenizer.encode(TEXT, add_special_tokens=False)
    found = found[:count]
    if len(found) < 2:
        raise ValueError(f"the text has {len(found)} tokens; at least 2 are needed")
    if max(found) >= vocab_size:
        raise ValueError(f"token id {max(found)} is outside the model's vocabulary of 0 … {vocab_size - 1}")
    return torch.tensor(
        [found], dtype=torch.int64, device="cpu"
    ), f"tokens of {'the built-in text' if text is None else 'the text given'}"
