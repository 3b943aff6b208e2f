"""Texts for training and evaluation that every machine with Python has: the sources of the standard library.

Nothing is downloaded or shipped. The texts belong to the running interpreter, so they differ a little between
Python versions: a number that was measured on them belongs to one version.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT: tuple[str, ...] = (
    "argparse.py",
    "tarfile.py",
    "subprocess.py",
    "dataclasses.py",
    "configparser.py",
    "statistics.py",
    "pickle.py",
    "difflib.py",
    "shutil.py",
    "heapq.py",
    "fractions.py",
    "threading.py",
    "http/client.py",
    "textwrap.py",
    "smtplib.py",
)
"""The modules that the embedded checkpoint never saw, relative to the standard library's folder."""

# There are more tests than library; encodings and pydoc_data are tables; the rest is not the library.
_LEFT_OUT_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "lib-dynload",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)


def held_out_texts() -> list[str]:
    """The held-out modules that this Python version has, in the order of `HELD_OUT`."""
    folder = _standard_library()
    return [_read(folder / name) for name in HELD_OUT if (folder / name).is_file()]


def training_texts() -> list[str]:
    """All other modules, ordered by their path."""
    folder = _standard_library()
    return [_read(folder / name) for name in _module_names(folder) if name not in HELD_OUT]


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _module_names(folder: Path) -> Iterator[str]:
    # Paths with forward slashes sort in the same order on every system.
    for name in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py")):
        *parents, module = name.split("/")
        # Files of the build (_sysconfigdata, config-3.x-…) describe one machine.
        built_here = module.startswith("_sysconfigdata") or any(
            part.startswith("config-") for part in parents
        )
        if not built_here and _LEFT_OUT_FOLDERS.isdisjoint(parents):
            yield name


def _read(path: Path) -> str:
    # A few old modules are not UTF-8; a replaced letter does no harm here. Line ends become "\n".
    return path.read_text(encoding="utf-8", errors="replace")
