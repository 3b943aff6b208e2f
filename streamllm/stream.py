"""Stream: text in, text out, forever."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamllm.cache import SinkCache
from streamllm.generation import check_max_new_tokens, make_sampler, token_ids
from streamllm.generation_config import GenerationConfig, SamplingSettings, resolve
from streamllm.loop import Loop
from streamllm.models.checks import whole_number
from streamllm.sampling import LogitsProcessor, Sampler, TokenLogProbs, breaker_tokens, token_logprobs
from streamllm.session import SessionError, chatting, saving, window
from streamllm.session.dialogue import Dialogue, Message, Turn, check_messages, without_known
from streamllm.session.state import capture, restore
from streamllm.session.view import AnswerText, Cut, Removed, View
from streamllm.stop_strings import Held, Segment, check_stops
from streamllm.tokenizer import IncrementalDecoder, Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The decoder of a text that goes on depends on its last tokens only: a character has at most 4 bytes.
DECODER_TOKENS = 16
DEFAULT_SINKS = 4


class Stream:
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
        self._breakers: tuple[object, tuple[tuple[int, ...], ...]] | None = None
        self._fingerprint: dict[str, Any] | None = None
        self._autosave: saving.Autosave | None = None
        self._model = model
        number = sinks if isinstance(sinks, int) else DEFAULT_SINKS
        self._make_cache(number if pin is None else len(self._pinned))

    def _make_cache(self, sinks: int) -> None:
        """Begin with an empty cache of so many sinks."""
        self.cache = SinkCache(
            self._model, sinks=sinks, window=self._window, chunk=self._chunk, quantize=self._quantize
        )
        self._start(self._model)

    def _start(self, model: nn.Module) -> None:
        self._loop = Loop(model, self.cache)
        self._view = View()
        self._dialogue = Dialogue()
        self._decoder: IncrementalDecoder = self.tokenizer.decoder()
        self._decoder_at: int | None = 0  # the number of tokens that it decoded; None while it decodes
        self._saved_at = 0  # how many tokens the stream had when it was last saved
        self.finish_reason: str | None = None
        self.logprobs: list[TokenLogProbs] = []
        if self._pinned:
            self._push(self._pinned)

    @property
    def model(self) -> nn.Module:
        return self._loop.model

    @property
    def seen(self) -> int:
        """How many tokens the cache has taken in."""
        return self._loop.seen

    @property
    def said(self) -> int:
        """How many tokens the model has generated."""
        return self._view.generated

    def __repr__(self) -> str:
        return f"Stream({type(self.model).__module__}, {self.cache!r})"

    def feed(
        self, text: str | Sequence[int] | Tensor, *, bos: bool | None = None, special_tokens: bool = True
    ) -> int:
        """Let the model read a text, or ids, without generating. Returns the number of tokens.

        A text in the middle of a stream goes on where the stream ends, without a space or a BOS token in front. So
        the pieces of a text have the ids of the whole, up to merges across the cuts.

        Args:
            bos: begin with a BOS token, unless the text does. None: at the start of the stream, as the tokenizer's
                files have it.
            special_tokens: special tokens that are written in the text become their ids; False: they stay text.

        Raises ValueError for ids outside the vocabulary, and for an empty text at the start of a stream whose
        tokenizer adds no BOS token; TokenizerError for a text that the tokenizer cannot encode.
        """
        tokens = self._encode(text, bos, special_tokens)
        self._push(tokens)
        self._feed()
        return len(tokens)

    def generate(
        self,
        text: str | Sequence[int] | Tensor = "",
        *,
        bos: bool | None = None,
        special_tokens: bool = True,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        top_logprobs: int | None = None,
        logits_processor: LogitsProcessor | None = None,
        generation_config: GenerationConfig | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> Iterator[str]:
        """The text that the model generates after `text` (or ids), piece by piece, in whole characters.

        Ends before one of the strings in `stop`; special tokens are compared with them, too. What a stop string cut
        off is taken out of the stream again, so the model remembers what was shown. A piece may be empty while a
        character is not complete. `top_logprobs`: keep the log-probability of each token, and of so many of the
        likeliest, in `logprobs`. `bos`, `special_tokens`: as `feed`. `streamllm.generate` describes the other arguments
        and errors.

        Raises ValueError for an empty text at the start of a stream whose tokenizer adds no BOS token. After any
        error at the call, nothing was pushed.
        """
        config = resolve(self.model, generation_config, settings)
        stops = check_stops(stop)
        limit = check_max_new_tokens(max_new_tokens)
        top = top_logprobs
        if top is not None:
            top = whole_number("top_logprobs", top, 0, self._loop.vocab_size)
        tokens, breakers = self._encode(text, bos, special_tokens), self._breaker_tokens(config)
        sampler = make_sampler(self._loop, tokens, config, seed, logits_processor, breakers)
        self._push(tokens)
        self.finish_reason, self.logprobs = None, []
        return self._pieces(sampler, stops, limit, top)

    def reset(self) -> None:
        """Forget everything and start a new text."""
        self.cache.reset()
        self._start(self.model)

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
        new = without_known(check_messages(text_or_messages), self._messages())
        variables = self._template_variables(tools, template_variables)
        if options.get("eos") is None and options.get("generation_config") is None:
            options["eos"] = chatting.default_eos(self)
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
        check_messages([message])
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
        self._settle()
        turns = self.turns
        try:
            chosen = turns[turn] if isinstance(turn, int) else turns[turns.index(turn)]
        except (IndexError, ValueError):
            raise ValueError(f"there is no turn {turn!r}: the conversation has {len(turns)} turns") from None
        dialogue = self._now
        if dialogue.answer is not None and chosen.start == dialogue.answer.start:
            dialogue = chatting.closed(self, dialogue)
        window.drop(self, chosen.start, chosen.stop)
        left = tuple(kept for kept in dialogue.turns if kept.start != chosen.start)
        self._dialogue = replace(dialogue, turns=left, before=None, pushed_to=0)

    def undo(self) -> list[Turn]:
        """Take the last `chat` or `say` back, with its answer. Returns the turns that were taken back.

        With a snapshot (`snapshots`: of so many of the last calls), and as long as the window is not full, the stream
        is exactly as it was before. Otherwise what the turns pushed out of the window stays out.

        Raises ValueError where there is nothing to undo.
        """
        self._settle()
        dialogue, turns = self._now, self.turns
        if not dialogue.calls:
            raise ValueError("there is no turn to undo")
        call = dialogue.calls[-1]
        if call.snapshot is not None:
            restore(self, call.snapshot)
        else:
            chatting.undo_without_snapshot(self, dialogue, call)
        return [turn for turn in turns if turn.start >= call.start]

    def fork(self) -> Stream:
        """A second stream that goes on from here, with a cache of its own."""
        state = capture(self)
        other = Stream(self.model, self.tokenizer, **self._settings())
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
        saving.save(self, path)
        self._saved_at = self._end

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module, tokenizer: Tokenizer) -> Stream:
        """The stream that `save` wrote. It goes on as if it had not been stopped.

        The model may have another type, device or compiled step than the one that the stream was saved with.
        Raises streamllm.session.SessionError, a ValueError, for a damaged file and for another model or tokenizer;
        OSError where the file cannot be read.
        """
        settings, state, own = saving.open_file(path, model, tokenizer)
        stream = cls(model, tokenizer, **settings)
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
            self.save(due.path)

    def _settings(self) -> dict[str, Any]:
        """The arguments of `Stream` that make one with a cache like this one."""
        return {
            "sinks": self.cache.sinks,
            "window": self.cache.window,
            "chunk": self.cache.chunk,
            "quantize": self.cache.quantize,
            "evict": self.evict,
            "snapshots": self.snapshots,
        }

    # The state, also after an interrupt

    @property
    def _end(self) -> int:
        """The number of the next token, behind one that was drawn and decoded and is not pushed yet."""
        return max(self._view.number, self._loop.end)

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
        if dialogue.answer is not None or self._view.owed:
            self._view = replace(self._view, owed="")  # it belongs to the answer before

    def _settle(self) -> None:
        """Complete what an interrupt left."""
        self._finish_cut()
        self._decode_pushed()
        if self._loop.drawn is not None and self._view.number == self._loop.end:
            self._decode(self._loop.drawn)

    def _take_back(self, start: int) -> None:
        """Take the tokens from number `start` on out of the stream."""
        cut = Cut(start, (), self._loop.log.cuts)
        self._view = replace(self._view, held=Held(), owed="", unsaid=0, stopped=False, cut=cut)
        self._finish_cut()

    def _feed(self) -> None:
        self._make_room()
        self._loop.feed()

    def _make_room(self) -> None:
        if self.evict == "turn":
            window.make_room(self, self.turns)

    def _encode(
        self, text: str | Sequence[int] | Tensor, bos: bool | None, special_tokens: bool
    ) -> list[int]:
        if bos not in (None, True, False):
            raise TypeError(f"bos must be True, False or None, not {bos!r}")
        log = self._loop.log
        end = self._end
        if isinstance(text, str):
            only_bos = end == 1 and log.tokens == [self.tokenizer.bos_token_id]
            last = log.tokens[-1] if log.tokens and self._view.generated_to != end else None
            tokens = self.tokenizer.encode_piece(
                text,
                bos=False if only_bos and bos is None else bos,
                continuation=end > 0 and not only_bos,
                after=last,
                special_tokens=special_tokens,
            )
        else:
            tokens = token_ids(text)
            front = self.tokenizer.encode_piece("", bos=True, continuation=end > 0) if bos else []
            tokens = tokens if tokens[: len(front)] == front else front + tokens
        if not tokens and not end:
            raise ValueError(
                "the prompt is empty and the tokenizer adds no BOS token: give some text to begin with"
            )
        self._loop.check(tokens)
        return tokens

    def _push(self, tokens: Sequence[int]) -> None:
        """Push the user's tokens, behind what the model has said."""
        self._finish_cut()
        if not tokens:
            return
        loop = self._loop
        if loop.drawn is not None:
            if self._view.number == loop.end:  # interrupted before it was decoded
                self._decode(loop.drawn)
            loop.push_drawn()
        view = self._view
        owed = view.owed + view.held.shown(len(view.held.text))
        view = replace(view, held=Held(), owed=owed, unsaid=0, stopped=False)
        self._view = view.with_first(loop.end, tuple(tokens[: self.cache.sinks]), self.cache.sinks)
        loop.push(tokens)
        self._decode_pushed()

    def _pieces(
        self, sampler: Sampler, stops: Sequence[str], limit: int | None, top_logprobs: int | None
    ) -> Iterator[str]:
        # The state changes in the line that yields the piece: an interrupt finds both done, or neither.
        loop, count = self._loop, 0
        while limit is None or count < limit:
            self._finish_cut()
            self._decode_pushed()
            if self._view.stopped:
                piece = self._view.owed
                after = self._record(piece, replace(self._view, owed="", stopped=False))
                self._view, self.finish_reason = after, "stop"; yield piece  # noqa: E702  # fmt: skip
                self._save_if_due(True)
                return
            if not self._view.unsaid:
                if self._view.number > loop.end:
                    loop.push_drawn()
                self._make_room()
                ahead = (
                    self.evict == "token"
                    or int(self.cache.held[0]) + len(loop.unfed) < self.cache.sinks + self.cache.window
                )
                token = loop.draw(sampler, count, run_ahead=ahead and count + 1 != limit)
                if top_logprobs is not None:
                    self._keep_logprobs(token, top_logprobs)
                self._decode(token)
            view, last = self._view, loop.drawn
            found = view.held.find(stops)
            if found is not None:
                then = self.tokenizer.encode_piece(found.kept, continuation=True) if found.kept else []
                cut = Cut(view.number - found.tokens, tuple(then), loop.log.cuts)
                owed = view.owed + found.shown
                self._view = replace(view, held=Held(), owed=owed, unsaid=0, stopped=True, cut=cut)
                continue
            count += 1
            reason = "eos" if last in sampler.config.eos else "length" if count == limit else None
            piece, held = view.held.release(stops if reason is None else ())
            piece = view.owed + piece
            after = self._record(piece, replace(view, held=held, owed="", unsaid=0))
            self._view, self.finish_reason = after, reason; yield piece  # noqa: E702  # fmt: skip
            self._save_if_due(reason is not None)
            if reason is not None:
                return
        self.finish_reason = "length"  # of 0 tokens

    def _finish_cut(self) -> None:
        """Take the tokens of a stop string out of the stream, if there are some to take out."""
        cut = self._view.cut
        if cut is not None:
            if self._loop.log.cuts == cut.cuts:
                self._loop.take_back(cut.start, cut.then)
            loop, view = self._loop, self._view
            self._decoder_at = None
            again = int(not cut.then and loop.end - loop.seen == 1)  # the last token that stays is fed again
            start, first = cut.start - again, view.first
            if start < self.cache.sinks:
                first = (*first[:start], *loop.unfed)[: self.cache.sinks]
            removed = Removed.add(
                view.removed, Removed(start, loop.seen, False), loop.seen - loop.log.history.size * 2
            )
            end = loop.end
            self._view = replace(view, number=end, generated_to=end, cut=None, first=first, removed=removed)

    def _record(self, piece: str, view: View) -> View:
        """The view after a piece was shown that belongs to an answer in a conversation."""
        answer = self._dialogue.answer
        if answer is None:
            return view
        text = view.answer
        if text is None or text.begins != answer.begins:
            text = AnswerText(answer.begins, [], 0)
        return replace(view, answer=text.add(piece))

    def _decode(self, token: int) -> None:
        """Decode a token that the model has generated."""
        view = self._view
        text = self._decoder_for(view.number).push(token)
        special = self.tokenizer.special_text(token)
        segments = [Segment(text)]
        if special is not None:
            segments.append(Segment(special, is_shown=False, is_token=False))
        number = view.number + 1
        self._view = replace(
            view.with_first(view.number, (token,), self.cache.sinks),
            number=number,
            generated_to=number,
            generated=view.generated + 1,
            held=view.held.add(*segments),
            unsaid=1,
        )
        self._decoder_at = number

    def _decode_pushed(self) -> None:
        """Decode tokens that the user has pushed, so that the next ones are not decoded as the start of a text."""
        number, loop = self._view.number, self._loop
        if number < loop.end:
            decoder = self._decoder_for(number)
            for token in loop.last_tokens(loop.end - number):
                decoder.push(token)
            self._view = replace(self._view, number=loop.end)
            self._decoder_at = loop.end

    def _decoder_for(self, number: int) -> IncrementalDecoder:
        """The decoder after so many tokens, about to decode more."""
        if self._decoder_at != number:  # it was interrupted, or tokens were taken back
            self._decoder = self.tokenizer.decoder()
            before = self._loop.last_tokens(self._loop.end)
            if self._loop.end > number:
                before = before[: number - self._loop.end]
            whole = len(before) >= number
            for token in before if whole else before[-DECODER_TOKENS:]:
                self._decoder.push(token)
        self._decoder_at = None
        return self._decoder

    def _keep_logprobs(self, token: int, top: int) -> None:
        logits = self._loop.logits
        assert logits is not None
        with torch.inference_mode():
            chosen = torch.tensor([token], dtype=torch.int64, device=logits.device)
            self.logprobs += token_logprobs(logits[None], chosen, top).rows()

    def _breaker_tokens(self, config: GenerationConfig) -> tuple[tuple[int, ...], ...]:
        """The breakers of DRY, which are found once: all tokens of the vocabulary are looked at."""
        if not config.dry_multiplier:
            return ()
        given = config.dry_sequence_breakers
        if self._breakers is None or self._breakers[0] != given:
            self._breakers = given, breaker_tokens(self.tokenizer, given)
        return self._breakers[1]
