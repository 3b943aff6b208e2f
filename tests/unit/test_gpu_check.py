"""tools/gpu_check.py on the CPU's tiny shapes: the script runs end to end, and keeps what it had when it is stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "gpu_check.py"
PARTS = ["smoke", "laws", "fast", "tiles", "decode-8b", "decode-7b", "decode-1b", "batch", "prefill", "peers"]


def check(folder: Path, *options: str) -> list[dict]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--out", str(folder / "results"), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert rows == json.loads((folder / "results.json").read_text())
    return rows


def test_all_parts_run_on_the_cpu(tmp_path) -> None:
    rows = check(tmp_path)
    assert [row["part"] for row in rows if "seconds" in row] == PARTS
    assert not [row for row in rows if row.get("failed")]
    assert all(row["ok"] for row in rows if "ok" in row)
    places = {row["place"] for row in rows if "ms" in row}
    assert {"8B, S+W 64, bfloat16, batch 1", "8B, prefill of 80", "8B, scoring of 80"} <= places
    assert "| × limit |" in (tmp_path / "results.md").read_text()


def test_a_part_that_takes_too_long_is_stopped(tmp_path) -> None:
    """Importing torch takes longer than the part has."""
    rows = check(tmp_path, "--parts", "decode-1b", "batch", "--limit", "0.5", "--least", "0.1")
    assert [row["part"] for row in rows] == ["decode-1b", "batch"]
    assert rows[0]["failed"] == "stopped after 0 s"
    assert rows[1]["failed"] == "not run: no time left"
