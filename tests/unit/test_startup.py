"""`import streamllm` and the command line load no slow module, and little memory, before a command runs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import streamllm
from streamllm.cli import COMMANDS
from streamllm.commands import options, parity, perplexity, recall

SLOW_MODULES = (
    "torch", "transformers", "tokenizers", "sentencepiece", "safetensors", "huggingface_hub", "numpy",
    "matplotlib", "jinja2",
)  # fmt: skip
MEMORY_LIMIT = 60  # MB resident, of which Python and click take a third

# The last line of the output is JSON: exit code, slow modules that were loaded, peak resident memory in kB. The
# peak is read from /proc: the one of getrusage starts with the memory of the process that started this one.
PROBE = f"""
import json, sys
code = 0
if sys.argv[1:] == ["import"]:
    import streamllm
else:
    from streamllm.cli import main
    try:
        main(sys.argv[1:])
    except SystemExit as end:
        code = end.code
loaded = [name for name in {SLOW_MODULES!r} if name in sys.modules]
try:
    lines = open("/proc/self/status").read().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
except OSError:
    peak = None
print("\\n" + json.dumps([code, loaded, peak]))
"""


def probe(*args: str) -> tuple[int, list[str], int | None]:
    command = [sys.executable, "-c", PROBE, *args]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    code, loaded, peak = json.loads(result.stdout.splitlines()[-1])
    return code, loaded, peak


def assert_light(args: tuple[str, ...], expected_code: int) -> None:
    code, loaded, peak = probe(*args)
    assert (code, loaded) == (expected_code, [])
    assert peak is None or peak < MEMORY_LIMIT * 1000


def test_the_probe_notices_torch() -> None:
    code, loaded, peak = probe("generate", "--device", "cuda:99", "one")
    assert code == 2
    assert "torch" in loaded
    assert peak is None or peak > MEMORY_LIMIT * 1000


def test_importing_the_package_is_light() -> None:
    assert_light(("import",), 0)


@pytest.mark.parametrize(
    "args", [("--help",), ("--version",), *((name, "--help") for name in COMMANDS)], ids=" ".join
)
def test_help_is_light(args: tuple[str, ...]) -> None:
    assert_light(args, 0)


def test_the_list_of_models_is_light() -> None:
    assert_light(("models",), 0)


WRONG = [
    ("nonsense",),
    ("generate", "--window", "0"),
    ("generate", "--device", "cpu", "-n", "many"),
    ("generate", "--compile", "llvm"),
    ("generate", "one", "--file", __file__, "--device", "cpu"),
    ("generate", "--file", "nowhere.txt"),
    ("info", "--sinks", "-1"),
    ("parity", "--dtype", "int8"),
    ("perplexity", "--mode", "sliding"),
    ("perplexity", "nowhere.txt"),
    ("inspect", "--sinks", "two"),
    ("recall", "--wording", "verse"),
    ("convert", "one"),
]


@pytest.mark.parametrize("args", WRONG, ids=" ".join)
def test_errors_about_options_are_light(args: tuple[str, ...]) -> None:
    assert_light(args, 2)


def test_choices_of_options_are_those_of_the_modules_that_import_torch() -> None:
    from streamllm.compiled import BACKENDS
    from streamllm.evaluate import MODES, WORDINGS
    from streamllm.parity import DTYPES

    assert options.COMPILE_BACKENDS == BACKENDS
    assert perplexity.MODES == MODES
    assert tuple(WORDINGS) == recall.WORDINGS
    assert tuple(DTYPES) == parity.DTYPES


# The public names of the package


def test_public_names_are_listed_alike_for_users_for_type_checkers_and_for_imports() -> None:
    tree = ast.parse(Path(streamllm.__file__).read_text(encoding="utf-8"))
    imports = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("streamllm")
        for alias in node.names
    }
    assert imports == streamllm._MODULE_OF
    assert sorted(imports) == sorted(streamllm.__all__)
    assert set(streamllm.__all__) <= set(dir(streamllm))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'streamllm' has no attribute 'lod'"):
        streamllm.lod  # noqa: B018


def test_no_module_has_the_name_of_a_public_function() -> None:
    """Importing streamllm.load, if there were one, would replace the function by the module."""
    modules = {path.stem for path in Path(streamllm.__path__[0]).iterdir()}
    assert not modules & set(streamllm.__all__)
