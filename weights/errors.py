"""The errors that a checkpoint can cause, and how their messages show values from a file.

A message says what was given, what is allowed, and what to do next.
"""

from __future__ import annotations


class CheckpointError(Exception):
    """The checkpoint cannot be loaded.

    It is raised itself where the files are damaged; the subclasses stand for the other causes.
    """


class CheckpointNotFound(CheckpointError):
    """A folder, repository, revision or file does not exist, may not be read, or cannot be downloaded."""


class UnsupportedConfig(CheckpointError):
    """The files are intact but ask for something that this library does not implement."""


MAX_SHOWN_CHARACTERS = 120


def shorten(text: str, max_characters: int = MAX_SHOWN_CHARACTERS) -> str:
    """Text from a file or a library, ready for an error message: one line, printable, of limited length."""
    printable = "".join(
        character if character.isprintable() else ascii(character)[1:-1]
        for character in text[: max_characters + 1]
    )
    return printable if len(printable) <= max_characters else printable[: max_characters - 1] + "…"


def show(value: object, max_characters: int = MAX_SHOWN_CHARACTERS) -> str:
    """The `repr` of a value from a file, shortened for an error message."""
    try:
        return shorten(repr(value), max_characters)
    except RecursionError:  # JSON may be nested almost as deeply as Python's stack
        return f"a deeply nested {type(value).__name__}"


def list_names(names: list[str], max_names: int = 5) -> str:
    """The first of many names, shortened for an error message, and how many follow."""
    shown = ", ".join(shorten(name) for name in names[:max_names])
    return shown if len(names) <= max_names else f"{shown} and {len(names) - max_names} more"
