"""Sections of `tools/report.py`: one stream that reads without end, streams that write without end, speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from report_page import Report, Subject
from torch import Tensor, nn

import streamllm
from streamllm.evaluate import Result, load, perplexity, save
from streamllm.sampling import History, RowSettings, Sampler, breaker_tokens, check_finite, sample
from streamllm.status import resident_bytes

SAVE_EVERY = 60.0  # seconds between two saves of an unfinished stream
LOOP_TOKENS, READ_EVERY, IN_A_LOOP = 512, 64, 0.5
PLAIN: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}
WRITERS: dict[str, tuple[bool, dict[str, Any]]] = {  # name -> with sinks, settings
    "sinks": (True, PLAIN),
    "sinks, DRY 0.8": (True, PLAIN | {"dry_multiplier": 0.8}),
    "no sinks": (False, PLAIN),
}
PROMPT_TOKENS = 32


def reading(report: Report, subject: Subject, text: Tensor, name: str, tokens: int) -> None:
    """Memory of this process, and speed, along a text of `tokens` tokens."""
    read = text.repeat(-(-tokens // len(text)))[:tokens]
    marks = [tokens // 100, tokens // 10, tokens]
    unfinished, key = report.folder / "reading.safetensors", f"reading: {tokens} tokens"
    start = load(subject.model, unfinished) if unfinished.exists() and key in report.measured else None
    found: list[dict[str, float]] = report.measured[key] if start is not None else []
    saved = started = time.perf_counter()
    before = 0 if start is None else start.tokens

    def progress(result: Result) -> None:
        nonlocal before, started, saved
        now = time.perf_counter()
        if result.tokens >= marks[len(found)] - 1:
            rate = (result.tokens - before) / (now - started)
            found.append({"tokens": marks[len(found)], "memory": resident_bytes() or 0, "rate": rate})
            before, started = result.tokens, now
        if now - saved > SAVE_EVERY and not result.done:
            save(result, unfinished)
            report.measured[key] = found
            report.save()
            saved = now

    result = perplexity(
        subject.model, read, sinks=subject.sinks, window=subject.window, chunk=512, resume=start, progress=progress
    )  # fmt: skip
    unfinished.unlink(missing_ok=True)
    ratio = report.measure("reading", f"ratio {tokens}", lambda: late_over_early(subject, read, tokens))
    report.table(
        f"One stream of {tokens:,} tokens of {name} ({subject.sinks} sinks, window {subject.window}): resident memory "
        f"of the process at that place, and speed since the place before. Perplexity {result.perplexity:.4g}. "
        f"A token at place {tokens:,} takes {ratio:.3f} times the time of one at place 5,000 (two streams in turns, "
        f"medians).",
        ["after tokens", *(f"{mark['tokens']:,}" for mark in found)],
        [
            ["resident memory, MiB", *(f"{mark['memory'] / 2**20:,.1f}" for mark in found)],
            ["tokens/s", *(f"{mark['rate']:,.0f}" for mark in found)],
        ],
    )
    report.numbers["memory"] = found
    report.numbers["late over early"] = ratio


@torch.inference_mode()
def late_over_early(subject: Subject, text: Tensor, place: int, rounds: int = 150) -> float:
    """How much longer a token takes at `place` than at 5,000: two streams, token by token in turns."""
    caches = [
        streamllm.SinkCache(subject.model, subject.sinks, subject.window, origin=origin)
        for origin in (0, max(0, place - 5000))
    ]
    count = min(5000, len(text) - 1)
    for cache in caches:
        for start in range(0, count, 512):
            subject.model(text[None, start : min(start + 512, count)], cache, logits_to_keep=1)
    seconds: list[list[float]] = [[], []]
    for turn in range(rounds):
        token = text[None, turn : turn + 1]
        for row in (0, 1) if turn % 2 else (1, 0):
            started = time.perf_counter()
            subject.model(token, caches[row], logits_to_keep=1)
            seconds[row].append(time.perf_counter() - started)
    early, late = map(statistics.median, seconds)
    return late / early


def writing(
    report: Report, subject: Subject, tokens: int, seeds: int, writers: tuple[str, ...], backend: str
) -> None:
    """Streams that write `tokens` tokens: loops, distinct n-grams, how likely the text is, memory and time."""
    decoder = subject.model if backend == "off" else streamllm.compile(subject.model, backend)
    short = report.measure(
        "writing", f"short {seeds}", lambda: write(subject, decoder, LOOP_TOKENS, seeds, True, PLAIN)
    )
    rows = {f"the model's own texts of {LOOP_TOKENS} tokens": short}
    for name in writers:
        sinks, settings = WRITERS[name]
        rows[f"{tokens:,} tokens, {name}"] = report.measure(
            "writing",
            f"{name} {tokens} {seeds} {backend}",
            lambda s=sinks, g=settings: write(subject, decoder, tokens, seeds, s, g),
        )
    report.table(
        f"Streams of {seeds} seed{'s' if seeds > 1 else ''} each, temperature {PLAIN['temperature']}, top-p "
        f"{PLAIN['top_p']}, a cache of {subject.span} tokens, begun with the first {PROMPT_TOKENS} tokens of "
        f"{subject.text}. Loop share: which part "
        f"of the 4-grams of {LOOP_TOKENS} tokens occurred in them before, read every {READ_EVERY} tokens; in a loop: "
        f"readings above {IN_A_LOOP}. Likelihood: the text read again in pieces of {subject.span} tokens from an empty "
        f"cache, in nats per token; far above the first row is gibberish, far below are loops. Time: the median of "
        f"the last tokens over that of the first ones after the cache was full. Memory: resident, of the process, at "
        f"these two places, in MiB.",
        ["", "loop share", "in a loop", "distinct 4-grams of 512", "nats per token", "by seed", "time, last / first",
         "memory"],
        [
            [
                name,
                f"{row['loop_share']:.3f}",
                f"{row['in_a_loop']:.3f}",
                f"{1 - row['loop_share']:.3f}",
                f"{row['nats']:.2f}",
                " ".join(f"{nats:.2f}" for nats in row["nats_by_seed"]),
                "–" if row["slower"] is None else f"{row['slower']:.3f}",
                " → ".join(f"{bytes / 2**20:,.1f}" for bytes in (row["memory_full"], row["memory"])),
            ]
            for name, row in rows.items()
        ],
    )  # fmt: skip
    report.numbers["writing"] = rows


def write(
    subject: Subject, decoder: nn.Module, tokens: int, seeds: int, sinks: bool, settings: dict[str, Any]
) -> dict[str, Any]:
    """The scores of texts that one batch of streams writes."""
    texts: list[list[int]] = [[] for _ in range(seeds)]
    readings: list[list[float]] = [[] for _ in range(seeds)]
    seconds = []
    part = min(1000, (tokens - subject.span) // 2)  # timed when the cache is full
    memory_full = 0
    started = time.perf_counter()
    for step, (drawn, histories) in zip(
        range(tokens), stream(subject, decoder, seeds, sinks, settings), strict=False
    ):
        seconds.append(time.perf_counter() - started)
        for row, token in enumerate(drawn):
            texts[row].append(token)
            if step >= LOOP_TOKENS - 1 and (step + 1) % READ_EVERY == 0:
                readings[row].append(histories[row].loop_share(LOOP_TOKENS))
        if step == subject.span + part:
            memory_full = resident_bytes() or 0
        started = time.perf_counter()
    every = [reading for row in readings for reading in row]
    first = seconds[subject.span : subject.span + part]
    nats = [likelihood(subject, text) for text in texts]
    return {
        "loop_share": statistics.mean(every),
        "in_a_loop": statistics.mean(reading > IN_A_LOOP for reading in every),
        "loop_share_by_seed": [statistics.mean(row) for row in readings],
        "nats": statistics.mean(nats),
        "nats_by_seed": nats,
        "slower": statistics.median(seconds[-part:]) / statistics.median(first) if part >= 500 else None,
        "memory_full": memory_full,
        "memory": resident_bytes() or 0,
        "begins": subject.tokenizer.decode(texts[0][:60]),
        "ends": subject.tokenizer.decode(texts[0][-60:]),
    }


def likelihood(subject: Subject, text: list[int]) -> float:
    """Nats per token of a text that is read again in pieces, each from an empty cache; at most 64 pieces."""
    span = subject.span
    starts = list(range(0, len(text) - span + 1, span)) or [0]
    chosen = starts[:: -(-len(starts) // 64)]
    pieces = [torch.tensor(text[start : start + span]) for start in chosen]
    return perplexity(subject.model, pieces, mode="dense").mean


@torch.inference_mode()
def stream(
    subject: Subject, decoder: nn.Module, seeds: int, sinks: bool, settings: dict[str, Any]
) -> Iterator[tuple[list[int], list[History]]]:
    """Endless tokens of a batch of streams, one seed each, with their histories."""
    config = streamllm.GenerationConfig(**settings)
    prompt = subject.stream[:PROMPT_TOKENS].tolist()
    kept = subject.sinks if sinks else 0
    cache = streamllm.SinkCache(subject.model, kept, subject.span - kept, batch_size=seeds)
    logits = decoder(torch.tensor([prompt] * seeds), cache, logits_to_keep=1)[:, -1]
    breakers = (
        breaker_tokens(subject.tokenizer, config.dry_sequence_breakers) if config.dry_multiplier else ()
    )
    samplers = [
        Sampler(config, vocab_size=logits.shape[-1], window=subject.span, seed=seed, breakers=breakers)
        for seed in range(seeds)
    ]
    histories = [History(max(sampler.needs, LOOP_TOKENS), prompt) for sampler in samplers]
    rows = RowSettings([config] * seeds, logits.device)
    place = len(prompt)
    while True:
        drawn, best = sample(
            logits, samplers, rows, histories, [place] * seeds, [place - len(prompt)] * seeds
        )
        check_finite(float(best.sum()))
        tokens = drawn.tolist()
        for history, token in zip(histories, tokens, strict=True):
            history.push(token)
        place += 1
        yield tokens, histories
        logits = decoder(drawn[:, None], cache, logits_to_keep=1)[:, -1]


def speed(report: Report, subject: Subject, folder: Path) -> None:
    """Scoring in exact chunks against one token at a time, here and in transformers."""
    S, W, text = subject.sinks, subject.window, subject.stream
    short, long = text[: subject.scaled(2000, 2 * subject.span)], text[: subject.scaled(100_000, 4096)]
    rows: list[tuple[str, Tensor, Callable[[Tensor], object]]] = [
        ("exact chunks of 256", long, lambda text: subject.score(text, sinks=S, window=W)),
        ("one token per forward", short, lambda text: subject.score(text, sinks=S, window=W, chunk=1)),
    ]
    theirs = _transformers(folder, next(subject.model.parameters()).dtype)
    if theirs is not None:
        rows.append(
            ("transformers, one token per forward", short, lambda text: _their_loop(theirs, text, S, W - 1))
        )
    rates: dict[str, float] = {}
    for name, text, score in rows:

        def rate(text: Tensor = text, score: Callable[[Tensor], object] = score) -> float:
            score(text[: 2 * subject.span])  # warm-up
            started = time.perf_counter()
            score(text)
            return (len(text) - 1) / (time.perf_counter() - started)

        rates[name] = report.measure("speed", name, rate)
    fastest = rates["exact chunks of 256"]
    report.table(
        f"Speed of scoring with {S} sinks and window {W}, {torch.get_num_threads()} CPU thread(s), "
        f"{next(subject.model.parameters()).dtype}. The loop over transformers cuts its cache as "
        f"streaming-llm's eval_long_ppl.py does, but does not rotate all keys again for every token.",
        ["", "tokens/s", "chunks are faster by"],
        [[name, f"{rate:,.0f}", f"{fastest / rate:.1f} ×"] for name, rate in rates.items()],
    )
    report.numbers["tokens per second"] = rates


def _transformers(folder: Path, dtype: torch.dtype) -> Any:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@torch.no_grad()
def _their_loop(model: Any, text: Tensor, start: int, recent: int) -> float:
    """One token per forward; the cache is cut to start + recent after each."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    nll = 0.0
    for place in range(len(text) - 1):
        logits = model(input_ids=text[None, place, None], past_key_values=cache, use_cache=True).logits
        nll += float(torch.nn.functional.cross_entropy(logits[0].float(), text[place + 1, None]))
        for layer in cache.layers:
            if layer.keys.shape[2] > start + recent:
                layer.keys = torch.cat((layer.keys[:, :, :start], layer.keys[:, :, -recent:]), 2)
                layer.values = torch.cat((layer.values[:, :, :start], layer.values[:, :, -recent:]), 2)
    return nll
