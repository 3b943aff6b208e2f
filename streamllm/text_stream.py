"""TextStream: text in, text out. What a `Stream` does without conversations and files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from streamllm.cache import SinkCache
from streamllm.generation import check_max_new_tokens, make_sampler, token_ids
from streamllm.generation_config import GenerationConfig, SamplingSettings, resolve
from streamllm.loop import Loop
from streamllm.models.checks import whole_number
from streamllm.sampling import LogitsProcessor, Sampler, TokenLogProbs, breaker_tokens, token_logprobs
from streamllm.session.dialogue import Dialogue
from streamllm.session.view import AnswerText, Cut, Removed, View
from streamllm.stop_strings import Held, Segment, check_stops
from streamllm.tokenizer import IncrementalDecoder, Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The decoder of a text that goes on depends on its last tokens only: a character has at most 4 bytes.
DECODER_TOKENS = 16


class TextStream:
    """The base of `Stream`: a text that is decoded, shown and cut at stop strings, also after an interrupt."""

    tokenizer: Tokenizer
    _is_in_engine = False  # a thread of a `streamllm.Engine` computes it now

    def _start(self, model: nn.Module, cache: SinkCache, dialogue: Dialogue | None = None) -> None:
        """Begin a text with an empty cache. dialogue: messages that wait."""
        self._loop = Loop(model, cache)
        self._view = View()
        self._dialogue = Dialogue() if dialogue is None else dialogue
        self._decoder: IncrementalDecoder = self.tokenizer.decoder()
        self._decoder_at: int | None = 0  # the number of tokens that it decoded; None while it decodes
        self._breakers: tuple[object, tuple[tuple[int, ...], ...]] | None = None
        self._sampler: Sampler | None = None  # of the last `generate`
        self._goes_on = False  # whether that call draws more tokens, unless a stop string ends it
        self.finish_reason: str | None = None
        self.logprobs: list[TokenLogProbs] = []

    @property
    def model(self) -> nn.Module:
        return self._loop.model

    @property
    def cache(self) -> SinkCache:
        return self._loop.cache

    @property
    def seen(self) -> int:
        """How many tokens the cache has taken in."""
        return self._loop.seen

    @property
    def said(self) -> int:
        """How many tokens the model has generated."""
        return self._view.generated

    @property
    def repeated(self) -> float:
        """Which share of the last text repeats itself: 0 … 1, from the 4-grams of its last 512 tokens at most.

        Above 0.5, the text is in a loop; `dry_multiplier=0.8` prevents most of them.
        """
        return self._loop.repeated

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
        self._check_free()
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
        self._check_free()
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
        self._sampler, self._goes_on = sampler, limit != 0
        return self._pieces(sampler, stops, limit, top)

    def _check_free(self) -> None:
        """Raises ValueError where an engine computes the stream now."""
        if self._is_in_engine:
            raise ValueError(
                "the stream is in an engine already: wait until its request has ended, or detach it"
            )

    # What a stream with conversations and files adds

    def _make_room(self) -> None:
        """Take entries out of the cache before tokens are fed."""

    def _may_run_ahead(self) -> bool:
        """Whether the next forward may run before its token is fed: nothing needs to be taken out before it."""
        return True

    def _record(self, piece: str, view: View) -> View:
        """The view after a piece was shown."""
        return view

    def _save_if_due(self, is_end_of_turn: bool) -> None:
        """Called after each piece."""

    # The state, also after an interrupt

    def _finish(self) -> None:
        """Complete changes of the cache that an interrupt has cut off."""
        self._finish_cut()

    @property
    def _end(self) -> int:
        """The number of the next token, behind one that was drawn and decoded and is not pushed yet."""
        return max(self._view.number, self._loop.end)

    def _settle(self) -> None:
        """Complete what an interrupt left."""
        self._finish()
        self._decode_pushed()
        if self._loop.drawn is not None and self._view.number == self._loop.end:
            self._decode(self._loop.drawn)

    def _take_back(
        self, start: int, dialogue: Dialogue | None = None, answer: AnswerText | None = None
    ) -> None:
        """Take the tokens from number `start` on out of the stream.

        dialogue, answer: the conversation without them, and the text of its last answer.
        """
        view, cut = self._view, Cut(start, (), self._loop.log.cuts, dialogue)
        answer = view.answer if dialogue is None else answer
        self._view = replace(view, held=Held(), owed="", unsaid=0, stopped=False, cut=cut, answer=answer)
        self._finish_cut()

    def _feed(self) -> None:
        self._make_room()
        self._loop.feed()

    def _encode(
        self, text: str | Sequence[int] | Tensor, bos: bool | None, special_tokens: bool
    ) -> list[int]:
        if bos not in (None, True, False):
            raise TypeError(f"bos must be True, False or None, not {bos!r}")
        self._finish()
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
        self._finish()
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
            self._finish()
            self._decode_pushed()
            self._save_if_due(False)  # what was pushed may be more tokens than an interval
            if self._view.stopped:
                piece = self._view.owed
                after = self._record(piece, replace(self._view, owed="", stopped=False))
                self._view, self.finish_reason = after, "stop"; yield piece  # noqa: E702  # fmt: skip
                self._save_if_due(True)
                return
            if not self._view.unsaid:
                self._before_draw()
                token = loop.draw(sampler, count, run_ahead=self._may_run_ahead() and count + 1 != limit)
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
            self._goes_on = reason is None
            piece, held = view.held.release(stops)
            piece = view.owed + piece
            rest = held.shown(len(held.text)) if reason is not None else ""
            now = None if rest else reason
            held = Held() if now is not None else held
            after = self._record(piece, replace(view, held=held, owed="", unsaid=0))
            self._view, self.finish_reason = after, now; yield piece  # noqa: E702  # fmt: skip
            if rest:  # no stop string comes any more
                after = self._record(rest, replace(self._view, held=Held()))
                self._view, self.finish_reason = after, reason; yield rest  # noqa: E702  # fmt: skip
            self._save_if_due(reason is not None)
            if reason is not None:
                return
        self.finish_reason = "length"  # of 0 tokens

    # An engine, which draws tokens for many streams together, asks and does this before it takes the next piece

    @property
    def _needs_token(self) -> bool:
        """Whether the next piece of the running `generate` needs a token that was not drawn yet."""
        view, loop = self._view, self._loop
        is_drawn = loop.drawn is not None and view.number == loop.end
        return self._goes_on and not view.stopped and not view.unsaid and not is_drawn

    def _before_draw(self) -> None:
        """Push the token before, and make room for it."""
        if self._view.number > self._loop.end:
            self._loop.push_drawn()
        self._make_room()

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
            if cut.dialogue is not None:
                self._dialogue = cut.dialogue
            end = loop.end
            self._view = replace(view, number=end, generated_to=end, cut=None, first=first, removed=removed)

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
