"""The results of tools/gpu_check.py as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def summary(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if "machine" in row:
            lines.append(" · ".join(f"{name} {value}" for name, value in row["machine"].items()))
            break
    checks = [row for row in rows if "ok" in row]
    wrong = [row for row in checks if not row["ok"]]
    lines += ["", f"{len(checks)} checks, {len(wrong)} wrong", ""]
    lines += [f"- WRONG {row['what']}: {row['value']:.3g} (allowed {row['allowed']:.3g})" for row in wrong]
    lines += [f"- {row['part']}: {row['failed']}" for row in rows if row.get("failed")]
    lines += [
        f"- warning: {text}" for text in dict.fromkeys(row["warning"] for row in rows if "warning" in row)
    ]
    times = [row for row in rows if "ms" in row]
    if times:
        limits = {row["place"]: row["ms"] for row in times if row["system"] == "limit"}
        peers = {row["place"]: row["ms"] for row in times if row["system"].startswith("transformers")}
        lines += [
            "",
            "| what | system | ms | × limit | streams' tokens/s | transformers / this |",
            "|---" * 6 + "|",
        ]
        for row in times:
            ms, limit, peer = row["ms"], limits.get(row["place"]), peers.get(row["place"])
            of_limit = f"{ms / limit:.3f}" if limit else ""
            of_peer = f"{peer / ms:.2f}" if peer else ""
            lines.append(
                f"| {row['place']} | {row['system']} | {ms:.3f} | {of_limit} | {row['per_second']:,.0f} | {of_peer} |"
            )
    tiles = [row for row in rows if "tile" in row]
    if tiles:
        lines += [
            "",
            "| product | tile | µs | TB/s | cuBLAS µs | by the table or rule µs |",
            "|---" * 6 + "|",
        ]
        lines += [
            f"| {row['product']} | {row['tile']} | {row['us']:.1f} | {row['tb_per_s']:.2f} | {row['cublas_us']:.1f} "
            f"| {row['default_us']:.1f} |"
            for row in tiles
        ]
    kernels = [row for row in rows if "kernel" in row]
    if kernels:
        lines += ["", "| kernel | calls per token | µs per token |", "|---|---|---|"]
        lines += [f"| {row['kernel']} | {row['calls']:.1f} | {row['us']:.1f} |" for row in kernels]
    return "\n".join(lines) + "\n"
