"""Compare logits past eviction with those of the paper's own code, mit-han-lab/streaming-llm, token by token.

    python -m venv ENV && ENV/bin/pip install transformers==4.33.0 "numpy<2" torch
    git clone https://github.com/mit-han-lab/streaming-llm FOLDER
    python tools/against_streaming_llm.py ENV FOLDER          # a minute on one core

Its code runs in ENV, in a process of its own (tools/streaming_llm_peer.py): small checkpoints of four families with
large random weights, one token per forward, start 4, recent 12. This library reads the same files with sinks=4 and
window=13, because that code evicts after the forward. Differences are in units of the logits' standard deviation.

On transformers 4.33's own Falcon and MPT, that code raises an error or never evicts: see the column "as shipped". It
is compared with the dimensions and the attribute set right.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import torch

import streamllm

START, RECENT = 4, 12
FAMILIES = ("llama", "gpt_neox", "falcon", "mpt")
MAX_DIFFERENCE = 1e-5  # in standard deviations of the logits
PEER = Path(__file__).with_name("streaming_llm_peer.py")


def run_theirs(environment: Path, source: Path, family: str, length: int, folder: Path) -> dict[str, str]:
    """Runs the original on a new checkpoint in `folder`, and returns what it found."""
    python = next(
        (p for p in (environment / "bin/python", environment / "Scripts/python.exe") if p.exists()), None
    )
    if python is None:
        raise click.UsageError(f"{environment} is not an environment: it has no bin/python")
    command = [str(python), str(PEER), str(source), family, str(length), str(folder)]
    command += [str(START), str(RECENT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{family} failed in {environment}:\n{done.stderr[-2000:]}")
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.inference_mode()
def difference(folder: Path) -> tuple[float, float]:
    """The largest difference of the logits, token by token and in one call, in standard deviations."""
    tokens = torch.load(folder / "tokens.pt")
    theirs = torch.load(folder / "logits.pt")
    model = streamllm.load_model(folder, dtype="float32", device="cpu", match_transformers=True)
    cache = streamllm.SinkCache(model, sinks=START, window=RECENT + 1)
    single = torch.cat([model(token, cache) for token in tokens.split(1, dim=1)], 1)
    cache.reset()
    whole = model(tokens, cache)
    found = [float((ours - theirs).abs().max() / theirs.std()) for ours in (single, whole)]
    return found[0], found[1]


@click.command()
@click.argument("environment", metavar="ENV", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("source", metavar="FOLDER", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--length", default=60, show_default=True, help="Tokens of the text.")
def main(environment: Path, source: Path, length: int) -> None:
    """Compare with streaming-llm in FOLDER, run by the environment ENV."""
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        for family in FAMILIES:
            folder = Path(temporary) / family
            theirs = run_theirs(environment, source, family, length, folder)
            if family == FAMILIES[0]:
                click.echo(
                    f"start {START}, recent {RECENT} there; sinks={START}, window={RECENT + 1} here; {length} tokens; "
                    f"transformers {theirs['transformers']} there; float32\n"
                )
                click.echo(f"{'':10}{'token by token':>16}{'in one call':>14}   as shipped")
            single, whole = difference(folder)
            good = max(single, whole) <= MAX_DIFFERENCE
            failed |= not good
            verdict = "" if good else "  TOO FAR"
            click.echo(f"{family:10}{single:16.1e}{whole:14.1e}   {theirs['as shipped']}{verdict}")
    click.echo(
        f"\n(largest difference of the logits / their standard deviation; must be at most {MAX_DIFFERENCE:g})"
    )
    sys.exit(failed)


if __name__ == "__main__":
    main()
