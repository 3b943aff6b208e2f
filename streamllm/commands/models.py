"""`streamllm models`."""

from __future__ import annotations

from collections.abc import Iterator

import click

from streamllm.weights.catalogue import MODEL_TYPES, Variant


@click.command()
def models() -> None:
    """List the model families, and examples on the hub."""
    click.echo("\n".join(_lines()))


def _lines() -> Iterator[str]:
    yield f"{'model_type':<16} {'variant':<36} on the hub"
    for name, row in sorted(MODEL_TYPES.items()):
        if row.replaced_by is not None:
            continue
        label = name
        for variant in row.variants or (Variant("", ("",)),):
            description = variant.description
            for repository in variant.examples:
                yield f"{label:<16} {description:<36} {repository}".rstrip()
                label = description = ""
        for alias, other in sorted(MODEL_TYPES.items()):
            if other.replaced_by == name:
                yield f"{alias:<16} (the same family in old files)"
    yield ""
    yield "Any checkpoint of these model_types loads, by name or from a folder; see `streamllm info`."
