"""Rows of timings, as a Markdown table and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmark.worker import Worker


def timing_row(
    label: str, system: str, seconds: Sequence[float], baseline: Sequence[float] = (), **more: Any
) -> dict[str, Any]:
    """The median of the rounds, the lowest and the highest, and the ratio to the median of the baseline."""
    times = sorted(seconds)
    row = {"place": label, "system": system, "median": statistics.median(times), "low": times[0],
           "high": times[-1], "rounds": len(times), **more}  # fmt: skip
    if baseline:
        row["ratio"] = row["median"] / statistics.median(baseline)
    return row


def timing_rows(workers: Sequence[Worker]) -> Iterator[dict[str, Any]]:
    """One row for each worker, in seconds per token of each stream, and with the ratio to the limit."""
    limits = [worker.seconds for worker in workers if worker.spec.system == "limit"]
    for worker in workers:
        spec = worker.spec
        if worker.failed or not worker.seconds:
            yield {"place": spec.label, "system": spec.system, "failed": worker.failed}
            continue
        per_token = [seconds / spec.tokens for seconds in worker.seconds]
        limit = [seconds / spec.tokens for seconds in limits[0]] if limits and spec.task == "decode" else ()
        yield {**asdict(spec), **timing_row(spec.label, spec.system, per_token, limit)}


def timing_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: ms per token for decoding, tokens per second for scoring and prefilling, ms for loading."""
    lines = [
        "| what | system | median | low … high | × the limit, or the plain way |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "median" not in row:
            lines.append(f"| {row['place']} | {row['system']} | failed: {row['failed']} | | |")
            continue
        if row.get("task") in ("score", "prefill"):
            unit, values = "tokens/s", [1 / row[key] * row["batch"] for key in ("median", "high", "low")]
        else:
            unit, values = "ms", [row[key] * 1e3 for key in ("median", "low", "high")]
        middle, low, high = (f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in values)
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        lines.append(f"| {row['place']} | {row['system']} | {middle} {unit} | {low} … {high} | {ratio} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Time per token over the window: one line for each system, one panel for each setting of the rest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        if "median" in row and "task" in row:
            name = (
                f"{row['task']} {row['model']} {row['dtype']}, batch {row['batch']}, {row['threads']} threads"
            )
            panels.setdefault(name, {}).setdefault(row["system"], []).append(row)
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), squeeze=False)
    for ax, (name, systems) in zip(axes[0], panels.items(), strict=True):
        for system, cells in systems.items():
            cells = sorted(cells, key=lambda row: row["window"])
            style = {"color": "black", "linestyle": "--"} if system == "limit" else {"marker": "o"}
            ax.plot([c["window"] for c in cells], [c["median"] * 1e3 for c in cells], label=system, **style)
        ax.set(title=name, xlabel="window, tokens", ylabel="ms per token", yscale="log")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
