"""PackedWeight: a weight in oneDNN's own blocks, which the rest of torch can use as if it were plain.

A packed weight has no strides, no gradient and few functions. So it is unpacked, in place, by whatever changes
it or trains it: `requires_grad_`, an optimizer's step, `copy_` of load_state_dict, `.data` of an adapter's merge.
The object stays the same, so that an optimizer that holds it goes on. Other functions get a plain copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamllm.models.torch_private import no_torch_function, reorder_linear_weight

# Attributes and methods that a packed tensor answers itself; those that return a tensor are not among them.
_PLAIN_COPY_ATTRIBUTES = frozenset(("T", "mT", "H", "mH", "real", "imag"))
_OWN_METHODS = frozenset(
    ("size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex",
     "is_inference", "to_dense", "data_ptr", "untyped_storage", "get_device", "__len__", "__hash__")
)  # fmt: skip
_NOT_IN_PLACE = frozenset(("__invert__", "__index__", "__int__"))
_NEEDS_PLAIN = frozenset(("register_hook", "register_post_accumulate_grad_hook", "retain_grad"))


class PackedWeight(nn.Parameter):
    """A bfloat16 weight [out, in], packed for inference by `pack`. Products read `packed`."""

    packed: Tensor  # the same blocks, without the detour through __torch_function__
    trains: bool  # what `requires_grad` returns, and what it is after unpacking
    gradient: Tensor | None  # of the plain weight, kept for it

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with no_torch_function():
            name = function.__name__
            if name in ("__get__", "__set__", "__delete__"):
                return cls._attribute(function, name, args)
            if name in _OWN_METHODS:
                return function(*args, **kwargs)
            if name == "requires_grad_" and not all((*args[1:], *kwargs.values())):
                args[0].trains = False
                return args[0]
            found = list(_packed_weights((args, kwargs)))
            trains = torch.is_grad_enabled() and any(weight.trains for weight in found)
            if trains or _changes(name) or name in _NEEDS_PLAIN or "out" in kwargs:
                for weight in found:
                    unpack(weight)
                return function(*args, **kwargs)
            return function(*_with_plain_copies(args), **_with_plain_copies(dict(kwargs)))

    @classmethod
    def _attribute(cls, function: Any, access: str, args: Sequence[Any]) -> Any:
        """`weight.name`, `weight.name = value` or `del weight.name`, by the access function of the attribute."""
        weight, name = args[0], function.__self__.__name__
        if access == "__get__":
            if name == "requires_grad":
                return weight.trains
            if name == "grad":
                return weight.gradient
            if name in _PLAIN_COPY_ATTRIBUTES:
                return getattr(weight.packed.to_dense(), name)
            if name != "data":
                return function(*args)
        elif name == "requires_grad" and not args[1]:
            weight.trains = False
            return None
        elif name == "grad" and (access == "__delete__" or args[1] is None):
            weight.gradient = None
            return None
        unpack(weight)
        return function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        copied = memo[id(self)] = _plain(self)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def pack(weight: Tensor) -> None:
    """Pack a bfloat16 weight [out, in] on the CPU, in place.

    Warns, and leaves it plain, while a graph of gradients refers to it: a loss that the caller still holds.
    """
    assert reorder_linear_weight is not None
    with torch.inference_mode(False), torch.no_grad():
        packed = reorder_linear_weight(weight.detach().contiguous(), 1)
        swapped = PackedWeight(packed, requires_grad=False)
    swapped.__dict__.update(weight.__dict__)
    swapped.packed, swapped.trains, swapped.gradient = packed, weight.requires_grad, weight.grad
    try:
        torch.utils.swap_tensors(weight, swapped)  # type: ignore[no-untyped-call]
    except RuntimeError:
        warnings.warn(
            "the weights stay in the layout for training, which is slower to read: something still refers to them, "
            "such as a loss; delete it and call model.eval() again",
            stacklevel=2,
        )


def unpack(weight: Tensor) -> None:
    """Make a packed weight the plain parameter that it was, in place."""
    if isinstance(weight, PackedWeight):
        torch.utils.swap_tensors(weight, _plain(weight))  # type: ignore[no-untyped-call]


def _plain(weight: PackedWeight) -> nn.Parameter:
    with torch.inference_mode(False), torch.no_grad():
        plain = nn.Parameter(weight.packed.to_dense(), requires_grad=weight.trains)
    own = ("packed", "trains", "gradient")
    plain.__dict__.update({name: value for name, value in weight.__dict__.items() if name not in own})
    plain.grad = weight.gradient
    return plain


def _packed_weights(value: Any) -> Iterable[PackedWeight]:
    if isinstance(value, PackedWeight):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _packed_weights(item)
    elif isinstance(value, Mapping):
        yield from _packed_weights(list(value.values()))


def _with_plain_copies(value: Any) -> Any:
    if isinstance(value, PackedWeight):
        return value.packed.to_dense()
    if isinstance(value, (tuple, list)):
        return type(value)(_with_plain_copies(item) for item in value)
    if isinstance(value, dict):
        return {key: _with_plain_copies(item) for key, item in value.items()}
    return value


def _changes(name: str) -> bool:
    """Whether a function of torch, by its name, writes to its argument: `add_`, `__iadd__`, `__setitem__`."""
    if name.startswith("__"):
        return name == "__setitem__" or (
            name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
        )
    return name.endswith("_")
