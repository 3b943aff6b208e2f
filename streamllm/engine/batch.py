"""Batch: advances many streams step by step. A step reads prompts in chunks, and gives each running stream a token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from streamllm.compiled import Compiled, compile
from streamllm.compiled.weight_guard import weight_guard_of
from streamllm.engine.row import Row
from streamllm.engine.slots import Slots
from streamllm.engine.tracebacks import drop_frames
from streamllm.models.checks import whole_number
from streamllm.sampling import RowSettings, Sampler, check_finite, sample
from streamllm.tensor_parallel import JobError, is_tensor_parallel

# These backends compile for long. So the batch has one size, and its step is compiled once.
ONE_SIZE_BACKENDS = ("inductor", "cudagraphs")
LEAST_PREFILL, CUDA_PREFILL = 16, 512  # tokens


class Batch:
    """Rows in slots, and rows that wait for one.

    Args:
        prefill_tokens: while streams run, a step reads at most this many tokens of prompts, so that the streams do
            not stall. None: 512 on CUDA, elsewhere twice the number of slots, at least 16.
    """

    def __init__(
        self,
        model: nn.Module,
        count: int,
        *,
        sinks: int = 4,
        window: int | None = None,
        chunk: int | None = None,
        quantize: str | None = None,
        prefill_tokens: int | None = None,
    ) -> None:
        count = whole_number("slots", count, 1)
        compiled = model if isinstance(model, Compiled) else None
        # A chunk of one token runs on the plain model: the compiled step would be compiled again for a single row.
        self.plain: nn.Module = model if compiled is None else compiled.model
        if compiled is not None and compiled.backend == "auto":
            # "auto" compiles one library, for a stream alone. A batch has several sizes, and each would need its own.
            model = compile(self.plain, "flat")
        one_size = isinstance(model, Compiled) and model.backend in ONE_SIZE_BACKENDS
        self.slots = Slots(model, count, sinks, window, chunk, quantize, one_size)
        self._model, self._has_peers = model, is_tensor_parallel(self.plain)
        if prefill_tokens is None:
            on_cuda = self.slots.memory.device.type == "cuda"
            prefill_tokens = CUDA_PREFILL if on_cuda else max(LEAST_PREFILL, 2 * count)
        self.prefill_tokens = whole_number("prefill_tokens", prefill_tokens, 1)
        self._rows: dict[Row, None] = {}  # in the order in which they joined
        self._queue: dict[Row, None] = {}
        self._steps = 0
        self._settings: tuple[list[Sampler], RowSettings] | None = None

    @property
    def running(self) -> int:
        """How many rows are in slots."""
        return len(self._rows)

    @property
    def queued(self) -> int:
        """How many rows wait for a slot."""
        return len(self._queue)

    def rows(self) -> list[Row]:
        """All rows: those in slots, then those that wait."""
        return [*self._rows, *self._queue]

    def add(self, row: Row) -> None:
        """Let a row join as soon as a slot is free."""
        self._queue[row] = None

    def remove(self, row: Row, error: Exception | None = None, keep: bool = False) -> None:
        """Take a row out, between two steps. keep: its cache gets memory of its own, if it has none."""
        if row in self._queue:
            del self._queue[row]
            if keep:
                self.slots.give_memory(row.loop.cache)
        elif row in self._rows:
            del self._rows[row]
            self.slots.release(row.loop.cache, keep)
        else:
            return
        row.end(error)

    def step(self) -> bool:
        """Advance each row by a token, or read a part of its prompt. Returns whether there was a row to advance.

        A row that fails is taken out, and the others go on. An error in a forward takes out all rows of that forward.
        """
        self._steps += 1
        self._admit()
        rows = [row for row in self._rows if not row.is_paused]
        waiting: dict[Row, list[int]] = {}  # the tokens to feed before the next one can be drawn
        for row in rows:
            with self._taking_out(row):
                if row.needs_token():
                    row.before_draw()
                    waiting[row] = row.loop.waiting()
        self._read_prompts(waiting)
        self._feed({row: tokens[0] for row, tokens in waiting.items() if len(tokens) == 1})
        self._draw([row for row, tokens in waiting.items() if len(tokens) <= 1 and row in self._rows])
        for row in rows:
            if row in self._rows and len(waiting.get(row, ())) <= 1:
                with self._taking_out(row):
                    if row.pass_on():
                        self.remove(row)
        return bool(rows)

    def _admit(self) -> None:
        for row in self.rows():
            if row.is_cancelled:
                self.remove(row)
        while self._queue and self.slots.free:
            row = next(iter(self._queue))
            self.slots.place(row.loop.cache)
            del self._queue[row]
            self._rows[row] = None

    def _read_prompts(self, waiting: dict[Row, list[int]]) -> None:
        """Read prompts up to their last token, which is fed with those of the running streams."""
        reading = [row for row, tokens in waiting.items() if len(tokens) > 1]
        room = self.prefill_tokens if len(reading) < len(waiting) else self.slots.memory.chunk
        # In turns: a long prompt does not block a short one.
        for row in sorted(reading, key=lambda row: row.served):
            count = min(room, len(waiting[row]) - 1)
            if not count:
                return
            with self._taking_out(row, in_forward=True), torch.inference_mode():
                cache, row.served = row.loop.cache, self._steps
                ids = torch.tensor([waiting[row][:count]], dtype=torch.int64, device=cache.device)
                if count == 1:
                    with weight_guard_of(self.plain):
                        self.plain(ids, cache, logits_to_keep=1)
                else:
                    self._model(ids, cache, logits_to_keep=1)
                waiting[row] = waiting[row][count:]
            room -= count

    def _feed(self, tokens: dict[Row, int]) -> None:
        """Feed a token to each of some rows."""
        if not tokens:
            return
        with self._taking_out(*tokens, in_forward=True):
            logits, at = self.slots.step({row.loop.cache: token for row, token in tokens.items()})
            for row, number in zip(tokens, at, strict=True):
                row.loop.set_logits(logits[number])

    def _draw(self, rows: Sequence[Row]) -> None:
        """Draw the next token of each of some rows, whose logits are known."""
        together = [row for row in rows if row.sampler.logits_processor is None]
        with self._taking_out(*together):
            for row, token, best in self._sampled(together):
                with self._taking_out(row):
                    check_finite(best)
                    row.loop.set_drawn(token)
        for row in rows:
            # A user's function may fail, so each of these rows is drawn alone.
            if row.sampler.logits_processor is not None:
                with self._taking_out(row):
                    row.loop.draw(row.sampler, row.generated, run_ahead=False)

    def _sampled(self, rows: Sequence[Row]) -> Iterator[tuple[Row, int, float]]:
        """The next token of each row, and its best score."""
        if not rows:
            return
        samplers = [row.sampler for row in rows]
        if self._settings is None or self._settings[0] != samplers:
            device = self.slots.memory.device
            self._settings = samplers, RowSettings([sampler.config for sampler in samplers], device)
        with torch.inference_mode():
            tokens, best = sample(
                _stacked([row.loop.logits for row in rows]),
                samplers,
                self._settings[1],
                [row.loop.history(row.sampler) for row in rows],
                [row.loop.end for row in rows],
                [row.generated for row in rows],
            )
        yield from zip(rows, tokens.tolist(), best.tolist(), strict=True)

    def _taking_out(self, *rows: Row, in_forward: bool = False) -> _TakingOut:
        """An error within the context takes these rows out, and no other.

        An error that the other processes of a tensor-parallel model may not have ends the batch: they would go on with
        other rows.
        """
        return _TakingOut(self, rows, Exception if in_forward and self._has_peers else JobError)

    def take_out(self, rows: Sequence[Row], error: Exception) -> None:
        """Take out rows that cannot go on."""
        drop_frames(error)
        for row in rows:
            self.remove(row, error)


class _TakingOut:
    """See `Batch._taking_out`. raised: errors that leave the context."""

    def __init__(self, batch: Batch, rows: Sequence[Row], raised: type[Exception]) -> None:
        self._batch, self._rows, self._raised = batch, rows, raised

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, Exception) or isinstance(error, self._raised):
            return False
        self._batch.take_out(self._rows, error)
        return True


def _stacked(logits: Sequence[Tensor | None]) -> Tensor:
    """[n, V] from n logits [V]."""
    known = [row for row in logits if row is not None]
    assert len(known) == len(logits), "all of them were fed"
    return torch.stack(known)
