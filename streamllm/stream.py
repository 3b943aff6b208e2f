"""Stream: text in, text out, forever."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from streamllm.cache import SinkCache
from streamllm.generation_config import resolve
from streamllm.session import SessionError, chatting, saving, window
from streamllm.session.dialogue import Dialogue, Message, Turn, check_messages, without_known
from streamllm.session.state import State, capture, restore
from streamllm.session.view import AnswerText, Drop, View
from streamllm.text_stream import TextStream
from streamllm.tokenizer import Tokenizer


class Stream(TextStream):
    """An endless text that a model and its user write together, in constant memory.

    `sinks`, `window`, `chunk`, `quantize`: see `SinkCache`, which is `stream.cache`. Each `generate` goes on where
    the text ends, after Ctrl-C, too: no token is lost, and none is fed twice.

    Attributes:
        finish_reason: why the last `generate` ended: "eos", "stop", "length" (max_new_tokens), or None where it did
            not end.
        logprobs: the log-probabilities of the tokens of the last `generate`, if it was asked for them.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        sinks: int | str = 4,
        window: int | None = None,
        chunk: int | None = None,
        quantize: str | None = None,
        *,
        evict: str = "token",
        pin: str | None = None,
        snapshots: int = 1,
    ) -> None:
        if isinstance(sinks, str) and sinks != "system":
            raise ValueError(f'sinks must be a number of tokens or "system", not {sinks!r}')
        if evict not in ("token", "turn"):
            raise ValueError(f'evict must be "token" or "turn", not {evict!r}')
        if isinstance(snapshots, bool) or not isinstance(snapshots, int) or snapshots < 0:
            raise ValueError(f"snapshots must be a whole number of at least 0, not {snapshots!r}")
        if pin is not None and sinks == "system":
            raise ValueError('give sinks="system" or pin, not both')
        self.tokenizer = tokenizer
        self.evict, self.pin, self.snapshots = evict, pin, snapshots
        self.pins_system = sinks == "system"
        self._pinned = [] if pin is None else tokenizer.encode_piece(pin)
        self._window, self._chunk, self._quantize = window, chunk, quantize
        self._fingerprint: dict[str, Any] | None = None
        self._autosave: saving.Autosave | None = None
        self._model = model
        number = sinks if isinstance(sinks, int) else chatting.DEFAULT_SINKS
        self._make_cache(number if pin is None else len(self._pinned))

    def _make_cache(self, sinks: int, dialogue: Dialogue | None = None) -> None:
        """Begin with an empty cache of so many sinks. dialogue: messages that wait."""
        cache = SinkCache(
            self._model, sinks=sinks, window=self._window, chunk=self._chunk, quantize=self._quantize
        )
        self._start(self._model, cache, dialogue)

    def _start(self, model: nn.Module, cache: SinkCache, dialogue: Dialogue | None = None) -> None:
        super()._start(model, cache, dialogue)
        # What an interrupt may have cut off
        self._restoring: State | None = None
        self._dropping: Drop | None = None
        self._saved_at = 0  # how many tokens the stream had when it was last saved
        if self._pinned:
            self._push(self._pinned)

    def __repr__(self) -> str:
        return f"Stream({type(self.model).__module__}, {self.cache!r})"

    def reset(self) -> None:
        """Forget everything and start a new text."""
        self._check_free()
        if self.pins_system:  # the next system prompt may be longer, or there may be none
            self._make_cache(chatting.DEFAULT_SINKS)
        else:
            self.cache.reset()
            self._start(self.model, self.cache)

    # A conversation

    def chat(
        self,
        text_or_messages: str | Sequence[Message],
        *,
        tools: Sequence[Message] | None = None,
        continue_final_message: bool = False,
        template_variables: Message | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """The model's answer to a user's text, or to messages, piece by piece.

        The checkpoint's chat template writes the prompt. Each turn is fed once: the model reads only what the
        template adds to the conversation so far, so a turn costs the same at any length. Special tokens that a
        message spells stay text. An interrupted answer stays in the conversation as far as it came;
        `generate("")` goes on with it.

        Args:
            text_or_messages: what the user says; or new messages, for example
                `[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]`. A list that
                repeats the conversation from its start may be given, too.
            tools: JSON schemas of functions that the model may call, given with the first message.
            continue_final_message: the last message is the beginning of the model's answer.
            template_variables: other variables of the template, for example `{"enable_thinking": False}`.
            options: the arguments of `generate`. eos: by default, the ids that end a text by the model's files and the
                tokenizer's own.

        Raises ChatTemplateError where the tokenizer has no template, or its template refuses the messages or rewrites
        earlier turns. Otherwise as `generate`. After any error at the call, nothing was pushed.
        """
        self._check_free()
        new = without_known(check_messages(text_or_messages), self._messages())
        variables = self._template_variables(tools, template_variables)
        if options.get("eos") is None and options.get("generation_config") is None:
            options["eos"] = self.tokenizer.eos_token_ids(self.model)
        eos = options.get("eos")
        config = resolve(self.model, options.get("generation_config"), {"eos": eos})
        ids, dialogue = chatting.begin(
            self, new, variables, eos=config.eos, generate=True, continued=continue_final_message
        )
        with self._going_on(dialogue):
            return self.generate(ids, **options)

    def say(self, role: str, text: str) -> int:
        """Add a message to the conversation without an answer. Returns the number of tokens that were fed.

        A system prompt that the template writes into the first user message is fed with that message. Raises
        ChatTemplateError as `chat`.
        """
        message = {"role": role, "content": text}
        self._check_free()
        check_messages([message])
        self._finish()
        if chatting.waits(self, role, None, message):
            now = self._now
            self._dialogue = replace(now, waiting=(*now.waiting, message))
            return 0
        ids, dialogue = chatting.begin(self, [message], None, eos=(), generate=False)
        with self._going_on(dialogue):
            self._push(ids)
        self._feed()
        self._save_if_due(True)
        return len(ids)

    def reading(self) -> Iterator[int]:
        """Read what waits, chunk by chunk. Yields how many tokens are left each time."""
        while len(self._loop.unfed) > self.cache.chunk:
            self._make_room()
            if len(waiting := self._loop.unfed) > self.cache.chunk:
                window.read(self, waiting[: self.cache.chunk])
            yield len(self._loop.unfed)

    @property
    def turns(self) -> list[Turn]:
        """The messages of the conversation with their tokens' numbers, the last answer as far as it came."""
        self._finish()
        dialogue = self._now
        answer = dialogue.answer
        return [*dialogue.turns, *([] if answer is None else [chatting.answer_turn(self, answer)])]

    def visible(self, special_tokens: bool = False) -> str:
        """The text that the model can still see. `[…]` stands where a part of the stream is missing."""
        return window.visible(self, special_tokens)

    def drop(self, turn: int | Turn) -> None:
        """Take a turn out of what the model can see; the rest closes up. Tokens of the sinks stay.

        turn: one of `turns`, or its number in that list. Raises ValueError for any other.
        """
        self._check_free()
        self._settle()
        turns = self.turns
        try:
            chosen = turns[turn] if isinstance(turn, int) else turns[turns.index(turn)]
        except (IndexError, ValueError):
            raise ValueError(f"there is no turn {turn!r}: the conversation has {len(turns)} turns") from None
        dialogue = self._now
        if dialogue.answer is not None and chosen.start == dialogue.answer.start:
            dialogue = chatting.closed(self, dialogue)
        left = tuple(kept for kept in dialogue.turns if kept.start != chosen.start)
        window.drop(self, chosen, replace(dialogue, turns=left, before=None, pushed_to=0))

    def undo(self) -> list[Turn]:
        """Take the last `chat` or `say` back, with its answer. Returns the turns that were taken back.

        With a snapshot (the last `snapshots` calls have one), or while nothing has left the window, the stream is
        exactly as it was before. Otherwise what the turns pushed out of the window stays out.

        Raises ValueError where there is nothing to undo.
        """
        self._check_free()
        self._settle()
        dialogue, turns = self._now, self.turns
        if not dialogue.calls:
            raise ValueError("there is no turn to undo")
        call = dialogue.calls[-1]
        if call.snapshot is not None:
            state = call.snapshot
            restore(self, replace(state, dialogue=replace(state.dialogue, calls=dialogue.calls[:-1])))
        else:
            chatting.undo_without_snapshot(self, dialogue, call)
        return [turn for turn in turns if turn.start >= call.start]

    def fork(self) -> Stream:
        """A second stream that goes on from here, with a cache of its own."""
        self._check_free()
        state = capture(self)
        other = self._like(self.model, self.tokenizer, self._settings())
        restore(other, state)
        other._fingerprint = self._fingerprint
        return other

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that the continuation depends on to a safetensors file.

        The file is as large as the cache and the conversation's text. It is written beside `path` and then
        renamed, so after an error or a crash at any moment there is the old file or the new one. Raises OSError where
        it cannot be written.
        """
        self._check_free()
        saving.save(self, path)
        if self._autosave is not None and self._autosave.path == Path(path):
            self._saved_at = self._end

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module, tokenizer: Tokenizer) -> Stream:
        """The stream that `save` wrote. It goes on as if it had not been stopped.

        The model may have another type, device or compiled step than the one that the stream was saved with.
        Raises streamllm.session.SessionError, a ValueError, for a damaged file and for another model or tokenizer;
        OSError where the file cannot be read.
        """
        settings, state, own = saving.open_file(path, model, tokenizer)
        stream = cls._like(model, tokenizer, settings)
        try:
            restore(stream, state)
        except ValueError as error:
            raise SessionError(f"{path} does not fit: {error}") from None
        stream._fingerprint = own
        stream._saved_at = stream._end
        return stream

    def autosave(self, path: str | os.PathLike[str] | None, every: int | str = "turn") -> None:
        """Save the stream to `path` after each turn, or each time that it has `every` more tokens. None: no more.

        An error of writing (OSError) is raised by `generate`, `chat` or `say`, and the stream can go on.
        """
        self._autosave = saving.autosave(path, every)

    def _save_if_due(self, is_end_of_turn: bool) -> None:
        due = self._autosave
        if due is None:
            return
        if is_end_of_turn if due.tokens is None else self._end - self._saved_at >= due.tokens:
            self._saved_at = self._end
            saving.save(self, due.path)

    @classmethod
    def _like(cls, model: nn.Module, tokenizer: Tokenizer, settings: dict[str, Any]) -> Stream:
        """A stream with the `_settings` of another one."""
        arguments = dict(settings)
        pins_system = arguments.pop("pins_system", False)
        stream = cls(model, tokenizer, **arguments)
        stream.pins_system = pins_system
        return stream

    def _settings(self) -> dict[str, Any]:
        """The arguments of `Stream` that make one with a cache like this one, and what it pins."""
        return {
            "sinks": self.cache.sinks,
            "window": self.cache.window,
            "chunk": self.cache.chunk,
            "quantize": self.cache.quantize,
            "evict": self.evict,
            "snapshots": self.snapshots,
            "pin": self.pin,
            "pins_system": self.pins_system,
        }

    # The state, also after an interrupt

    def _finish(self) -> None:
        if self._restoring is not None:
            restore(self, self._restoring)
        window.finish_drop(self)
        super()._finish()

    @property
    def _now(self) -> Dialogue:
        """The conversation. Where an interrupt fell before its last messages were pushed, the one before."""
        dialogue = self._dialogue
        interrupted = dialogue.before is not None and self._loop.end < dialogue.pushed_to
        return dialogue.before if interrupted and dialogue.before is not None else dialogue

    def _messages(self) -> list[Message]:
        self._settle()
        return list(chatting.closed(self, self._now).messages)

    def _template_variables(
        self, tools: Sequence[Message] | None, variables: Message | None
    ) -> dict[str, Any] | None:
        if tools is None and variables is None:
            return None
        given = {} if tools is None else {"tools": list(tools)}
        return {**self._now.variables, **given, **(variables or {})}

    @contextmanager
    def _going_on(self, dialogue: Dialogue) -> Iterator[None]:
        """Push the tokens of `dialogue` within the context; an error before leaves the conversation as it was."""
        before = self._now
        self._dialogue = dialogue
        try:
            yield
        except BaseException:
            if self._loop.end < dialogue.pushed_to:
                self._dialogue = before
            raise
        self._dialogue = replace(dialogue, before=None)  # which holds a snapshot
        if dialogue.answer is not None or self._view.owed:
            self._view = replace(self._view, owed="")  # it belongs to the answer before

    def _make_room(self) -> None:
        if self.evict == "turn":
            window.make_room(self)

    def _may_run_ahead(self) -> bool:
        if self.evict == "token":
            return True
        held = int(self.cache.held[0]) + len(self._loop.unfed)
        return held < window.capacity(self.cache)

    def _record(self, piece: str, view: View) -> View:
        """The view after a piece was shown that belongs to an answer in a conversation."""
        answer = self._dialogue.answer
        if answer is None:
            return view
        text = view.answer
        if text is None or text.begins != answer.begins:
            text = AnswerText(answer.begins, [], 0)
        return replace(view, answer=text.add(piece))
