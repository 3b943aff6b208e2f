"""Public-domain books as plain text: Jane Austen's six novels, from Debian's package r-cran-janeaustenr.

    python tools/books.py FOLDER        # emma.txt, mansfield_park.txt, … of 0.5 to 1 MB each

Needs apt-get and dpkg-deb. Nothing is installed: the package is downloaded and unpacked in a temporary folder.
`tools/report.py` measures a model on these books, or on any other text files.
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import click

PACKAGE = "r-cran-janeaustenr"
DATA = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
TITLES = (
    "emma",
    "mansfield_park",
    "northanger_abbey",
    "persuasion",
    "pride_and_prejudice",
    "sense_and_sensibility",
)
STRINGS, STRING = 16, 9  # types of R: a vector of strings, and a string in it


def unpack(folder: Path) -> bytes:
    """Download Debian's package into `folder`, and return R's file of the novels."""
    for command in (["apt-get", "download", PACKAGE], ["dpkg-deb", "-x"]):
        files = [str(path) for path in folder.glob("*.deb")]
        arguments = [*command, *files, str(folder)] if command[0] == "dpkg-deb" else command
        try:
            subprocess.run(arguments, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise click.ClickException(
                f"{arguments[0]} failed ({error}): run `apt-get update` first; on another system, give your own "
                f"text files to tools/report.py"
            ) from None
    return (folder / DATA).read_bytes()


def read_novels(data: bytes) -> Iterator[str]:
    """The text of each zlib block of the file: one R vector with a string for each line of a novel."""
    place = 0
    while place < len(data):
        reader = zlib.decompressobj()
        raw = reader.decompress(data[place + 4 :])  # the first four bytes are the size
        place = len(data) - len(reader.unused_data)
        yield "\n".join(read_lines(raw)).strip() + "\n"


def read_lines(raw: bytes) -> Iterator[str]:
    """The strings of a vector in R's serialisation, version 3, big-endian."""
    (encoding_length,) = struct.unpack_from(">i", raw, 14)
    kind, count = struct.unpack_from(">ii", raw, 18 + encoding_length)
    if kind & 0xFF != STRINGS:
        raise click.ClickException(f"{DATA} holds an R object of type {kind & 0xFF}, not strings")
    place = 26 + encoding_length
    for _ in range(count):
        kind, length = struct.unpack_from(">ii", raw, place)
        assert kind & 0xFF == STRING
        yield raw[place + 8 : place + 8 + length].decode("utf-8")
        place += 8 + length


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(folder: Path) -> None:
    """Write the six novels into FOLDER as text files."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        novels = list(read_novels(unpack(Path(temporary))))
    for title, text in zip(TITLES, novels, strict=True):
        (folder / f"{title}.txt").write_text(text, encoding="utf-8")
        click.echo(f"{title}.txt: {len(text):,} characters, {text.splitlines()[0]}")


if __name__ == "__main__":
    main()
