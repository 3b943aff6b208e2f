"""Sections of `tools/report.py`: perplexity in four modes, by sinks and by window; where attention goes."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict
from itertools import pairwise

import torch
from report_page import Report, Subject

from streamllm.evaluate import Bucket, Result, attention, compare, plots
from streamllm.evaluate.texts import samples
from streamllm.models.step import geometry_of

SINKS = (0, 1, 2, 4, 8)
TOLERANCE = 0.01  # nats: the fewest sinks within 1 % of the best are recommended


def modes(report: Report, subject: Subject) -> None:
    """Perplexity of the four modes on one text."""
    S, W, span, stream = subject.sinks, subject.window, subject.span, subject.stream
    trained = geometry_of(subject.model).trained_length
    # Dense is read past the trained length, where it breaks.
    dense = stream[: max(subject.scaled(32_768, 2048), 3 * min(trained or 0, 8192) // 2)]
    positions = subject.scaled(3000)
    results = [
        report.result("modes", subject, dense, mode="dense"),
        report.result("modes", subject, mode="window", window=span),
        report.result("modes", subject, mode="sinks", sinks=S, window=W),
        report.result("modes", subject, mode="recompute", sinks=S, window=W, positions=positions),
    ]
    pieces = [
        torch.cat((stream[:1], stream[start : start + span - 1]))
        for start in range(1, len(dense) - span, span)
    ]
    fresh = Result.from_dict(
        report.measure(
            "modes", f"{len(pieces)} pieces", lambda: subject.score(pieces, mode="dense").to_dict()
        )
    )
    starts = [span * times for times in (1, 4, 16, 64, 256)]

    def cell(bucket: Bucket) -> str:
        return f"{bucket.perplexity:.4g}" if bucket.tokens >= plots.MIN_PREDICTIONS else "–"

    def cells(result: Result) -> list[str]:
        within_span = result.between(1, span // 2 + 1)  # a bucket ends at twice its start
        later = [result.between(start, stop) for start, stop in pairwise([*starts, math.inf])]
        return [cell(bucket) for bucket in (within_span, *later)]

    report.table(
        f"Perplexity by position in the text, {len(stream):,} tokens of {subject.text} as one stream, never reset. "
        f"Trained length {trained or 'any'}; windows count the token itself. Dense reads {len(dense):,} "
        f"tokens; re-computation is scored at {positions:,} random positions only, where it is compared with streaming "
        f"prediction by prediction below.",
        ["", f"< {span}", *(f"from {start:,}" for start in starts), f"all beyond {2 * span}"],
        [
            [
                plots.label(result),
                *cells(result),
                f"{result.beyond(2 * span).perplexity:.4g}",
            ]
            for result in results
        ],
    )
    report.add(
        f"For comparison: the first {len(dense):,} tokens, cut into pieces of {span} that are read densely, each "
        f"with the text's first token in front, have a perplexity of {fresh.perplexity:.4g}."
    )
    report.picture(
        "perplexity",
        "Perplexity by position for dense, window, sinks and re-computation",
        lambda dark: plots.perplexity_curves(
            results, trained_length=trained, dark=dark,
            title=subject.title(f"{len(stream):,} tokens of {subject.text}, one stream"),
        ),
    )  # fmt: skip
    report.numbers["pieces"] = fresh.to_dict()
    report.numbers["modes"] = [result.to_dict() for result in results]


def budgets(report: Report, subject: Subject) -> None:
    """A window without sinks against sinks and window of the same size, at the same predictions."""
    S, stream = subject.sinks, subject.stream
    spans = [span for span in subject.spans if S < span <= len(stream) // 4]
    # Each budget is scored at the same positions, beyond twice the largest of them.
    beyond = 1 << math.ceil(math.log2(2 * max(spans)))
    rows, found = [], {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "sinks . window = ")  # a budget may exceed the trained length
        for span in spans:
            window, both = (
                report.result("budgets", subject, mode="window", window=span).beyond(beyond),
                report.result("budgets", subject, mode="sinks", sinks=S, window=span - S).beyond(beyond),
            )
            ratio = math.exp(window.mean - both.mean)
            rows.append([f"{span:,}", f"{window.perplexity:.4g}", f"{both.perplexity:.4g}", f"{ratio:.2f}"])
            found[span] = {"window": window.perplexity, "sinks": both.perplexity, "ratio": ratio}
    report.table(
        f"A window without sinks, and {S} sinks and a window that hold as many tokens: perplexity of the "
        f"{len(stream) - beyond:,} predictions from position {beyond:,} on, of {len(stream):,} tokens of "
        f"{subject.text}.",
        ["tokens held", "window", f"{S} sinks + window", "ratio"],
        rows,
    )
    report.numbers["budgets"] = found


def against_recomputation(report: Report, subject: Subject) -> None:
    """How much worse streaming is than re-computation, prediction by prediction."""
    positions = subject.scaled(5000, 50)

    def computed() -> dict[str, object]:
        found = compare(
            subject.model, subject.stream, sinks=subject.sinks, window=subject.window, positions=positions
        )
        return asdict(found) | {"error": found.error, "ratio": found.ratio}

    found = report.measure("against", f"{positions} of {len(subject.stream)}", computed)
    drift = ", ".join("–" if value != value else f"{value:+.3f}" for value in found["eighths"])
    report.add(
        f"Streaming against re-computation with the same {found['sinks']} sinks and window {found['window']}, at "
        f"{found['tokens']:,} random positions of {len(subject.stream):,} tokens: "
        f"{found['difference']:+.4f} ± {found['error']:.4f} nats per token, perplexity × {found['ratio']:.4f}. "
        f"By eighths of the text: {drift}."
    )
    report.numbers["against re-computation"] = found


def ablations(report: Report, subject: Subject) -> None:
    """Perplexity by the number of sinks, and by the length of the window."""
    span, text = subject.span, subject.choosing_text
    stream = subject.choosing[: subject.scaled(100_000, 4 * span + 1)]
    sweep = [report.result("ablations", subject, stream, sinks=S, window=span - S) for S in SINKS]
    means = [result.beyond(2 * span).mean for result in sweep]
    recommended = next(S for S, mean in zip(SINKS, means, strict=True) if mean <= min(means) + TOLERANCE)
    scores = {S: math.exp(mean) for S, mean in zip(SINKS, means, strict=True)}
    report.table(
        f"Sinks, in a cache of sinks + window = {span}: perplexity beyond position {2 * span} of "
        f"{len(stream):,} tokens of {text}. The smallest number within 1 % of the best: {recommended}.",
        ["sinks", *map(str, scores)],
        [["perplexity", *(f"{score:.4g}" for score in scores.values())]],
    )
    report.picture(
        "sinks",
        "Perplexity by position for 0, 1, 2, 4 and 8 sinks",
        lambda dark: plots.perplexity_curves(
            sweep,
            dark=dark,
            title=subject.title(f"{len(stream):,} tokens of {text}, sinks + window = {span}"),
        ),
    )
    spans = [some for some in subject.spans if some > subject.sinks]
    with warnings.catch_warnings():
        # The table shows on purpose what happens beyond the trained length.
        warnings.filterwarnings("ignore", "sinks . window = ")
        results = [
            report.result("ablations", subject, stream, sinks=subject.sinks, window=some - subject.sinks)
            for some in spans
        ]
    beyond = min(4 * span, len(stream) // 2)
    report.table(
        f"Windows with {subject.sinks} sinks: perplexity beyond position {beyond} of {len(stream):,} "
        f"tokens of {text}. Beyond the trained length, {geometry_of(subject.model).trained_length or 'any'}, "
        f"there are distances that the model was not trained on.",
        ["window", *(str(result.window) for result in results)],
        [["perplexity", *(f"{result.beyond(beyond).perplexity:.4g}" for result in results)]],
    )
    report.numbers["sinks"] = {"recommended": recommended, "perplexity": scores}
    report.numbers["windows"] = [result.to_dict() for result in results]


def where_attention_goes(report: Report, subject: Subject) -> None:
    """The heat map, and the share of attention on the first tokens."""
    count, length = subject.scaled(64, 16), min(64, subject.span)
    seen = attention(subject.model, samples(subject.tokenizer, subject.choosing, count, length))
    share = seen.first(8)
    text = subject.choosing_text
    report.table(
        f"Share of attention that the later half of {length} tokens pays to each of the first eight, in %; "
        f"mean of the heads, {count} samples of {text}.",
        ["layer", *map(str, range(share.shape[2]))],
        [
            *([str(n), *(f"{100 * s:.1f}" for s in layer)] for n, layer in enumerate(share.mean(1).tolist())),
            ["all", *(f"{100 * s:.1f}" for s in share.mean((0, 1)).tolist())],
        ],
    )
    report.picture(
        "attention",
        "Attention by query and key, and the share of every head on the first token",
        lambda dark: plots.attention_map(
            seen, dark=dark, title=subject.title(f"{count} samples of {length} tokens of {text}")
        ),
    )
    report.numbers["attention"] = share.tolist()
