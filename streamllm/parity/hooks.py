"""Reading the inputs and outputs of modules, and comparing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

Hook = Callable[[str, Any, Any], None]  # (module name, inputs, output)


@contextmanager
def hooked(model: nn.Module, names: Sequence[str], hook: Hook) -> Iterator[None]:
    """Inside this context, each forward of a named module calls hook(name, inputs, output)."""
    handles = []
    try:
        for name in names:

            def on_forward(
                _: nn.Module, args: Any, kwargs: dict[str, Any], output: Any, name: str = name
            ) -> None:
                hook(name, args or tuple(kwargs.values()), output)

            module = model.get_submodule(name)
            handles.append(module.register_forward_hook(on_forward, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def captured(
    names: dict[str, str],
    model: nn.Module,
    outputs: dict[str, Tensor],
    inputs: dict[str, Tensor] | None = None,
) -> AbstractContextManager[None]:
    """Inside this context, `outputs` (and `inputs`) collect the tensors of modules.

    names: name of a module in `model` -> the key under which its tensors are stored.
    """

    def keep(name: str, arguments: Any, output: Any) -> None:
        outputs[names[name]] = first_tensor(output)
        if inputs is not None:
            inputs[names[name]] = first_tensor(arguments)

    return hooked(model, list(names), keep)


def first_tensor(value: Any) -> Tensor:
    """The first tensor of a module's inputs or output, in float32 on the CPU."""
    while isinstance(value, (tuple, list)):
        value = value[0]
    return value.detach().float().cpu()  # type: ignore[no-any-return]


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, each relative to its own value plus the root mean square of all values.

    Infinite for other shapes and for NaN. [B, H, T, D] and [B, T, H, D] count as the same shape.
    """
    if ours.shape != theirs.shape and ours.dim() == 4:
        ours = ours.transpose(1, 2)
    if ours.shape != theirs.shape:
        return float("inf")
    size = theirs.square().mean().sqrt()
    worst = ((ours - theirs).abs() / (theirs.abs() + size)).max().item()
    return worst if worst == worst else float("inf")
