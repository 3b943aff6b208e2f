"""`streamllm convert`."""

from __future__ import annotations

from pathlib import Path

import click

from streamllm.commands.options import allow_pickle_option, dtype_option, revision_option


@click.command()
@click.argument("name", metavar="NAME|FOLDER")
@click.argument("out", type=click.Path(path_type=Path))
@revision_option
@click.option(
    "--max-shard-size", default="5GB", show_default=True, help="Largest size of one file, such as 500MB."
)
@dtype_option
@allow_pickle_option
def convert(
    name: str, out: Path, revision: str | None, max_shard_size: str, dtype: str, allow_pickle: bool
) -> None:
    """Write a checkpoint as safetensors.

    NAME is a hub name or a folder. OUT is a new folder, in the layout of Hugging Face, which both transformers
    and streamllm load. With --dtype auto, each tensor keeps its type.
    """
    from streamllm.convert import convert as convert_checkpoint

    folder = convert_checkpoint(
        name, out, revision=revision, max_shard_size=max_shard_size, dtype=dtype, allow_pickle=allow_pickle
    )
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        click.echo(f"{path.stat().st_size:>15,}  {path}")
