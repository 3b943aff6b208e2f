"""Loop: one stream between a model and its cache, which can be interrupted at any moment and then goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from streamllm.cache import SinkCache
from streamllm.models.step import geometry_of
from streamllm.sampling import History, RowSettings, Sampler, check_finite, sample

# Device types that work through a queue: the next forward is queued before the last token is read from them.
RUN_AHEAD = ("cuda",)


@dataclass(frozen=True, eq=False)
class Log:
    """The tokens of a stream, numbered from 0. It is replaced as a whole: an interrupt leaves the old or the new one.

    The cache knows how many tokens it has taken in. The tokens behind them wait to be fed.
    """

    first: int  # the number of the first of `tokens`
    tokens: list[int]  # the last token that the cache took in, and those that wait
    history: History  # the last tokens, for the penalties
    ahead: int  # the number of the first token that the history has read
    cuts: int = 0  # how often tokens were taken back

    @property
    def end(self) -> int:
        """The number of the next token."""
        return self.first + len(self.tokens)


@dataclass(frozen=True, eq=False)
class LoopState:
    """A copy of what a loop knows besides its cache; see `Loop.state`."""

    logits: Tensor | None  # [V], for the next token, if they are known
    first: int  # the number of the first of `tokens`
    tokens: tuple[int, ...]  # the last token that the cache took in, and those that wait
    history: tuple[int, ...]  # the last tokens, for the penalties
    history_size: int
    cuts: int  # how often tokens were taken back
    drawn: int | None


@dataclass(frozen=True, eq=False)
class _Ahead:
    """A forward that ran before its token was fed."""

    place: int
    token: int
    logits: Tensor | None  # [V]; None where it failed
    back: object  # of the cache's `step_back` from it
    failed: Exception | None  # is raised when the token is fed for the same sampler
    sampler: Sampler


class Loop:
    """One stream between a model and its cache: push tokens, draw the next one, push it, and so on.

    A drawn token is not a part of the stream until it is pushed. All state is either replaced in one assignment or
    derived from what the cache has seen, so after an exception (Ctrl-C) no token is lost or fed twice.

    A device that works through a queue (`RUN_AHEAD`) never waits for the host: a token is fed to the next forward on
    the device, and read by the host only then. The cache steps back from that forward, and on again when the token
    is pushed and fed. So between two calls the state is the same as if nothing had run ahead.
    """

    def __init__(self, model: nn.Module, cache: SinkCache) -> None:
        if cache.batch_size != 1:
            raise ValueError(f"a stream has one row; the cache was made for a batch of {cache.batch_size}")
        self.model, self.cache = model, cache
        self.vocab_size = geometry_of(model).vocab_size
        self.log = Log(self.seen, [], History(cache.sinks + cache.window), self.seen)
        self._logits: tuple[int, Tensor] | None = None  # after so many tokens: [V]
        self._drawn: tuple[int, int] | None = None  # the number of a token, and the token
        self._ahead: _Ahead | None = None
        self._running_ahead: int | None = None  # the number of a token while its forward runs ahead
        # The number of a token that the device has drawn, and its answer. Kept until the host has read the token.
        self._answer: tuple[int, _Answer] | None = None
        self._on_device: tuple[int, Tensor] | None = None  # waiting tokens from this number on, on the device
        # While tokens are taken back: the cuts before, how many entries the cache keeps, whether tokens had been fed,
        # whether the last one that stays is fed again.
        self._leaving: tuple[int, int, bool, bool] | None = None
        self._rows: tuple[Sampler, RowSettings] | None = None

    @property
    def seen(self) -> int:
        """How many tokens the cache has taken in."""
        return self.cache.seen_counts[0]

    @property
    def end(self) -> int:
        """The number of the next token of the stream."""
        return self.log.end

    @property
    def drawn(self) -> int | None:
        """The token that was drawn and not pushed yet."""
        drawn, answer, end = self._drawn, self._answer, self.end
        if drawn is not None and drawn[0] == end:
            return drawn[1]
        if answer is not None and answer[0] == end:  # interrupted before the host read it
            token, best = answer[1].wait()
            if math.isfinite(best):
                return int(token)
        return None

    @property
    def unfed(self) -> list[int]:
        """The tokens that wait."""
        log = self.log
        return log.tokens[max(0, self.seen - log.first) :]

    @property
    def is_empty(self) -> bool:
        """Whether nothing can be drawn: the stream has no token, or none that this loop knows."""
        return not self.log.tokens

    def last_tokens(self, count: int) -> list[int]:
        """The last tokens that were pushed, oldest first; fewer where they are not kept any more."""
        return self._read_log().history.last(count)

    @property
    def repeated(self) -> float:
        """See `History.loop_share`."""
        return self._read_log().history.loop_share()

    @property
    def logits(self) -> Tensor | None:
        """The model's logits [V] for the next token, if nothing waits and they are known."""
        known = self._logits
        return known[1] if known is not None and known[0] == self.seen == self.end else None

    def push(self, tokens: Sequence[int], on_device: Tensor | None = None) -> None:
        """Tokens to take in before the next one is drawn. on_device: the same, int64, where the device has them.

        Raises ValueError for ids outside the model's vocabulary.
        """
        self.check(tokens)
        if not tokens:
            return
        self._end_running_ahead()
        log, seen = self._read_log(), self.seen
        if seen > log.end:  # the cache took in tokens of another caller
            log = Log(seen, [], History(log.history.size), seen, log.cuts)
        # The last token that was fed is kept: if its logits were lost, it is fed again.
        known = log.tokens[max(0, seen - log.first - 1) :]
        if on_device is not None:
            self._on_device = log.end, on_device
        self.log = replace(log, first=log.end - len(known), tokens=[*known, *tokens])

    def check(self, tokens: Sequence[int]) -> None:
        """Raises ValueError for ids outside the model's vocabulary."""
        wrong = [token for token in tokens if not 0 <= token < self.vocab_size]
        if wrong:
            raise ValueError(
                f"token id {wrong[0]} is outside the model's vocabulary of 0 … {self.vocab_size - 1}"
            )

    def push_drawn(self) -> None:
        """Push the token that was drawn, if there is one."""
        token = self.drawn
        if token is not None:
            self.push([token])

    def feed(self) -> None:
        """Let the cache take in the tokens that wait, so that the logits are known. Nothing for an empty stream.

        Raises ValueError where the cache has seen less than its stream: it was reset or loaded by another caller.
        """
        waiting = self.waiting()
        if not waiting:
            return
        log, seen = self.log, self.seen
        ahead = self._ahead
        self._ahead = None
        if ahead is not None and (ahead.place, [ahead.token]) == (seen, waiting):
            if ahead.failed is not None:
                raise ahead.failed
            if ahead.logits is not None and self.cache.step_on(ahead.back):
                self._logits = log.end, ahead.logits
                return
        with torch.inference_mode():
            known = self._on_device
            if known is not None and known[0] == seen and len(known[1]) == len(waiting):
                tokens = known[1][None]
            else:
                tokens = torch.tensor([waiting], dtype=torch.int64, device=self.cache.device)
            self.set_logits(self.model(tokens, self.cache, logits_to_keep=1)[0, -1])

    # What a caller needs who feeds many loops and draws for them together, instead of `feed` and `draw`

    def waiting(self) -> list[int]:
        """The tokens to feed before the next one can be drawn; none where the logits are known, or for an empty stream.

        Raises ValueError as `feed`.
        """
        self._end_running_ahead()
        log = self.log
        if self.logits is not None or self.is_empty:
            return []
        seen = self.seen
        if seen >= log.end:  # interrupted after the commit, before the logits arrived
            self.cache.step_back()
            seen -= 1
        if seen < log.first:
            raise ValueError(
                f"the cache has seen {seen} tokens, and its stream stands at {log.first}: the cache was changed from "
                f"outside; reset the stream"
            )
        return log.tokens[seen - log.first :]

    def set_logits(self, logits: Tensor) -> None:
        """The model's logits [V] after all tokens, which were fed."""
        self._logits = self.log.end, logits

    def set_drawn(self, token: int) -> None:
        """The next token, which was drawn from `logits`."""
        self._drawn = self.end, token

    def history(self, sampler: Sampler) -> History:
        """The last tokens that were pushed, as many as the sampler needs or all that are kept."""
        history = self._read_log().history
        history.grow(sampler.needs)
        return history

    def draw(self, sampler: Sampler, generated: int, run_ahead: bool = True) -> int:
        """The next token of the stream, or the one that was drawn and not pushed yet.

        generated: see `Sampler.edits`. run_ahead: let its forward run before it is pushed, on a device in `RUN_AHEAD`.
        Raises ValueError where the logits are not finite.
        """
        drawn = self.drawn
        if drawn is not None:
            return drawn
        if self._ahead is not None and self._ahead.failed is not None and self._ahead.sampler is not sampler:
            self._ahead = None  # it failed for a call that did not ask for more tokens
        self.feed()
        logits, place = self.logits, self.end
        assert logits is not None, "an empty stream has no next token"
        if self._rows is None or self._rows[0] is not sampler:
            self._rows = sampler, RowSettings([sampler.config], logits.device)
        history = self.history(sampler)
        with torch.inference_mode():
            tokens, best = sample(logits[None], [sampler], self._rows[1], [history], [place], [generated])
            if run_ahead and self.cache.device.type in RUN_AHEAD:
                return self._read_while_running_ahead(sampler, place, tokens, best)
            check_finite(float(best))
            token = int(tokens)
        self._on_device = place, tokens
        self.set_drawn(token)
        return token

    def _read_log(self) -> Log:
        """The log, after its history has read all of its tokens."""
        log = self.log
        log.history.extend(log.tokens[max(0, log.ahead + log.history.total - log.first) :])
        return log

    def _read_while_running_ahead(self, sampler: Sampler, place: int, tokens: Tensor, best: Tensor) -> int:
        answer = _Answer(torch.cat((tokens.double(), best.double())))
        logits: Tensor | None = None
        back: object = None
        failed: Exception | None = None
        interrupt: BaseException | None = None
        self._answer = place, answer
        self._running_ahead = place
        try:
            logits = self.model(tokens[None], self.cache, logits_to_keep=1)[0, -1]
        except Exception as error:
            failed = error
        except BaseException as error:  # Ctrl-C
            interrupt = error
        if self.seen > place:
            back = self.cache.step_back()
        self._running_ahead = None
        value, finite = answer.wait()
        if interrupt is None:
            check_finite(finite)
            if failed is not None or back is not None:
                self._ahead = _Ahead(place, int(value), logits, back, failed, sampler)
            self._drawn = place, int(value)
            return int(value)
        raise interrupt

    def _end_running_ahead(self) -> None:
        """Step back from a forward that ran ahead, where an interrupt came before the cache had stepped back."""
        if self._running_ahead is not None:
            if self._running_ahead == self.log.end and self.seen == self.log.end + 1:
                self.cache.step_back()
            self._running_ahead = None

    def state(self) -> LoopState:
        """A copy, for a loop whose cache is in the same state as this one's is after the call."""
        log = self._read_log()
        if self.seen > log.end:  # interrupted while a forward ran ahead: the token is not in the stream yet
            self.cache.step_back()
        logits, history = self.logits, log.history
        return LoopState(
            None if logits is None else logits.clone(),
            log.first,
            tuple(log.tokens),
            tuple(history.last(log.end)),
            history.size,
            log.cuts,
            self.drawn,
        )

    def restore(self, state: LoopState) -> None:
        """Return to a state, which can be used again. The cache was brought to the same one before."""
        end = state.first + len(state.tokens)
        history = History(state.history_size, state.history)
        self._drawn = self._logits = self._answer = self._ahead = self._running_ahead = None
        self._on_device = self._leaving = None
        self.log = Log(state.first, list(state.tokens), history, end - history.total, state.cuts)
        if state.logits is not None:
            self._logits = end, state.logits.to(self.cache.device, self.cache.dtype)
        if state.drawn is not None:
            self._drawn = end, state.drawn

    def forget(self, left: Sequence[int]) -> None:
        """Tokens left the cache: `left` are the last tokens without them, and the next logits are computed again."""
        log = self.log
        history = History(log.history.size, left)
        self.log = replace(log, history=history, ahead=log.end - history.total)
        self._logits = None

    def keep_last_unfed(self) -> None:
        """Take the last token out of the cache again, if it was fed: the next caller feeds it.

        It stays in the cache where that is not possible: a token that ran ahead has overwritten what it needs.
        """
        self._end_running_ahead()
        if not self.is_empty and self.seen == self.end and int(self.cache.rewindable[0]):
            self.cache.step_back()

    def take_back(self, start: int, then: Sequence[int] = ()) -> None:
        """Take the tokens from number `start` on out of the stream, and push `then` in their place.

        Their entries leave the cache. What they had pushed out of the window does not come back, and neither does what
        a drawn token would have pushed out. Numbers of tokens that were fed are used again only where nothing was
        pushed out. After an interrupt, the same call completes it; `log.cuts` tells whether it has ended.
        """
        self._end_running_ahead()
        log, cache = self._read_log(), self.cache
        self._drawn = self._answer = self._ahead = self._on_device = None
        cache.evict_for_space(1)  # so the result is the same whether a forward ran ahead or not
        left = log.history.last(len(log.history))
        left = left[: max(0, len(left) - (log.end - start))]
        held, fed = int(cache.held[0]), max(0, self.seen - start)
        if self._leaving is None or self._leaving[0] != log.cuts:  # else it was interrupted
            # The last token that stays is fed again, for its logits.
            again = fed > 0 and not then and bool(left)
            self._leaving = log.cuts, held - fed - again, fed > 0, again
        _, kept, was_fed, again = self._leaving
        if held - kept <= int(cache.rewindable[0]):
            cache.rewind(held - kept)
        elif held > max(kept, cache.sinks):
            cache.evict_range(max(kept, cache.sinks), held)
        if again:
            left, then = left[:-1], left[-1:]
        if was_fed:
            end, tokens = self.seen, left[-1:]
            self._logits = None  # their number may be that of the stream now
        else:
            end, tokens = start, log.tokens[: start - log.first]
        history = History(log.history.size, left)
        first = end - len(tokens)
        self.log = Log(first, [*tokens, *then], history, end - history.total, log.cuts + 1)


class _Answer:
    """Numbers on their way to the host. Work that the device has queued behind them is not waited for."""

    def __init__(self, numbers: Tensor) -> None:
        cuda = numbers.device.type == "cuda"
        self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=cuda)
        self._numbers.copy_(numbers, non_blocking=cuda)
        self._there = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        if self._there is not None:
            self._there.record()

    def wait(self) -> list[float]:
        if self._there is not None:
            self._there.synchronize()
        return self._numbers.tolist()
