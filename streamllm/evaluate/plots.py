"""Pictures: perplexity along a text, attention on the first tokens, recall by distance.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart, and every curve has its own
marker and line style. `dark` draws for dark pages. matplotlib (extra `plots`) is imported when a function is
called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamllm.evaluate.inspect import Attention
from streamllm.evaluate.recall import Recall
from streamllm.evaluate.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# mode -> colour on light pages, colour on dark pages, marker
MODE_STYLES = {
    "sinks": ("#0072B2", "#56B4E9", "o"),
    "window": ("#D55E00", "#E69F00", "s"),
    "dense": ("#A0527D", "#CC79A7", "^"),
    "recompute": ("#007A5A", "#29C79A", "D"),
}
CURVE_STYLES = (
    ("#0072B2", "#56B4E9", "o"),
    ("#D55E00", "#E69F00", "s"),
    ("#007A5A", "#29C79A", "D"),
    ("#A0527D", "#CC79A7", "^"),
    ("#4D4D4D", "#C8C8C8", "v"),
    ("#8A6D00", "#F0E442", "P"),
)
MIN_PREDICTIONS = 64  # in a bucket of which only a sample was scored; the mean of fewer is noise
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))


@dataclass(frozen=True)
class _Page:
    paper: str
    ink: str
    faint: str


LIGHT, DARK = _Page("#ffffff", "#1f2328", "#c9d1d9"), _Page("#0d1117", "#e6edf3", "#3d444d")


class PlotsMissing(ImportError, ValueError):
    """matplotlib is not installed."""


def check_path(path: Path | None) -> None:
    """Check that a picture can be written to `path`, before a long computation.

    Raises PlotsMissing, and ValueError where the file extension is not that of a picture.
    """
    if path is not None:
        _, figure = _figure(1, 1, False)
        known = figure.canvas.get_supported_filetypes()
        if path.suffix[1:].lower() not in known:
            raise ValueError(
                f"{path} does not have the extension of a picture: use one of {', '.join(sorted(known))}"
            )


def perplexity_curves(
    results: Sequence[Result], *, title: str = "", trained_length: int | None = None, dark: bool = False
) -> Figure:
    """Perplexity by position in the text, both on logarithmic scales, one curve for each result.

    Positions start at 16; a bucket is drawn at the geometric mean of its first and last position. Buckets with
    fewer than 64 scored predictions are left out, unless there are no others. `trained_length` draws a line.
    """
    page, figure = _figure(7.2, 4.2, dark)
    axes = figure.add_subplot()
    last = max(result.total for result in results)  # where the text ends
    repeated = len({result.mode for result in results}) < len(results)
    for index, result in enumerate(results):
        style = curve_style(index) if repeated else MODE_STYLES[result.mode]
        scored = [bucket for bucket in result.buckets if bucket.tokens and bucket.start >= 16]
        buckets = [b for b in scored if b.tokens >= min(b.start, MIN_PREDICTIONS)] or scored
        x = [(bucket.start * min(bucket.stop - 1, max(bucket.start, last))) ** 0.5 for bucket in buckets]
        _curve(axes, x, [bucket.perplexity for bucket in buckets], style, index, label(result), dark)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    axes.xaxis.set_major_formatter(lambda value, _: _count(value))
    if trained_length is not None:
        _mark(axes, page, trained_length, f"trained length {trained_length:,}")
    _dress(axes, page, "position in the text (tokens)", "perplexity", title)
    _legend(figure, axes, page)
    return figure


def attention_map(attention: Attention, *, title: str = "", layers: int = 4, dark: bool = False) -> Figure:
    """The attention weights of some layers, and for every head the share of attention on the first token.

    Above: query by key, the mean of the heads, on a logarithmic scale, as in figure 2 of the paper. Below:
    head by layer.
    """
    from matplotlib.colors import LogNorm

    depth, heads, length = attention.weights.shape[:3]
    chosen = sorted(
        {round(i * (depth - 1) / max(1, min(layers, depth) - 1)) for i in range(min(layers, depth))}
    )
    page, figure = _figure(2.3 * len(chosen) + 0.9, 4.9, dark)
    grid = figure.add_gridspec(2, len(chosen), height_ratios=(1.6, 1))
    panels = [figure.add_subplot(grid[0, column]) for column in range(len(chosen))]
    shown = None
    for panel, layer in zip(panels, chosen, strict=True):
        mean = attention.weights[layer].mean(0).clamp(min=1e-6)
        hidden = mean.masked_fill(mean.new_ones(length, length).triu(1).bool(), float("nan"))
        shown = panel.imshow(hidden.numpy(), cmap="cividis", norm=LogNorm(1e-3, 1), interpolation="nearest")
        _dress(panel, page, "key", "query" if layer == chosen[0] else "", f"layer {layer}", grid=False)
        panel.set_yticks(panel.get_xticks()[1:-1])
        panel.set_xlim(-0.5, length - 0.5)
        panel.set_ylim(length - 0.5, -0.5)
        if layer != chosen[0]:
            panel.set_yticklabels([])
    _bar(figure, shown, panels, page, "attention (mean of heads)")
    below = figure.add_subplot(grid[1, :])
    share = attention.first(1)[:, :, 0].T  # [H, L]
    shown = below.imshow(
        share.numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
    )
    _dress(below, page, "layer", "head", "share of attention on the first token", grid=False)
    below.set_xticks(range(0, depth, max(1, depth // 16)))
    below.set_yticks(range(0, heads, max(1, heads // 8)))
    if depth * heads <= 64:
        for layer in range(depth):
            for head in range(heads):
                value = float(share[head, layer])
                below.text(
                    layer, head, f"{value:.2f}", ha="center", va="center", fontsize=8,
                    color="black" if value > 0.5 else "white",
                )  # fmt: skip
    _bar(figure, shown, [below], page, "share")
    if title:
        figure.suptitle(title, color=page.ink, fontsize=10)
    return figure


def recall_curves(
    curves: Mapping[str, Sequence[Recall]], *, window: int | None, title: str = "", dark: bool = False
) -> Figure:
    """Right answers, and nats per token of the answers, by distance in tokens; a line where the window ends.

    Where no curve has a tenth of its answers right in full, the share of right tokens is drawn instead.
    """
    page, figure = _figure(7.2, 3.9, dark)
    panels = figure.subplots(1, 2)
    whole = max(score.accuracy for scores in curves.values() for score in scores) >= 0.1
    for index, (name, scores) in enumerate(curves.items()):
        style = curve_style(index)
        right = [100 * (score.accuracy if whole else score.token_accuracy) for score in scores]
        for panel, values in zip(panels, (right, [score.mean for score in scores]), strict=True):
            _curve(panel, [score.distance for score in scores], values, style, index, name, dark)
    for panel, what in zip(
        panels,
        ("answers right (%)" if whole else "tokens of answers right (%)", "nats per token of the answer"),
        strict=True,
    ):
        panel.set_ylim(*((-4, 105) if what.endswith("(%)") else (0, None)))
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda value, _: _count(value))
        if window is not None:
            _mark(panel, page, window, f"window {window:,}")
        _dress(panel, page, "distance (tokens)", what, "")
    if title:
        figure.suptitle(title, color=page.ink, fontsize=10)
    _legend(figure, panels[0], page)
    return figure


def curve_style(index: int) -> tuple[str, str, str]:
    """Colour on light pages, colour on dark pages and marker of the curve number `index` of a picture."""
    return CURVE_STYLES[index % len(CURVE_STYLES)]


def line_style(index: int) -> str | tuple[int, tuple[int, ...]]:
    """The stroke of a curve: curves of the same colour have different strokes, so the first 36 curves all differ."""
    return LINE_STYLES[(index + index // len(CURVE_STYLES)) % len(LINE_STYLES)]


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a picture, in the format of its file extension: .png, .svg, .pdf, …"""
    figure.savefig(path, dpi=160, facecolor=figure.get_facecolor())


def label(result: Result) -> str:
    """The name of a result in tables and pictures."""
    names = {"dense": "dense", "window": f"window {result.window}"}
    name = names.get(result.mode, f"{result.sinks} sinks + window {result.window}")
    if result.mode == "recompute":
        return f"{name}, re-computed"
    return name if result.quantize is None else f"{name}, {result.quantize}"


def _figure(width: float, height: float, dark: bool) -> tuple[_Page, Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotsMissing(
            "pictures need matplotlib: pip install 'streamllm[plots]', or leave the picture out"
        ) from None
    page = DARK if dark else LIGHT
    return page, Figure(figsize=(width, height), facecolor=page.paper, layout="constrained")


def _curve(
    axes: Any, x: Sequence[float], y: Sequence[float], style: tuple[str, str, str], index: int, name: str,
    dark: bool,
) -> None:  # fmt: skip
    on_light, on_dark, marker = style
    axes.plot(
        x, y, color=on_dark if dark else on_light, marker=marker, linestyle=line_style(index),
        markersize=5, linewidth=1.8, label=name,
    )  # fmt: skip


def _dress(axes: Any, page: _Page, x: str, y: str, title: str, grid: bool = True) -> None:
    axes.set_facecolor(page.paper)
    axes.set_xlabel(x, color=page.ink, fontsize=9)
    axes.set_ylabel(y, color=page.ink, fontsize=9)
    if title:
        axes.set_title(title, color=page.ink, fontsize=10, pad=16 if grid else 6)
    axes.tick_params(colors=page.ink, which="both", labelsize=8)
    for spine in axes.spines.values():
        spine.set_color(page.faint)
    if grid:
        axes.grid(color=page.faint, linewidth=0.6, alpha=0.6)


def _mark(axes: Any, page: _Page, x: float, name: str) -> None:
    """A dotted line at x, with its name above the frame, where it hides no curve."""
    axes.axvline(x, color=page.ink, linewidth=1, linestyle=(0, (1, 2)))
    axes.annotate(
        name, (x, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
        ha="center", va="bottom", fontsize=8, color=page.ink,
    )  # fmt: skip


def _legend(figure: Any, axes: Any, page: _Page) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, int(95 / (max(map(len, labels)) + 10)))  # as many as fit the width of the picture
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), fontsize=8,
        frameon=False, labelcolor=page.ink, handlelength=3.2,
    )  # fmt: skip


def _bar(figure: Any, shown: Any, panels: list[Any], page: _Page, name: str) -> None:
    bar = figure.colorbar(shown, ax=panels, fraction=0.05, pad=0.02)
    bar.set_label(name, color=page.ink, fontsize=8)
    bar.ax.tick_params(colors=page.ink, which="both", labelsize=8)
    bar.outline.set_edgecolor(page.faint)


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=20))
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _count(value: float) -> str:
    return f"{value / 1024:,.0f}K" if value >= 1024 else f"{value:,.0f}"
