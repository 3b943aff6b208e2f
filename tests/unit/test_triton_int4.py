"""Products with int4 weights by Triton's interpreter: alone, and in decoding steps of every family."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from streamllm.compiled import triton_int4_kernels
from streamllm.models.linear import quantize
from streamllm.models.quantized import INT4
from tests.laws.families import CONFIGS
from tests.triton_interpreter import mutant, triton_kernels, triton_launch
from tests.unit.test_triton_steps import TOLERANCE, build, interpreted, worst_error

__all__ = ["interpreted"]  # a fixture that each test takes


def random_normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product_error(
    group: int = 32, rows: int = 1, inputs: int = 384, outputs: int = 70, norm: int = 0, gated: bool = False,
    bias: bool = True,
) -> float:  # fmt: skip
    """A product with residual and SiLU against torch's, relative to the standard deviation of the result."""
    numbers, scale = INT4.round(random_normal(outputs, inputs, seed=1), group)
    up_numbers, up_scale = INT4.round(random_normal(outputs, inputs, seed=2), group)
    x, residual = random_normal(rows, 1, inputs, seed=3), random_normal(rows, 1, outputs, seed=4)
    weight, b = random_normal(inputs, seed=5) + 1, random_normal(outputs, seed=6) if bias else None
    given = (norm, weight, weight if norm == triton_kernels.LAYER_NORM else None, 1e-5) if norm else None
    up = (up_numbers, up_scale, b) if gated else None
    got = triton_launch.product(x, numbers, scale, b, given, up, residual, triton_kernels.SILU)
    exact = x.double()
    if norm == triton_kernels.RMS_NORM:
        exact = F.rms_norm(exact, (inputs,), weight.double(), 1e-5)
    elif norm == triton_kernels.LAYER_NORM:
        exact = F.layer_norm(exact, (inputs,), weight.double(), weight.double(), 1e-5)
    bias_exact = None if b is None else b.double()
    wanted = F.silu(F.linear(exact, INT4.dequantized(numbers, scale, torch.float64), bias_exact))
    if gated:
        other = INT4.dequantized(up_numbers, up_scale, torch.float64)
        wanted = wanted * F.linear(exact, other, bias_exact)
    wanted = wanted + residual
    return float((got - wanted).abs().max() / wanted.std())


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("gated", [False, True])
def test_a_product_equals_torchs(group, rows, gated) -> None:
    assert product_error(group, rows, gated=gated) <= TOLERANCE


@pytest.mark.parametrize("norm", [triton_kernels.RMS_NORM, triton_kernels.LAYER_NORM])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 5), (96, 64), (352, 70)])
def test_a_product_after_a_norm_equals_torchs(norm, inputs, outputs) -> None:
    assert product_error(32, 1, inputs, outputs, norm, gated=inputs == 96, bias=False) <= TOLERANCE


def int4_model(name: str) -> torch.nn.Module:
    """Widths 32 to 48, MLP 96: most layers are int4; those with 40 or 48 inputs and the head are int8."""
    model = build(name, mlp_width=96)
    quantize(model, "int4")
    formats = {weight.dtype for weight in model.parameters() if not weight.is_floating_point()}
    assert formats == {torch.int8, torch.uint8}
    return model


@pytest.mark.parametrize("name", ["llama", *CONFIGS])
def test_int4_weights_of_every_family_equal_the_model(name) -> None:
    rows = 1 + 2 * (list(CONFIGS).index(name) % 2) if name in CONFIGS else 1
    assert worst_error(int4_model(name), 2, 5, rows) <= TOLERANCE


MUTATIONS = {
    "numbers are not signed": ("(pairs & 15) - 8", "(pairs & 15) - 7"),
    "halves are swapped": ("pairs >> 4", "pairs & 15"),
    "one scale serves a row": ("row[:, None] * GROUPS + group[None, :]", "row[:, None] * GROUPS + 0 * group[None, :]"),
    "a group is left out": ("range(0, GROUPS, BG)", "range(0, GROUPS - 1, BG)"),
    "a residual is dropped": ("    if RESIDUAL:", "    if RESIDUAL and N < 0:"),
    "a bias is dropped": ("    if BIAS:", "    if BIAS and N < 0:"),
}  # fmt: skip


@pytest.mark.parametrize("fault", MUTATIONS)
def test_a_fault_in_a_kernel_is_seen(fault, monkeypatch, tmp_path) -> None:
    faulty = mutant(tmp_path, triton_int4_kernels, *MUTATIONS[fault])
    if faulty is not None:
        monkeypatch.setattr(triton_launch, "triton_int4_kernels", faulty)
    else:  # in what all products share
        faulty = mutant(tmp_path, triton_kernels, *MUTATIONS[fault])
        assert faulty is not None
        for name in ("store_row", "store_rows"):
            monkeypatch.setattr(triton_int4_kernels, name, getattr(faulty, name))
    assert product_error(inputs=352) > 100 * TOLERANCE


@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_reads_its_weights_by_these_kernels(rows, monkeypatch, tmp_path) -> None:
    faulty = mutant(tmp_path, triton_int4_kernels, "(pairs & 15) - 8", "(pairs & 15) - 7")
    monkeypatch.setattr(triton_launch, "triton_int4_kernels", faulty)
    assert worst_error(int4_model("llama"), 2, 5, rows) > 100 * TOLERANCE


def test_a_fault_of_many_rows_is_seen(monkeypatch, tmp_path) -> None:
    faulty = mutant(tmp_path, triton_int4_kernels, "(at // (GROUP // 2))[None, :]", "0 * at[None, :]")
    assert faulty is not None
    monkeypatch.setattr(triton_launch, "triton_int4_kernels", faulty)
    assert product_error(rows=3) > 100 * TOLERANCE
