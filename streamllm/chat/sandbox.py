"""Sandbox: the jinja2 environment in which a template runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import BuiltinMethodType, GeneratorType, MethodType
from typing import Any, NoReturn

from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from streamllm.chat.allowed import ATTRIBUTES, FORBIDDEN_FILTERS, SELECTING_FILTERS
from streamllm.chat.budget import Budget
from streamllm.chat.compiler import CountingCodeGenerator, GenerationBlock
from streamllm.chat.costs import FILTER_COSTS, check_bits, pay_for_format, pay_for_method, pay_for_operator
from streamllm.chat.functions import (
    DictFunction,
    SafeNamespace,
    bounded_range,
    raise_exception,
    strftime_now,
    tojson,
)

_JINJA_KEYWORDS = ("_loop_vars", "_block_vars")  # jinja2 adds them to every call


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with a budget. There is one for each prompt, because the budget is the prompt's."""

    code_generator_class = CountingCodeGenerator
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        self.finalize = self._paid_output
        del self.globals["lipsum"]
        self.globals["dict"] = DictFunction()
        self.globals["namespace"] = SafeNamespace
        self.globals["range"] = bounded_range
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = strftime_now
        self.filters["tojson"] = tojson
        self.filters = {
            name: self._guarded_filter(name, function)
            for name, function in self.filters.items()
            if name not in FORBIDDEN_FILTERS
        }
        self.tests = {name: self._guarded_test(function) for name, function in self.tests.items()}

    # Output and literals. The code that `CountingCodeGenerator` makes calls these methods.

    def _paid_output(self, value: Any) -> Any:
        """The value of `{{ … }}` before it becomes text. Text is paid for in `concat`."""
        if not isinstance(value, str):
            self.budget.pay_for(value)
        return value

    def concat(self, parts: Iterable[str]) -> str:
        """The output of the template, of a macro or of a `{% set %}` block."""
        paid = []
        for part in parts:
            self.budget.pay(len(part))
            paid.append(part)
        return "".join(paid)

    def concatenated(self, parts: tuple[Any, ...]) -> str:
        """`a ~ b`."""
        self.budget.step()
        paid = sum(map(self.budget.weight, parts))
        self.budget.pay(paid)
        return self.budget.joined("".join(map(str, parts)), paid)

    def literal(self, value: Any) -> Any:
        """A list, tuple or dict that is written in the template."""
        self.budget.step()
        self.budget.pay_for(value)
        return value

    def sliced(self, value: Any) -> Any:
        """A slice, which is a copy."""
        self.budget.step()
        self.budget.pay(len(value) if hasattr(value, "__len__") else 1)
        return value

    # Operators, attributes and calls. jinja2 calls these methods.

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.step()
        paid = pay_for_operator(self.budget, operator, left, right)
        result = super().call_binop(context, operator, left, right)
        return self.budget.joined(result, paid) if paid else result

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, allowed in ATTRIBUTES.items():
            if isinstance(obj, kind):
                return attr in allowed
        return isinstance(obj, (SafeNamespace, DictFunction)) and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        # In jinja2, `{{ x.__class__ }}` prints nothing and only its use is an error. Here naming it is one.
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__}")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        format_safely = super().wrap_str_format(value)
        if format_safely is None:
            return None
        text: str = value.__self__

        def guarded(*args: Any, **kwargs: Any) -> str:
            pay_for_format(self.budget, text, args, kwargs)
            return format_safely(*args, **kwargs)

        return guarded

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # The names with underscores are jinja2's: a template may pass any keyword, `self` too.
        budget = __self.budget
        budget.step()
        values = [*args, *(value for name, value in kwargs.items() if name not in _JINJA_KEYWORDS)]
        if isinstance(__obj, Macro) and not (__obj.catch_varargs or __obj.catch_kwargs):
            budget.pay(len(values))  # they become variables: nothing is made
        else:
            budget.pay_for(*values)
        if isinstance(__obj, (BuiltinMethodType, MethodType)):
            args = pay_for_method(budget, __obj.__self__, __obj.__name__, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, (str, list, tuple, dict)):
            budget.pay_for(result)
        return result

    # Filters and tests.

    def _guarded_test(self, function: Any) -> Callable[..., Any]:
        @functools.wraps(function)  # jinja2 marks functions with attributes, which stay
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.budget.step()
            return function(*args, **kwargs)

        return guarded

    def _guarded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        skip = (
            1 if hasattr(function, "jinja_pass_arg") else 0
        )  # jinja2 passes a context or an environment first
        pay = FILTER_COSTS.get(name)

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.budget.step()
            if name == "join" and len(args) > skip and not hasattr(args[skip], "__len__"):
                args = (*args[:skip], list(args[skip]), *args[skip + 1 :])
            if pay is not None:
                pay(self.budget, *args[skip:], **kwargs)
            result = function(*args, **kwargs)
            if isinstance(result, int):
                check_bits(result.bit_length())
            if isinstance(result, GeneratorType):
                # An iterator again, as jinja2 expects, but not a million generators inside each other.
                return iter(self._collected(result, name in SELECTING_FILTERS))
            if isinstance(result, (str, list, tuple, dict)):
                if name in SELECTING_FILTERS:
                    self.budget.pay(len(result))
                else:
                    self.budget.pay_for(result)
            return result

        return guarded

    def _collected(self, values: Iterable[Any], selecting: bool) -> list[Any]:
        """The values of a generator, each paid for; values that existed before cost only their place."""
        paid = []
        for value in values:
            self.budget.step()
            self.budget.pay_for(None if selecting else value)
            paid.append(value)
        return paid
