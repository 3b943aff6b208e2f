"""The table of models, tokenizers, chat templates and the hub work without torch, so that they start quickly."""

import subprocess
import sys

PROGRAM = """
import importlib, importlib.util, sys, types


class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch was imported")


sys.meta_path.insert(0, NoTorch())
# An empty package in place of streamllm/__init__.py, which this test does not import.
package = types.ModuleType("streamllm")
package.__path__ = importlib.util.find_spec("streamllm").submodule_search_locations
sys.modules["streamllm"] = package
for name in sys.argv[1:]:
    importlib.import_module(name)

from streamllm.weights import MODEL_TYPES
print(len([example for row in MODEL_TYPES.values() for variant in row.variants for example in variant.examples]))
"""
MODULES = [
    "streamllm.chat",
    "streamllm.tokenizer",
    "streamllm.weights",
    "streamllm.weights.catalogue",
    "streamllm.weights.config_reader",
    "streamllm.weights.errors",
    "streamllm.weights.files",
    "streamllm.weights.source",
]


def test_modules_are_imported_without_torch() -> None:
    command = [sys.executable, "-c", PROGRAM, *MODULES]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) > 20
