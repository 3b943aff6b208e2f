"""tools/report.py with a fiftieth of its texts, on a tiny checkpoint."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import streamllm
from streamllm.evaluate.texts import as_stream

pytest.importorskip("matplotlib")
TOOL = Path(__file__).parents[2] / "tools" / "report.py"


def test_every_table_and_picture_is_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TOOL.parent)
    spec = importlib.util.spec_from_file_location("report", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    arguments = ["--model", checkpoint, "--out", tmp_path, "--span", 32, "--tokens", 1500, "--long", 0]
    result = CliRunner().invoke(tool.main, [*map(str, arguments), "--scale", "0.02"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    text, numbers = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "report.json").read_text())
    assert {
        "modes", "pieces", "budgets", "against re-computation", "sinks", "windows", "attention", "recall",
        "tokens per second",
    } == numbers.keys()  # fmt: skip
    assert numbers["budgets"].keys() == {"8", "16", "32", "64", "128"}
    for budget in numbers["budgets"].values():
        assert budget["ratio"] == pytest.approx(budget["window"] / budget["sinks"])
    assert [result["mode"] for result in numbers["modes"]] == ["dense", "window", "sinks", "recompute"]
    for name in ("perplexity", "attention", "recall"):
        for page in ("light", "dark"):
            assert (tmp_path / f"{name}-{page}.png").stat().st_size > 10_000
            assert f"{name}-{page}.png" in text
    for mode in ("dense", "window 32", "4 sinks + window 28", "4 sinks + window 28, re-computed"):
        assert f"| {mode} |" in text


def test_parts_are_made_one_by_one_and_an_interrupted_part_goes_on(checkpoint, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TOOL.parent)
    spec = importlib.util.spec_from_file_location("report", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for name, word in (("emma", "one "), ("persuasion", "two ")):
        (tmp_path / f"{name}.txt").write_text(word * 3000)
    out = tmp_path / "out"
    common = ["--model", checkpoint, "--out", out, "--span", 200, "--scale", "0.02", "--long", 3000, "--write", 700,
              "--seeds", 2, "--text", tmp_path / "emma.txt", "--held-out", tmp_path / "persuasion.txt"]  # fmt: skip

    def run(part, *more):
        return CliRunner().invoke(
            tool.main, [*map(str, common), "--part", part, *more], catch_exceptions=False
        )

    for part in ("writing", "ruler", "reading"):
        assert run(part).exit_code == 0
    text, numbers = (out / "report.md").read_text(), json.loads((out / "report.json").read_text())
    assert numbers.keys() == {"memory", "late over early", "ruler", "writing"}
    assert text.index("One stream of 3,000 tokens of Persuasion (") < text.index("Streams of 2 seeds each")
    assert len(numbers["writing"]) == 4
    assert all(0 <= row["loop_share"] <= 1 and row["nats"] > 0 for row in numbers["writing"].values())
    assert [mark["tokens"] for mark in numbers["memory"]] == [30, 300, 3000]
    assert len(numbers["ruler"]) == 9

    calls = []
    attention = sys.modules["report_quality"].compare

    def interrupted(*arguments, **options):
        calls.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["report_quality"], "compare", interrupted)
    assert run("against").exit_code != 0
    state = json.loads((out / "state.json").read_text())
    held_out = as_stream(streamllm.load_tokenizer(checkpoint), ["two " * 3000])
    state["measured"][f"against: 100 of {len(held_out)}"] = {
        "sinks": 4, "window": 196, "tokens": 9, "difference": 0.25, "error": 0.1, "ratio": 1.3, "eighths": [0.0] * 8,
    }  # fmt: skip
    (out / "state.json").write_text(json.dumps(state))
    monkeypatch.setattr(sys.modules["report_quality"], "compare", attention)
    assert run("against").exit_code == 0
    assert "+0.2500 ± 0.1000 nats per token" in (out / "report.md").read_text()  # measured before, not again
    assert len(calls) == 1

    (tmp_path / "note.md").write_text("Made from nothing.\n")
    writers = "--writer", "sinks, DRY 0.8", "--compile", "flat"
    assert run("writing", "--tokens", "900", "--note", str(tmp_path / "note.md"), *writers).exit_code == 0
    text, numbers = (out / "report.md").read_text(), json.loads((out / "report.json").read_text())
    assert text.startswith("Made from nothing.\n\n")
    assert len(numbers["writing"]) == 2  # the short texts and one writer
    assert len(numbers["ruler"]) == 9  # other sizes keep the other parts
