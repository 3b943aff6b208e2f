"""The vendor of the processor."""

from __future__ import annotations

import builtins
import io

import pytest
import torch

from streamllm.models import processor


@pytest.fixture(autouse=True)
def clear_cache_afterwards():
    yield
    processor.description.cache_clear()


INTEL = "processor : 0\nvendor_id : GenuineIntel\n\nprocessor : 1"
AMD = "processor : 0\nvendor_id : AuthenticAMD"


@pytest.mark.parametrize(
    ("text", "mkl", "wanted"), [(INTEL, True, True), (INTEL, False, False), (AMD, True, False)]
)
def test_the_vendor_is_read_from_proc_cpuinfo(monkeypatch, text, mkl, wanted):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(builtins, "open", lambda path: io.StringIO(text))
    processor.description.cache_clear()
    assert processor._is_intel() is wanted


@pytest.mark.parametrize("name", ["Intel64 Family 6 Model 143 Stepping 8, GenuineIntel", "arm", ""])
def test_without_proc_cpuinfo_the_vendor_is_that_of_platform_processor(monkeypatch, name):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(builtins, "open", missing)
    processor.description.cache_clear()
    monkeypatch.setattr(processor.platform, "processor", lambda: name)
    assert processor._is_intel() is name.endswith("GenuineIntel")
