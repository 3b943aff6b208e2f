"""Compares real tokenizers, chat templates and configs with transformers.

    python tools/real_files.py FOLDER …

A folder holds unpacked packages and repositories, at any depth. Used are files that are a tokenizer.json or a
sentencepiece model under any name, chat templates (*.jinja, or in tokenizer_config.json), and config.json. None
of them is part of this project. A table is printed for each kind; the exit code is 1 if anything differs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import click
import transformers
from real_configs import Config, compare_config, find_configs
from real_templates import compare_template, find_templates
from real_tokenizers import compare_tokenizer, find_tokenizers
from real_turns import compare_turns


def table(title: str, names: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> bool:
    """Prints the rows as they come, and the sum. Returns whether all agree: their last column is empty."""
    print(f"\n{title}\n" + "  ".join(names))
    count = differ = 0
    for row in rows:
        count += 1
        differ += bool(row[-1])
        print("  ".join(str(cell) for cell in row), flush=True)
    print(f"{count} compared, {differ} differ")
    return differ == 0


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--texts", default=500, show_default=True, help="Texts for each tokenizer.")
@click.option("--chats", default=40, show_default=True, help="Chats for each template.")
@click.option(
    "--only", type=click.Choice(["tokenizers", "templates", "turns", "configs"]), help="One kind alone."
)
def main(folders: tuple[Path, ...], texts: int, chats: int, only: str | None) -> None:
    """Compare everything in FOLDERS with transformers."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    parts: dict[str, Callable[[], bool]] = {
        "tokenizers": lambda: table(
            f"Tokenizers, {texts} texts each",
            ("tokenizer", "reference", "encode", "decode", "incremental", "pieces", "differences"),
            (compare_tokenizer(found, texts) for found in find_tokenizers(folders)),
        ),
        "templates": lambda: table(
            f"Chat templates, {chats} chats each",
            ("template", "rendered", "refused by both", "differences"),
            (compare_template(name, source, chats) for name, source in find_templates(folders)),
        ),
        "turns": lambda: table(
            "Chat templates turn by turn, 8 conversations each",
            (
                "template",
                "equal",
                "up to spaces",
                "rewrites earlier turns",
                "refused by the template",
                "differences",
            ),
            (compare_turns(name, source) for name, source in find_templates(folders)),
        ),
        "configs": lambda: table(
            "Configs, scaled down",
            ("config", "difference in std of the logits", "differences"),
            (compare_config(found) for found in _distinct(find_configs(folders))),
        ),
    }
    agree = [compare() for name, compare in parts.items() if only in (None, name)]
    sys.exit(0 if all(agree) else 1)


def _distinct(configs: Iterable[Config]) -> Iterable[Config]:
    seen: set[str] = set()
    for config in configs:
        if config.scaled not in seen:
            seen.add(config.scaled)
            yield config


if __name__ == "__main__":
    main()
