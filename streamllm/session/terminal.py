"""A chat in a terminal: lines in, answers out, and commands that begin with a slash."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from streamllm.chat import ChatTemplateError
from streamllm.session.window import capacity
from streamllm.status import REPEATS
from streamllm.stream import Stream

PROMPT = "> "
PROGRESS_TOKENS = 2_000  # a longer prompt is announced while it is read
HISTORY_FILE = Path("~/.cache/streamllm/chat_history")

HELP = """\
/save FILE      save the session        /undo         take the last message and its answer back
/load FILE      go on with another      /retry        answer the last message again
/fork FILE      save a copy             /drop N       take turn N out of the window
/visible        what the model sees     /system TEXT  start again with this system prompt
/stats          tokens, cache, speed    /quit, /help  end; this list
Ctrl-C interrupts an answer, Ctrl-D ends; Alt-Enter begins a new line (with prompt_toolkit)."""


class Chat:
    """One conversation in a terminal. Without a chat template, the model continues the text."""

    def __init__(
        self, stream: Stream, settings: dict[str, Any], system: str | None = None, session: Path | None = None
    ) -> None:
        self.stream, self.settings, self.system, self.session = stream, settings, system, session
        self.has_template = stream.tokenizer.chat_template is not None
        self._tokens, self._seconds = 0, 0.0
        self._tries = 0  # how often the last message was answered again

    def run(self) -> None:
        """Read lines until the end of the input, or until the terminal is closed. The session is saved then."""
        read = line_reader()
        for name in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), _exit)
        try:
            self._read_lines(read)
        finally:
            if self.stream._end != self.stream._saved_at:  # an answer was interrupted
                self._save()

    def _read_lines(self, read: Callable[[str], str]) -> None:
        cache = self.stream.cache
        turns = f"{len(self.stream.turns)} turns so far. " if self.stream.turns else ""
        self._tell(
            f"{turns}The model sees sinks={cache.sinks}, window={cache.window} tokens; cache "
            f"{cache.nbytes / 1e6:.1f} MB. Type a message, or /help."
        )
        if not self.has_template:
            self._tell("The model has no chat template: it continues the text that you type.")
        while True:
            try:
                line = read(PROMPT)
            except KeyboardInterrupt:
                self._tell("Ctrl-D ends.")
                continue
            except EOFError:
                self._tell("")
                return
            if line.strip():
                try:
                    self.take(line)
                except EOFError:  # /quit
                    return

    def take(self, line: str) -> None:
        """A message or a command. Errors that a user can cause are printed in one sentence, and the session goes on."""
        try:
            if line.startswith("/"):
                name, _, rest = line[1:].partition(" ")
                command: Callable[[str], None] | None = getattr(self, f"command_{name.strip()}", None)
                if command is None:
                    self._tell(f"there is no command /{name.strip()}; /help lists them")
                else:
                    command(rest.strip())
            else:
                self.answer(line)
        except KeyboardInterrupt:
            self._tell("\n(interrupted; the session goes on)")
            self._save()
        except (ValueError, OSError, ChatTemplateError) as error:
            self._tell(f"Error: {' '.join(str(error).split())}")

    def answer(self, text: str) -> None:
        """Print the answer to a message, as it is generated."""
        self._tries = 0
        if not self.has_template:
            self._print(self.stream.generate(text, **self.settings))
            return
        messages = [{"role": "user", "content": text}]
        if self.system and not self.stream.turns:
            messages.insert(0, {"role": "system", "content": self.system})
        self._print(self.stream.chat(messages, **self.settings))

    def _print(self, pieces: Iterator[str]) -> None:
        waiting = len(self.stream._loop.unfed)
        if waiting > PROGRESS_TOKENS and sys.stderr.isatty():
            self._read_with_progress(waiting)
        before, started = self.stream.said, time.monotonic()
        try:
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
        finally:
            self._tokens += self.stream.said - before
            self._seconds += time.monotonic() - started
            sys.stdout.write("\n")
            sys.stdout.flush()
        share = self.stream.repeated
        if share > REPEATS:
            self._tell(f"({share:.0%} of the last text repeats itself; /undo, or start with --dry 0.8)")

    def _save(self) -> None:
        """Save the session now, if it has a file: an answer was interrupted, or turns were taken out."""
        if self.session is not None and self.stream.seen:
            try:
                self.stream.save(self.session)
            except OSError as error:
                self._tell(f"Error: {error}")

    def _read_with_progress(self, waiting: int) -> None:
        for left in self.stream.reading():
            sys.stderr.write(f"\rreading: {waiting - left:,} of {waiting:,} tokens")
            sys.stderr.flush()
        sys.stderr.write("\r\x1b[2K")

    # Commands

    def command_quit(self, rest: str) -> None:
        raise EOFError

    command_exit = command_quit

    def command_help(self, rest: str) -> None:
        self._tell(HELP)

    def command_save(self, rest: str) -> None:
        path = self._path(rest)
        self.stream.save(path)
        self._tell(f"saved to {path}")

    def command_fork(self, rest: str) -> None:
        path = self._path(rest)
        self.stream.fork().save(path)
        self._tell(f"a copy was saved to {path}; this session goes on, and does not change the copy")

    def command_load(self, rest: str) -> None:
        path = self._path(rest)
        self.stream = Stream.load(path, self.stream.model, self.stream.tokenizer)
        where = ""
        if self.session is not None:  # the session that was open before keeps its file
            self.session, where = path, ", which is saved there from now on"
            self.stream.autosave(path)
        self._tell(f"{len(self.stream.turns)} turns from {path}{where}")

    def command_undo(self, rest: str) -> None:
        undone = self.stream.undo()
        self._save()
        self._tell(f"took {len(undone)} turns back")

    def command_retry(self, rest: str) -> None:
        undone = [
            {"role": turn.role, "content": turn.text}
            for turn in self.stream.undo()
            if turn.role != "assistant"
        ]
        self._tries += 1
        seed = self.settings.get("seed")
        settings = {**self.settings, "seed": None if seed is None else seed + self._tries}
        if undone:
            self._print(self.stream.chat(undone, **settings))

    def command_drop(self, rest: str) -> None:
        turns = self.stream.turns
        if not rest:
            for number, turn in enumerate(turns):
                self._tell(f"{number:4} {turn.role}: {' '.join(turn.text.split())[:60]}")
            return
        if not rest.isdigit():
            raise ValueError(f"/drop takes the number of a turn, not {rest!r}; /drop alone lists them")
        self.stream.drop(int(rest))
        self._save()

    def command_visible(self, rest: str) -> None:
        self._tell(self.stream.visible(special_tokens=True))

    def command_system(self, rest: str) -> None:
        self.stream.reset()
        self.system = rest or None
        self._tell(
            "a new conversation" + (", with this system prompt" if rest else ", without a system prompt")
        )

    def command_stats(self, rest: str) -> None:
        cache = self.stream.cache
        speed = f"{self._tokens / self._seconds:,.1f} tokens/s" if self._seconds else "– tokens/s"
        self._tell(
            f"{self.stream.seen:,} tokens seen, {self.stream.said:,} generated, {speed}, {int(cache.held[0]):,} of "
            f"{capacity(cache):,} entries held, cache {cache.nbytes / 1e6:.1f} MB, "
            f"{len(self.stream.turns)} turns, {self.stream.repeated:.0%} of the last text repeats itself"
        )

    def _path(self, rest: str) -> Path:
        if not rest and self.session is None:
            raise ValueError("give the name of a file")
        return Path(rest).expanduser() if rest else self.session or Path()

    def _tell(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _exit(number: int, frame: Any) -> None:
    """Handle SIGTERM and SIGHUP: leave the chat as usual, so that the session is saved."""
    raise SystemExit(128 + number)


def line_reader() -> Callable[[str], str]:
    """prompt_toolkit where it is installed and the input is a terminal; else plain input."""
    if not sys.stdin.isatty():
        return _plain
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory
        from prompt_toolkit.key_binding import KeyBindings
    except ImportError:
        # Without readline, a terminal cuts a line at 4,095 characters, and sends each line of a pasted text by itself.
        with suppress(ImportError):
            import readline

            readline.parse_and_bind("set enable-bracketed-paste on")
        return _plain
    keys: Any = KeyBindings()

    def begin_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    keys.add("escape", "enter")(begin_line)
    file = HISTORY_FILE.expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    session: Any = PromptSession(history=FileHistory(str(file)), key_bindings=keys)
    return lambda prompt: str(session.prompt(prompt))


def _plain(prompt: str) -> str:
    return input(prompt if sys.stdin.isatty() else "")


def answer_prompts(conversation: Chat, path: Path) -> None:
    """Answer the turns of each line of a JSON-lines file, all in one session."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            turns = entry["turns"] if "turns" in entry else [entry["prompt"]]
            turns = [turns] if isinstance(turns, str) else list(turns)
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"line {number} of {path} is not a JSON object with `turns` or `prompt`"
            ) from None
        for text in turns:
            sys.stdout.write(f"{PROMPT}{text}\n")
            conversation.answer(str(text))
