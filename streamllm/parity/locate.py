"""Finding the first module whose output differs from transformers'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamllm.parity.hooks import Hook, captured, first_tensor, hooked, relative_difference
from streamllm.parity.names import compared_modules, fused_parts, part_of_output, stored_tensors
from streamllm.parity.reference import Outputs, Reference
from streamllm.parity.report import Difference
from streamllm.weights.checkpoint import Checkpoint

RELATIVE_TOLERANCE = 1e-4  # tensors count as different from here on


def first_difference(
    reference: Reference, checkpoint: Checkpoint, ids: Tensor, theirs: Outputs, device: str | torch.device
) -> Difference | None:
    """The first module with equal inputs and different outputs, in float32; None where no layer stands out.

    theirs: the outputs of `reference` for `ids` [1, T]. Both models are loaded once more to look into a layer.
    """
    differences: dict[str, float] = {}

    def measure(name: str, _: Any, output: Any) -> None:
        differences[name] = relative_difference(first_tensor(output), theirs.modules[name])

    logits = _run_hooked(checkpoint, ids, list(theirs.modules), measure, device)
    differences["head"] = relative_difference(logits, theirs.logits)
    modules = [name for name in [*compared_modules(checkpoint), "head"] if name in differences]
    first = next((name for name in modules if not differences[name] <= RELATIVE_TOLERANCE), None)
    if first is None:
        return None
    before = max((differences[name] for name in modules[: modules.index(first)]), default=0.0)

    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with reference.model(torch.float32) as (model, names):
        inside = [name for name in names if name.startswith(first + ".")]
        with captured({names[name]: names[name] for name in inside}, model, outputs, inputs):
            reference.logits(model, ids)
        del model
    if not first.startswith("layers."):
        stored = stored_tensors(checkpoint, [first])
        return Difference(None, first, names.get(first, "?"), (), stored, before, differences[first])

    parts = fused_parts(checkpoint)
    measured: list[_Measured] = []

    def measure_both(name: str, arguments: Any, output: Any) -> None:
        expected = part_of_output(outputs[names[name]], parts.get(name), checkpoint.config)
        into = relative_difference(first_tensor(arguments), inputs[names[name]])
        measured.append((name, into, relative_difference(first_tensor(output), expected)))

    inside = [name for name in inside if names[name] in outputs]
    _run_hooked(checkpoint, ids, inside, measure_both, device)
    layer = int(first.removeprefix("layers."))
    return _inside_layer(checkpoint, names, layer, before, differences[first], measured)


_Measured = tuple[str, float, float]  # our module, relative difference of its inputs and of its outputs


def _run_hooked(
    checkpoint: Checkpoint, ids: Tensor, names: Sequence[str], hook: Hook, device: str | torch.device
) -> Tensor:
    """Our logits in float32. `hook` is called with the inputs and outputs of the named modules."""
    model = checkpoint.load(torch.float32, device)
    with torch.inference_mode(), hooked(model, names, hook):
        return model(ids.to(device)).float().cpu()  # type: ignore[no-any-return]


def _inside_layer(
    checkpoint: Checkpoint, names: dict[str, str], layer: int, before: float, after: float,
    measured: list[_Measured],
) -> Difference:  # fmt: skip
    """The difference inside one layer, from what was measured at its submodules in the order of the forward."""
    block = f"layers.{layer}"
    containers = {
        name for name, *_ in measured if any(other.startswith(name + ".") for other, *_ in measured)
    }
    leaves = [one for one in measured if one[0] not in containers]
    wrong = [
        name for name, into, out in leaves if into <= RELATIVE_TOLERANCE and not out <= RELATIVE_TOLERANCE
    ]
    first = next(
        (i for i, (_, into, out) in enumerate(leaves) if not max(into, out) <= RELATIVE_TOLERANCE), None
    )
    if first is not None and leaves[first][0] in wrong:
        parent = leaves[first][0].rpartition(".")[0]
        wrong = [name for name in wrong if name.rpartition(".")[0] == parent]
        into = max(into for name, into, _ in leaves if name in wrong)
        out = max(out for name, _, out in leaves if name in wrong)
        parts = tuple((name, names[name]) for name in wrong)
        tensors = stored_tensors(checkpoint, wrong)
        return Difference(layer, parent, names.get(parent, "?"), parts, tensors, into, out)
    # The submodules before `first` agree, but its input differs: the difference is computed between them.
    parent = block if first is None else leaves[first][0].rpartition(".")[0]
    if first is not None and not any(name.startswith(parent + ".") for name, _, _ in leaves[:first]):
        parent = block
    out = after if first is None else leaves[first][1]
    into = max((max(one[1:]) for one in leaves[:first]), default=before)
    return Difference(layer, parent, names.get(parent, "?"), (), (), into, out)
