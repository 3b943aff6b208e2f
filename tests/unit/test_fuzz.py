"""A short run of tools/fuzz.py with a fixed seed; and the faults that it must find are found."""

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parents[2] / "tools" / "fuzz.py"


def run(*arguments, before=""):
    """Runs the fuzzer after the statements `before`."""
    program = (
        f"import runpy, sys\nsys.argv = {['fuzz.py', *arguments]!r}\nsys.path[0] = {str(FUZZ.parent)!r}\n"
        f"{before}\nrunpy.run_path({str(FUZZ)!r}, run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)


def test_short_run_finds_no_failure():
    done = run("--cases", "250", "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 3: 250 cases" in done.stdout
    assert "0 failures" in done.stdout
    for outcome in ("loaded", "CheckpointError", "UnsupportedConfig", "TokenizerError", "ChatTemplateError"):
        assert outcome in done.stdout


BROKEN = """
import mmap, os, streamllm.weights.checkpoint.checkpoint as c
calls = mmap.mmap(-1, 1)  # shared by all processes
def read_config(*arguments):
    calls[0] += 1
    [lambda: {}["x"], os.abort, lambda: bytearray(200_000_000)][calls[0] % 3]()
    return old(*arguments)
old, c.read_config = c.read_config, read_config
"""


def test_faults_are_found():
    """Here, reading a config fails in three ways by turns: an exception, a crash, and too much memory."""
    done = run("--cases", "20", "--seed", "4", before=BROKEN)
    assert done.returncode == 1, done.stdout + done.stderr
    for found in ("KeyError", "the process died (-6)", "MB of memory"):
        assert found in done.stdout
