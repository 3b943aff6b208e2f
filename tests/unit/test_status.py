"""The status line: its counts, its row, and that it restores the terminal."""

from __future__ import annotations

import io
import os
import re
import time

import pytest

from streamllm import Stream
from streamllm.status import Status


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def stream(model, tokenizer) -> Stream:
    return Stream(model, tokenizer, window=20)


@pytest.fixture(autouse=True)
def terminal_of_60_by_10(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "10")
    monkeypatch.setattr("streamllm.status.INTERVAL", 0.0)


def run(stream: Stream, status: Status, **options: object) -> int:
    """Generates text with the status line, and returns the number of pieces."""
    return sum(status.tick() is None for _ in stream.generate("one", eos=[], **options))


def test_the_line_counts_tokens_not_pieces(stream) -> None:
    whole = "".join(stream.generate("one", max_new_tokens=20, eos=[]))
    stream.reset()
    with Status(stream, out := io.StringIO(), io.StringIO()) as status:
        pieces = run(stream, status, max_new_tokens=20, stop=whole[-3:] + "never")
    assert pieces == 21  # the last one is the text that a stop string could have started with
    assert out.getvalue().startswith("20 tokens · ")
    with Status(stream, out := io.StringIO(), io.StringIO()) as status:
        run(stream, status, max_new_tokens=3)
    assert out.getvalue().startswith("3 tokens · ")
    assert f"place {stream.seen}" in out.getvalue()


def test_without_a_terminal_one_line_comes_at_the_end(stream, monkeypatch) -> None:
    with Status(stream, out := io.StringIO(), Terminal()) as status:
        run(stream, status, max_new_tokens=3)
    assert re.fullmatch(r"3 tokens · .*\n", out.getvalue())
    monkeypatch.setenv("TERM", "dumb")
    with Status(stream, out := Terminal(), Terminal()) as status:
        run(stream, status, max_new_tokens=3)
    assert "\x1b" not in out.getvalue()


def test_on_a_terminal_without_the_text_the_line_is_refreshed_in_place(stream) -> None:
    with Status(stream, out := Terminal(), io.StringIO()) as status:
        run(stream, status, max_new_tokens=3)
    lines = out.getvalue().split("\r\x1b[2K")[1:]
    assert len(lines) == 4
    assert all(len(line) < 60 for line in lines[:-1])
    assert lines[-1].endswith("\n")


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, BrokenPipeError])
def test_on_a_terminal_with_the_text_the_bottom_row_is_restored(
    stream, error: type[BaseException] | None
) -> None:
    out = Terminal()
    try:
        with Status(stream, out, out) as status:
            run(stream, status, max_new_tokens=3)
            if error is not None:
                raise error
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    written = out.getvalue()
    assert written.index("\x1b[1;9r") < written.index("\x1b[10;1H") < written.rindex("\x1b[r")
    assert written.endswith("\n" if error is not BrokenPipeError else "\x1b8")


@pytest.mark.parametrize("rows", ["1", "2"])
def test_a_terminal_of_one_or_two_rows_is_not_divided(stream, monkeypatch, rows: str) -> None:
    monkeypatch.setenv("LINES", rows)
    out = Terminal()
    with Status(stream, out, out) as status:
        run(stream, status, max_new_tokens=3)
    assert not re.search(r"\x1b\[\d+;\d+r", out.getvalue())


def test_the_line_fits_the_terminal_that_it_is_on(stream, monkeypatch) -> None:
    out = Terminal()
    monkeypatch.setattr(out, "fileno", lambda: 77, raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((30 if fd == 77 else 90, 10)))
    with Status(stream, out, io.StringIO()) as status:
        run(stream, status, max_new_tokens=2)
    assert max(map(len, out.getvalue().split("\r\x1b[2K")[:-1])) == 29


def test_quiet_writes_nothing(stream) -> None:
    with Status(stream, out := Terminal(), Terminal(), quiet=True) as status:
        run(stream, status, max_new_tokens=2)
    assert out.getvalue() == ""


def test_the_reading_of_a_long_prompt_is_shown_from_a_second_on(stream, monkeypatch) -> None:
    monkeypatch.setattr("streamllm.status.READING_AFTER", 0.05)
    monkeypatch.setattr("streamllm.status.INTERVAL", 0.01)
    terminal = Terminal()
    with Status(stream, terminal, io.StringIO()) as status:
        with status.reading(lambda: 7_000):
            stream.feed("one two")
            time.sleep(0.3)
        shown = terminal.getvalue()
        seen = stream.seen
        run(stream, status, max_new_tokens=2)
    assert f"reading the prompt: {seen:,} of 7,000 tokens" in shown
    assert terminal.getvalue().count("reading") == shown.count("reading")


def test_a_short_prompt_and_a_file_show_no_reading(stream) -> None:
    for out in (Terminal(), io.StringIO()):
        with Status(stream, out, io.StringIO()) as status, status.reading(lambda: 1 / 0):
            stream.feed("one")
        assert "reading" not in out.getvalue()


def test_the_line_tells_that_the_text_repeats_itself(model, tokenizer) -> None:
    stream = Stream(model, tokenizer, window=240)
    status = Status(stream, io.StringIO(), io.StringIO())
    stream.feed("one two three " * 3)
    assert "repeats" not in status.line()
    stream.feed("one two three " * 60)
    assert re.search(r" · repeats itself (9\d|100)% · ", status.line())
    assert stream.repeated > 0.9
