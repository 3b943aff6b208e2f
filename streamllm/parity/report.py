"""What a comparison found, and how it is printed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from streamllm.weights.checkpoint import StoredTensor


@dataclass(frozen=True)
class Row:
    """One comparison of logits. Differences are in units of the standard deviation of the expected logits."""

    what: str
    tokens: int
    maximum: float
    mean: float
    limit: float | None  # None: for information only
    by_mean: bool = False  # the limit is for the mean, else for the maximum

    @property
    def passed(self) -> bool:
        measured = self.mean if self.by_mean else self.maximum
        return self.limit is None or measured <= self.limit  # False for NaN


@dataclass(frozen=True)
class Difference:
    """The first module whose output differs."""

    layer: int | None  # None: the embedding, the final norm or the head
    ours: str  # name of the module here
    theirs: str  # name of the module in transformers
    parts: tuple[
        tuple[str, str], ...
    ]  # the submodules that differ, (ours, theirs); empty where none stands out
    tensors: tuple[StoredTensor, ...]  # the tensors on disk that these are read from
    before: float  # largest relative difference of the inputs
    after: float  # largest relative difference of the outputs


@dataclass
class Report:
    """What `compare` or `compare_streaming` found. str(report) is the text that the command prints."""

    heading: list[tuple[str, str]]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    difference: Difference | None = None
    refused: bool = False  # the checkpoint loads with match_transformers=True only

    @property
    def passed(self) -> bool:
        return not self.refused and all(row.passed for row in self.rows)

    def __str__(self) -> str:
        return "\n".join(_report_lines(self))


def _report_lines(report: Report) -> Iterator[str]:
    for name, value in report.heading:
        yield f"{name:<10} {value}"
    yield ""
    yield f"{'':38} {'tokens':>7} {'max':>9} {'mean':>9}   must be"
    for row in report.rows:
        limit = "" if row.limit is None else f"{'mean' if row.by_mean else 'max'} ≤ {row.limit:.1e}"
        verdict = "" if row.limit is None else "ok" if row.passed else "DIFFERS"
        line = f"{row.what:<38} {row.tokens:>7,} {row.maximum:>9.1e} {row.mean:>9.1e}   {limit:<15} {verdict}"
        yield line.rstrip()
    yield "(differences of logits, in units of their standard deviation)"
    if report.notes or report.difference:
        yield ""
    yield from report.notes
    if report.difference is not None:
        yield from _difference_lines(report.difference)


def _difference_lines(found: Difference) -> Iterator[str]:
    where = f"layer {found.layer}" if found.layer is not None else f"the {found.ours}"
    yield f"the first difference is in {where}: {found.before:.0e} before it, {found.after:.0e} after"
    rows = [("here", "in transformers"), (found.ours, found.theirs), *found.parts]
    width = max(len(ours) for ours, _ in rows)
    for ours, theirs in rows:
        yield f"  {ours:<{width}}  {theirs}"
    if found.tensors:
        yield "read from"
        for stored in found.tensors:
            yield f"  {stored.name} {list(stored.shape)} {stored.dtype} in {stored.path.name}"
    elif found.layer is not None:
        yield "all submodules agree: the difference is in what is computed between them, not in a tensor"
