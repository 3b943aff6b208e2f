"""Sections of `tools/report.py`: what a stream recalls, by distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

from report_page import Report, Subject

from streamllm.evaluate import TASKS, Recall, passkey, plots, ruler, stream_eval


def recall_by_distance(report: Report, subject: Subject) -> None:
    """Recall of facts inside the window and beyond it."""
    digits, every = (2, 2) if subject.wording == "code" else (5, 10)
    given: dict[str, Any] = {
        "sinks": subject.sinks, "window": subject.window, "wording": subject.wording, "digits": digits,
    }  # fmt: skip
    lines, count = subject.scaled(1000, 100), subject.scaled(200, 2)

    def computed(name: str) -> Sequence[Recall]:
        if name == "StreamEval":
            return stream_eval(subject.model, subject.tokenizer, every=every, lines=lines, **given)
        return passkey(subject.model, subject.tokenizer, samples=count, **given)

    curves = {
        name: [
            Recall(**plain)
            for plain in report.measure(
                "recall",
                f"{name} {lines} {count}",
                lambda name=name: [asdict(score) for score in computed(name)],
            )
        ]
        for name in ("StreamEval", "passkey")
    }
    by_chance = 100 / (9 * 10 ** (digits - 1))
    for name, scores in curves.items():
        report.table(
            f"{name}, {subject.sinks} sinks + window {subject.window}, "
            f"{min(score.questions for score in scores)} questions or more at each distance. An answer is right "
            f"if greedy decoding gives all {digits} digits of its number (by chance: {by_chance:.2g} %).",
            ["tokens back", *(f"{score.distance:.0f}" for score in scores)],
            [
                ["right, %", *(f"{100 * score.accuracy:.1f}" for score in scores)],
                ["tokens right, %", *(f"{100 * score.token_accuracy:.1f}" for score in scores)],
                ["nats per token", *(f"{score.mean:.2f}" for score in scores)],
            ],
        )
    report.picture(
        "recall",
        "Right answers and nats per token by distance, with the end of the window",
        lambda dark: plots.recall_curves(
            curves, window=subject.window, dark=dark,
            title=subject.title(f"StreamEval of {lines} lines, {count} passkeys for each distance"),
        ),
    )  # fmt: skip
    report.numbers["recall"] = {name: [asdict(score) for score in scores] for name, scores in curves.items()}


def ruler_by_distance(report: Report, subject: Subject) -> None:
    """Tasks after RULER's rules, in and beyond the window, in three modes."""
    count, window = subject.scaled(50, 2), subject.window
    distances = (window - 52, window + 148)
    curves: dict[str, Sequence[Recall]] = {}
    for task, mode in product(TASKS, ("sinks", "window", "dense")):

        def computed(task: str = task, mode: str = mode) -> list[dict[str, Any]]:
            scores = ruler(
                subject.model, subject.tokenizer, task, distances=distances, samples=count, mode=mode,
                sinks=subject.sinks, window=window,
            )  # fmt: skip
            return [asdict(score) for score in scores]

        found = report.measure("ruler", f"{task}, {mode}, {count} texts", computed)
        curves[f"{task}, {mode}"] = [Recall(**plain) for plain in found]
    report.table(
        f"Tasks after RULER's rules, {subject.sinks} sinks + window {window}, {count} texts for each distance: answers "
        f"right, and nats per token. What left the window is forgotten.",
        ["task, mode", *(f"{distance} tokens back" for distance in distances)],
        [
            [name, *(f"{100 * score.accuracy:.0f} % ({score.mean:.2f})" for score in scores)]
            for name, scores in curves.items()
        ],
    )
    report.numbers["ruler"] = {name: [asdict(score) for score in scores] for name, scores in curves.items()}
