"""Arguments: what every call checks before it changes anything."""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def whole_number(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """The value as an int: also a NumPy integer or a tensor of one. Raises ValueError for others, True and False.

    `least` and `most` are allowed, too.
    """
    try:
        number = None if isinstance(value, bool) else index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        if least is None:
            allowed = "a whole number"
        elif most is None:
            allowed = f"a whole number of at least {least}"
        else:
            allowed = f"a whole number in {least} … {most}"
        raise ValueError(f"{name} must be {allowed}, not {value!r}")
    return number


def wrong_tokens(tokens: Any, device: torch.device) -> ValueError:
    """What is wrong with tokens that are not int64 or int32 [B, T] on the model's device."""
    if not hasattr(tokens, "dtype") or not hasattr(tokens, "device"):
        return ValueError(f"tokens must be a tensor of token ids, not {type(tokens).__name__}")
    if tokens.device != device and tokens.dim() == 2 and not tokens.is_floating_point():
        return ValueError(f"the tokens are on {tokens.device} and the model is on {device}: move one of them")
    return ValueError(
        f"tokens must be int64 or int32 of shape [batch, length] with at least one of each, "
        f"not {tokens.dtype} of shape {list(tokens.shape)}"
    )
