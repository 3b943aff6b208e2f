"""Tables of results for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from streamllm.evaluate.inspect import Recommendation
from streamllm.evaluate.recall import Recall
from streamllm.evaluate.result import Result


def perplexity_table(results: Sequence[Result]) -> str:
    """One line for each result, one column for each bucket of positions.

    A column is named after its first position. Positions before the smallest cache is full share one column.
    """
    spans = [result.sinks + result.window for result in results if result.mode != "dense"] or [128]
    first = max(1, 1 << (min(spans).bit_length() - 1))
    starts = sorted(
        {bucket.start for result in results for bucket in result.buckets if bucket.start >= first}
    )
    rows = [["", "sinks", "window", "tokens", "all", f"< {first}", *map(str, starts)]]
    for result in results:
        by_start = {bucket.start: bucket for bucket in result.buckets}
        cells = [result.perplexity, result.between(1, first).perplexity]
        cells += [by_start[start].perplexity if start in by_start else float("nan") for start in starts]
        mode = result.mode if result.quantize is None else f"{result.mode}, {result.quantize}"
        name = [mode, str(result.sinks), "–" if result.mode == "dense" else str(result.window)]
        rows.append([*name, str(result.tokens), *("–" if cell != cell else f"{cell:.4g}" for cell in cells)])
    return _aligned(rows)


def recall_table(scores: Sequence[Recall]) -> str:
    """One column for each distance."""
    rows = [
        ["tokens back", *(f"{score.distance:.0f}" for score in scores)],
        ["questions", *(str(score.questions) for score in scores)],
        ["right, %", *(f"{100 * score.accuracy:.1f}" for score in scores)],
        ["tokens right, %", *(f"{100 * score.token_accuracy:.1f}" for score in scores)],
        ["nats per token", *(f"{score.mean:.2f}" for score in scores)],
    ]
    if any(score.lines is not None for score in scores):
        rows.insert(0, ["lines back", *(str(score.lines) for score in scores)])
    return _aligned(rows)


def attention_table(share: Tensor) -> str:
    """One line for each layer, one column for each token, from shares [L, H, count]; the mean of the heads."""
    rows = [
        [f"layer {n}", *(f"{100 * s:.1f}" for s in layer)] for n, layer in enumerate(share.mean(1).tolist())
    ]
    rows.append(["all", *(f"{100 * s:.1f}" for s in share.mean((0, 1)).tolist())])
    return _aligned([["token", *map(str, range(share.shape[2]))], *rows])


def sinks_table(found: Recommendation) -> str:
    """One column for each number of sinks, and the recommendation in a sentence."""
    scores = found.scores()
    rows = [["sinks", *map(str, scores)], ["perplexity", *(f"{score:.4g}" for score in scores.values())]]
    reason = _reason(found.sinks, scores)
    return f"{_aligned(rows)}\n\nThis model needs {_count(found.sinks, 'sink')}: {reason}."


def _reason(needed: int, scores: dict[int, float]) -> str:
    best = min(scores.values())
    if not needed:
        return f"without sinks it is within 1 % of the best ({scores[min(scores)]:.4g} against {best:.4g})"
    fewer = max((count for count in scores if count < needed), default=None)
    reason = f"{scores[needed]:.4g} is within 1 % of the best ({best:.4g})"
    return reason if fewer is None else f"{reason}, {scores[fewer]:.4g} with {_count(fewer, 'sink')} is not"


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines: the first column aligned to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
