"""tools/report.py with a fiftieth of its texts, on a tiny checkpoint."""

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

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
        "modes", "pieces", "against re-computation", "sinks", "windows", "attention", "recall", "tokens per second",
    } == numbers.keys()  # fmt: skip
    assert [result["mode"] for result in numbers["modes"]] == ["dense", "window", "sinks", "recompute"]
    for name in ("perplexity", "attention", "recall"):
        for page in ("light", "dark"):
            assert (tmp_path / f"{name}-{page}.png").stat().st_size > 10_000
            assert f"{name}-{page}.png" in text
    for mode in ("dense", "window 32", "4 sinks + window 28", "4 sinks + window 28, re-computed"):
        assert f"| {mode} |" in text
