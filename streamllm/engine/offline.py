"""Lists of prompts, without a thread: generate_batch for ids, complete for texts and messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from streamllm.engine.batch import Batch
from streamllm.engine.row import Row, SlotStream, TextRow, TokenRow
from streamllm.engine.tracebacks import drop_frames
from streamllm.generation import check_max_new_tokens, check_seed, make_sampler, token_ids
from streamllm.generation_config import resolve
from streamllm.loop import Loop
from streamllm.sampling import TokenLogProbs, breaker_tokens
from streamllm.tensor_parallel import JobError
from streamllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_SLOTS = 32
PREFILL_TOKENS = 4096  # of prompts in one step: nobody waits for a single token, and full steps are faster
CHECKED_TOKEN = 0  # a prompt that every model takes
OF_CHATS = ("tools", "continue_final_message", "template_variables")  # options of `Stream.chat` alone


def generate_batch(
    model: nn.Module,
    prompts: Iterable[Sequence[int] | Tensor],
    *,
    slots: int | None = None,
    sinks: int = 4,
    window: int | None = None,
    quantize: str | None = None,
    each: Iterable[Mapping[str, Any]] | None = None,
    seed: int | None = None,
    **settings: Any,
) -> Iterator[tuple[int, int]]:
    """Generate after each prompt (ids, of any lengths). Yields pairs of a prompt's number and its next token.

    Each prompt is a stream of its own, and gets the tokens that `streamllm.generate` would give it alone. Prompts are
    read from the iterable when a slot is free. A tensor-parallel model takes the same prompts in all processes.

    Args:
        slots: how many prompts run at once; None: all, at most 32. sinks, window, quantize: see `SinkCache`.
        settings: `max_new_tokens`, `logits_processor`, `generation_config` and the settings of `streamllm.generate`.
        each: one mapping for each prompt, whose settings override `settings` and `seed`.
        seed: prompt number n samples with `seed + n`.

    Raises ValueError and TypeError as `streamllm.generate`, with the number of the prompt.
    """
    _check_lists(prompts, each)
    batch = _batch(model, slots, prompts, sinks, window, quantize)
    # So that wrong settings raise now, not at the first prompt.
    resolve(model, settings.get("generation_config"), _sampling(settings))
    check_max_new_tokens(settings.get("max_new_tokens"))
    return _tokens(model, batch, _jobs(prompts, each, check_seed(seed), settings))


def _tokens(model: nn.Module, batch: Batch, jobs: Iterator[_Job]) -> Iterator[tuple[int, int]]:
    found: list[tuple[int, int]] = []

    def make(job: _Job) -> Row:
        try:
            return _token_row(model, batch, job, lambda token: found.append((job.number, token)))
        except (ValueError, TypeError) as error:
            raise type(error)(f"prompt {job.number}: {error}") from None

    for left in _run(batch, jobs, make):
        for row in left:
            assert isinstance(row, TokenRow)
            if row.error is not None:
                raise row.error
        yield from found
        found.clear()


def _token_row(model: nn.Module, batch: Batch, job: _Job, receive: Callable[[int], None]) -> TokenRow:
    options = dict(job.options)
    processor, given = options.pop("logits_processor", None), options.pop("generation_config", None)
    limit, seed = check_max_new_tokens(options.pop("max_new_tokens", None)), options.pop("seed", None)
    ids = token_ids(job.prompt)
    if not ids:
        raise ValueError("there are no tokens to begin with: give a prompt, or a BOS token")
    config = resolve(model, given, options)
    loop = Loop(batch.plain, batch.slots.new_cache())
    breakers = breaker_tokens(None, config.dry_sequence_breakers)
    sampler = make_sampler(loop, ids, config, seed, processor, breakers)
    loop.push(ids)
    return TokenRow(loop, sampler, limit, receive)


@dataclass(frozen=True, eq=False)
class Completion:
    """What a model wrote after one prompt.

    finish_reason: "eos", "stop", "length", or None where an error ended it. tokens: how many were generated.
    error: the error that ended it, or None. Its traceback is a text, in its notes.
    """

    text: str
    finish_reason: str | None
    tokens: int
    logprobs: list[TokenLogProbs] = field(default_factory=list)
    error: Exception | None = None


def complete(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Iterable[Any],
    *,
    slots: int | None = None,
    sinks: int = 4,
    window: int | None = None,
    quantize: str | None = None,
    each: Iterable[Mapping[str, Any]] | None = None,
    seed: int | None = None,
    **options: Any,
) -> list[Completion]:
    """What the model writes after each prompt: a text, ids, or a list of messages that the chat template renders.

    `options` are those of `Stream.generate`, for messages of `Stream.chat`; give `max_new_tokens`, `stop` or `eos`, so
    that each has an end. The other arguments are those of `generate_batch`. A prompt that fails has its error in its
    Completion, and the others go on.

    Raises ValueError and TypeError for wrong options for all prompts.
    """
    found = completions(
        model, tokenizer, prompts, slots=slots, sinks=sinks, window=window, quantize=quantize, each=each,
        seed=seed, **options,
    )  # fmt: skip
    return [completion for _, completion in sorted(found, key=lambda pair: pair[0])]


def completions(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Iterable[Any],
    *,
    slots: int | None = None,
    sinks: int = 4,
    window: int | None = None,
    quantize: str | None = None,
    each: Iterable[Mapping[str, Any]] | None = None,
    seed: int | None = None,
    **options: Any,
) -> Iterator[tuple[int, Completion]]:
    """As `complete`, but yields each prompt's number and its Completion as soon as it has ended."""
    _check_lists(prompts, each)
    batch = _batch(model, slots, prompts, sinks, window, quantize)
    # The options for all fail now, not once for each prompt.
    stream = SlotStream(batch.plain, tokenizer, batch.slots.new_cache())
    stream.generate(
        [CHECKED_TOKEN], **{name: given for name, given in options.items() if name not in OF_CHATS}
    )
    return _completions(tokenizer, batch, _jobs(prompts, each, check_seed(seed), options))


def _completions(
    tokenizer: Tokenizer, batch: Batch, jobs: Iterator[_Job]
) -> Iterator[tuple[int, Completion]]:
    found: list[tuple[int, Completion]] = []

    def make(job: _Job) -> Row | None:
        stream = SlotStream(batch.plain, tokenizer, batch.slots.new_cache())
        try:
            is_chat = not isinstance(job.prompt, (str, Tensor)) and _are_messages(job.prompt)
            pieces = (stream.chat if is_chat else stream.generate)(job.prompt, **job.options)
        except JobError:  # no prompt can go on
            raise
        except Exception as error:
            drop_frames(error)
            found.append((job.number, Completion("", None, 0, error=error)))
            return None
        return TextRow(stream, pieces, _Collector(job.number, stream, found))

    for _ in _run(batch, jobs, make):
        yield from found
        found.clear()


def _are_messages(prompt: Sequence[Any]) -> bool:
    return len(prompt) > 0 and isinstance(prompt[0], Mapping)


class _Collector:
    """Receives the text of one stream, and makes a Completion of it."""

    is_full = is_cancelled = False

    def __init__(self, number: int, stream: SlotStream, found: list[tuple[int, Completion]]) -> None:
        self._number, self._stream, self._found = number, stream, found
        self._pieces: list[str] = []

    def give(self, piece: str) -> None:
        self._pieces.append(piece)

    def end(self, error: Exception | None) -> None:
        stream = self._stream
        made = Completion(
            "".join(self._pieces),
            stream.finish_reason if error is None else None,
            stream.said,
            list(stream.logprobs),
            error,
        )
        self._found.append((self._number, made))


# Running a list of prompts


@dataclass(frozen=True)
class _Job:
    """One prompt and its settings."""

    number: int
    prompt: Any
    options: Mapping[str, Any]


def _jobs(
    prompts: Iterable[Any],
    each: Iterable[Mapping[str, Any]] | None,
    seed: int | None,
    options: Mapping[str, Any],
) -> Iterator[_Job]:
    settings = iter(repeat({}) if each is None else each)
    for number, prompt in enumerate(prompts):
        own = next(settings, None)
        if not isinstance(own, Mapping):
            raise _wrong_each(f"prompt {number} has {'none' if own is None else repr(own)}")
        yield _Job(number, prompt, {"seed": None if seed is None else seed + number, **options, **own})


def _run(batch: Batch, jobs: Iterator[_Job], make: Callable[[_Job], Row | None]) -> Iterator[list[Row]]:
    """Run all jobs. Yields after each step, with the rows that have ended; and after a job that could not begin."""
    while True:
        while batch.running + batch.queued < len(batch.slots):
            job = next(jobs, None)
            if job is None:
                break
            row = make(job)
            if row is None:
                yield []
            else:
                batch.add(row)
        before = batch.rows()
        if not before:
            return
        batch.step()
        left = set(batch.rows())
        yield [row for row in before if row not in left]


def _check_lists(prompts: Iterable[Any], each: Iterable[Mapping[str, Any]] | None) -> None:
    """Raises TypeError where one prompt or one set of settings was given instead of a list; ValueError for lengths."""
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, (Iterable, Tensor)):
        raise TypeError(f"prompts must be a list of prompts, not {prompts!r}: put a single one into a list")
    if each is None:
        return
    if isinstance(each, (str, Mapping)) or not isinstance(each, Iterable):
        raise _wrong_each(f"{each!r} was given")
    if isinstance(prompts, Sized) and isinstance(each, Sized) and len(prompts) != len(each):
        raise ValueError(f"each has settings for {len(each)} prompts, and there are {len(prompts)}")


def _wrong_each(found: str) -> TypeError:
    return TypeError(f"each must have a mapping of settings for each prompt, and {found}")


def _batch(
    model: nn.Module,
    slots: int | None,
    prompts: Iterable[Any],
    sinks: int,
    window: int | None,
    quantize: str | None,
) -> Batch:
    if slots is None:
        slots = max(1, min(DEFAULT_SLOTS, len(prompts))) if isinstance(prompts, Sized) else DEFAULT_SLOTS
    return Batch(model, slots, sinks=sinks, window=window, quantize=quantize, prefill_tokens=PREFILL_TOKENS)


def _sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    others = ("max_new_tokens", "logits_processor", "generation_config")
    return {name: value for name, value in settings.items() if name not in others}
