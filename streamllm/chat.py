"""Chat templates: a list of messages in, the prompt that a model was trained on out.

A template is a small jinja2 program out of a checkpoint, written by a stranger and run on every prompt. It is
given what the templates of the hub expect (the variables and helpers of `render`), and nothing else:

* **No way out.** jinja2's immutable sandbox, with a list of the attributes that may be named; any other
  raises where it is named. No loader, so no `include` or `import`.
* **An end.** Every block, call, filter, test, comparison and operator of the compiled template takes a step
  from a `_Budget`, which also looks at the clock, and whatever makes a value pays for its size, before it is
  made where it could be large. That bounds nested loops, recursive macros, `"a" * 10**9`, doubling in a loop,
  and lists that hold a list twice, which holds a list twice, forty times over. It needs no signal and no
  second process, so it works in any thread. Between two steps there is only work in proportion to the size of
  values, and that was paid.
"""

from __future__ import annotations

import functools
import json
import re
import string
import time
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from datetime import datetime
from types import BuiltinMethodType, CodeType, GeneratorType, MethodType
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Cycler, Joiner, Namespace

Message = Mapping[str, Any]


class ChatTemplateError(ValueError):
    """A chat template that is missing, broken, refused these messages, or did what no template may."""


@dataclass(frozen=True)
class Limits:
    """What a template may use for one prompt. Real ones stay far below.

    Args:
        steps: blocks, calls, filters, tests, comparisons and operators that are evaluated.
        seconds: by the clock.
        size: characters of text and elements of lists that it makes; 256 times the chat's own come on top.
        template: characters of the template itself.
    """

    steps: int = 5_000_000
    seconds: float = 5.0
    size: int = 4_000_000
    template: int = 100_000


def render(
    template: str | Mapping[str, str] | None,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    special_tokens: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    **variables: Any,
) -> str:
    """The text of a prompt. Encode it with `add_special_tokens=False`: templates write BOS themselves.

    It is what transformers 5 renders: keys of a message that are None are left out, and a message's
    `reasoning` or `thinking` is known as `reasoning_content` too.

    Args:
        template: the template, or several by name: "tool_use" is taken when there are tools, else "default".
        messages: at least one, for example `[{"role": "user", "content": "Hello"}]`.
        tools: JSON schemas of functions that the model may call.
        documents: texts that the model may cite.
        add_generation_prompt: end with what opens the model's answer.
        special_tokens: by name; the template sees `bos_token` and so on as variables.
        variables: whatever else the template knows, for example `enable_thinking=False`.

    Raises:
        ChatTemplateError: no such template; it is broken, refuses the messages, forbidden or endless; or the
        messages
            hold something that is no JSON.
    """
    limits = limits or Limits()
    source = _choose(template, tools)
    if len(source) > limits.template:
        raise ChatTemplateError(
            f"the chat template has {len(source):,} characters; at most {limits.template:,} are allowed"
        )
    try:
        given = {
            **(special_tokens or {}),
            **_plain(variables, "a template variable"),
            "messages": _messages(messages),
            "tools": _plain(tools, "tools"),
            "documents": _plain(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        code = _compile(source)
        sandbox = _Sandbox(_Budget(limits, given))
        return Template.from_code(sandbox, code, sandbox.make_globals(None)).render(given)
    except _Refused as error:
        raise ChatTemplateError(f"the chat template refuses these messages: {error}") from None
    except RecursionError:
        raise ChatTemplateError("the chat template, or the chat, is nested too deeply") from None
    except SecurityError as error:
        raise ChatTemplateError(f"the chat template tried what no template may do: {error}") from None
    except ChatTemplateError:
        raise
    except Exception as error:  # whatever a stranger's program can raise
        line = getattr(error, "lineno", None)
        where = f" (line {line})" if isinstance(line, int) else ""
        message = str(error)[:300] or type(error).__name__
        raise ChatTemplateError(f"the chat template does not work{where}: {message}") from error


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> CodeType:
    """The program of a template, made once: the environment, and with it the budget, is bound when it runs.

    jinja2 computes constants while it compiles. What does not fit into this small budget is left to the run.
    """
    return _Sandbox(_Budget(Limits(steps=10_000, seconds=0.5, size=100_000), {})).compile(source)


def _choose(template: str | Mapping[str, str] | None, tools: object) -> str:
    if template is None:
        raise ChatTemplateError(
            "this tokenizer has no chat template, so its model was hardly trained on chats; "
            "pass chat_template=…, or prompt it with plain text"
        )
    if isinstance(template, str):
        return template
    for name in ("tool_use", "default") if tools is not None else ("default",):
        if name in template:
            return template[name]
    raise ChatTemplateError(
        f"none of the chat templates {', '.join(sorted(template))} is called default; "
        "pass one of them as chat_template=tokenizer.chat_template[name]"
    )


_REASONING = ("reasoning_content", "thinking", "reasoning")


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as templates expect them: plain JSON, without keys that are None."""
    if isinstance(messages, (str, Mapping)) or not messages:
        raise ChatTemplateError(
            "messages must be a list of at least one message, "
            "for example [{'role': 'user', 'content': 'Hello'}]"
        )
    plain: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatTemplateError(
                f"message {index} is a {type(message).__name__}; "
                "a message is a dict, for example {'role': 'user', 'content': 'Hello'}"
            )
        kept = {key: value for key, value in message.items() if value is not None}
        reasoning = next((kept[key] for key in _REASONING if key in kept), None)
        if reasoning is not None:
            kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
        plain.append(_plain(kept, f"message {index}"))
    return plain


def _plain(value: Any, where: str) -> Any:
    """A copy in exactly JSON's types: other objects have methods that no sandbox knows."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(inner, where) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, where) for inner in value]
    raise ChatTemplateError(
        f"{where} holds a {type(value).__name__}; "
        "allowed are text, numbers, booleans, None, and lists and dicts of them"
    )


# ------------------------------------------------------------------------------------------------- the budget


_CONTAINERS = (str, list, tuple, dict, KeysView, ValuesView, ItemsView)


class _Budget:
    """What is left of `Limits`, and how things are weighed.

    The weight of a value is what it would take to write it down: characters, elements, and everything inside,
    as often as it occurs. Whatever builds a value pays its weight, so no value is heavier than the budget,
    and what then happens to it in C code without a step (comparing, hashing, sorting, `str()`) takes time in
    proportion.
    """

    def __init__(self, limits: Limits, given: Mapping[str, Any]) -> None:
        self._limits = limits
        self._steps = limits.steps
        self._end = time.monotonic() + limits.seconds
        self._room = 2**62
        weight, _ = self.weight(given)
        self._room = limits.size + 256 * weight

    def step(self) -> bool:
        self._steps -= 1
        if self._steps < 0:
            raise ChatTemplateError(
                f"the chat template was stopped: it takes over {self._limits.steps:,} steps"
            )
        if time.monotonic() > self._end:
            raise ChatTemplateError(
                f"the chat template was stopped: it takes over {self._limits.seconds} seconds"
            )
        return True

    def pay(self, amount: int) -> None:
        self._room -= amount
        if self._room < 0:
            self._too_large()

    def pay_for(self, *values: Any) -> None:
        for value in values:
            self.pay(self.weight(value)[0])

    def weight(self, value: Any) -> tuple[int, int]:
        """Weight and depth of a value, found without recursion; values beyond the budget are not followed to
        their end."""
        total, depth = 0, 0
        level = [value]
        while level:
            depth += 1
            inner: list[Any] = []
            for each in level:
                total += 1
                if isinstance(each, _CONTAINERS):
                    total += len(each)
                    if total > self._room:
                        self._too_large()
                    if isinstance(each, dict):
                        inner.extend(each.values())
                    if not isinstance(each, str):
                        inner.extend(each)
            level = inner
        return total, depth

    def _too_large(self) -> NoReturn:
        raise ChatTemplateError(
            f"the chat template was stopped: it makes more text or lists than {self._limits.size:,} "
            "characters and elements"
        )


# ------------------------------------------------------------------------------------------------ the sandbox


class _Refused(TemplateError):
    """`raise_exception("…")` in a template."""


class _CodeGenerator(CodeGenerator):
    """Compiles a template so that it counts: `environment` is the `_Sandbox` below."""

    def blockvisit(self, body: Iterable[nodes.Node], frame: Frame) -> None:
        # The body of every loop, macro, branch and block: nothing repeats without passing here.
        self.writeline("environment.budget.step()")
        super().blockvisit(body, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self.write("(environment.budget.step() and ")
        super().visit_Compare(node, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        sliced = isinstance(node.arg, nodes.Slice)
        self.write("environment.copied(" if sliced else "")
        super().visit_Getitem(node, frame)
        self.write(")" if sliced else "")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        target = node.ctx == "store"
        self.write("" if target else "environment.built(")
        super().visit_Tuple(node, frame)
        self.write("" if target else ")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self.write("environment.built(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.built(")
        super().visit_Dict(node, frame)
        self.write(")")


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`, which marks a model's words for training: transparent
    here."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The attributes that a template may name, by the type of the object. All others are forbidden.
_ATTRIBUTES: dict[type, frozenset[str]] = {
    str: _names(
        "capitalize casefold center count endswith expandtabs find index isalnum isalpha isascii isdecimal "
        "isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip "
        "partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split "
        "splitlines startswith strip swapcase title upper zfill"
    ),
    list: _names("copy count index"),
    tuple: _names("count index grouper list"),  # the last two of what groupby makes
    dict: _names("copy get items keys values"),
    int: _names("bit_length is_integer"),
    float: _names("is_integer"),
    LoopContext: _names(
        "changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0"
    ),
    Macro: _names("arguments caller catch_kwargs catch_varargs name"),
    Cycler: _names("current items next pos reset"),
    Joiner: _names("sep used"),
}
# What chat templates have no use for, and what takes more time than can be foreseen (striptags: the square).
_NO_FILTERS = _names("pprint striptags urlize wordwrap xmlattr")
# Filters whose result holds nothing that did not stand in what they are given: only the list itself is new.
_SELECTING = _names(
    "attr d default dictsort first items last list max min random reject rejectattr reverse select "
    "selectattr sort unique"
)
_JINJA_KEYWORDS = ("_loop_vars", "_block_vars")  # which it adds to every call
# Methods that search from the right, or strip: in CPython their time can be the product of both lengths.
_SQUARE = _names("lstrip rfind rindex rpartition rsplit rstrip strip")
_PARTS = 4  # weight of a text in parts, as a multiple of the text's: they may be single characters
_MAX_BITS = 16_384  # of whole numbers
_MAX_WIDTH = 999  # to which a number or text is padded


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with a budget; made anew for every prompt, so that the budget is this prompt's."""

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, budget: _Budget) -> None:
        self.budget = budget
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        self.finalize = self._shown
        del self.globals["lipsum"]
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace
        self.globals["range"] = _range
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.filters["tojson"] = _tojson
        self.filters = {
            name: self._guarded_filter(name, function)
            for name, function in self.filters.items()
            if name not in _NO_FILTERS
        }
        self.tests = {name: self._guarded_test(function) for name, function in self.tests.items()}

    # What compiled templates call, beside the methods that jinja2 itself calls.

    def _shown(self, value: Any) -> Any:
        """Every `{{ value }}` before it becomes text."""
        if not isinstance(value, str):  # those are paid for where they are joined
            self.budget.pay_for(value)
        return value

    def concat(self, parts: Iterable[str]) -> str:
        """Output becoming one text: of the template, of a macro, of a `{% set %}` block."""
        kept = []
        for part in parts:
            self.budget.pay(len(part))
            kept.append(part)
        return "".join(kept)

    def joined(self, parts: tuple[Any, ...]) -> str:
        """`a ~ b`."""
        self.budget.step()
        self.budget.pay_for(*parts)
        return "".join(map(str, parts))

    def built(self, value: Any) -> Any:
        """A list, tuple or dict written in the template."""
        self.budget.step()
        self.budget.pay_for(value)
        return value

    def copied(self, value: Any) -> Any:
        """A slice."""
        self.budget.step()
        self.budget.pay(len(value) if hasattr(value, "__len__") else 1)
        return value

    # Operators.

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.step()
        if isinstance(left, int) and isinstance(right, int):
            bits = (
                left.bit_length() * max(right, 1)
                if operator == "**"
                else left.bit_length() + right.bit_length()
            )
            if bits > _MAX_BITS:
                raise SecurityError(f"it computes with numbers of over {_MAX_BITS} bits")
        elif operator == "%" and isinstance(left, str):
            self._check_percent(left, right)
        elif operator == "*":
            for many, count in ((left, right), (right, left)):
                if isinstance(many, (str, list, tuple)) and isinstance(count, int):
                    self.budget.pay(self.budget.weight(many)[0] * max(count, 0))
        elif operator == "+":
            self.budget.pay_for(left, right)
        return super().call_binop(context, operator, left, right)

    def _check_percent(self, text: str, values: Any) -> None:
        """`text % values`."""
        if re.search(r"%[^%a-zA-Z]*(\*|\d{4})", text):
            raise SecurityError(f"it pads a text by %, to more than {_MAX_WIDTH} characters or by a variable")
        self.budget.pay(len(text) + (text.count("%") + 1) * self.budget.weight(values)[0])

    # Attributes and calls.

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, allowed in _ATTRIBUTES.items():
            if isinstance(obj, kind):
                return attr in allowed
        return isinstance(obj, (_Namespace, _Dict)) and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        # jinja2 lets `{{ x.__class__ }}` print nothing and complains on use. Here naming it is enough.
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__}")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        format_safely = super().wrap_str_format(value)
        if format_safely is None:
            return None
        text: str = value.__self__

        def guarded(*args: Any, **kwargs: Any) -> str:
            fields = 1
            for _, field, spec, _ in string.Formatter().parse(text):
                fields += field is not None
                if spec and re.search(r"\{|\d{4}", spec):
                    raise SecurityError(
                        f"it pads a text by format(), to more than {_MAX_WIDTH} characters or by a variable"
                    )
            self.budget.pay(len(text) + fields * self.budget.weight([args, kwargs])[0])
            return format_safely(*args, **kwargs)

        return guarded

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # jinja2's own spelling: a template may use any keyword, `self` too.
        budget = __self.budget
        budget.step()
        budget.pay_for(*args, *(value for name, value in kwargs.items() if name not in _JINJA_KEYWORDS))
        if isinstance(__obj, (BuiltinMethodType, MethodType)):
            args = __self._checked_method(__obj.__self__, __obj.__name__, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, (str, list, tuple, dict)):
            budget.pay_for(result)
        return result

    def _checked_method(self, text: Any, name: str, args: tuple[Any, ...], kwargs: Any) -> tuple[Any, ...]:
        """Pays for what a method of a text is about to make."""
        if not isinstance(text, str):
            return args
        number = next((each for each in args if isinstance(each, int)), 0)
        if name in ("center", "ljust", "rjust", "zfill"):
            self.budget.pay(max(number, 0))
        elif name == "expandtabs":
            tab = max((8, number, *(each for each in kwargs.values() if isinstance(each, int))))
            self.budget.pay(tab * text.count("\t"))
        elif name in ("split", "rsplit", "splitlines", "title"):
            self.budget.pay(_PARTS * len(text))
        elif name == "replace":
            self._check_replace(text, *args[:2])
        elif name == "join" and args:
            parts = list(args[0])
            self.budget.pay_for(parts)
            self.budget.pay(len(text) * len(parts))
            args = (parts, *args[1:])
        if name in _SQUARE and args and isinstance(args[0], str):
            self.budget.pay(len(text) * len(args[0]) // 64)
        return args

    def _check_replace(self, text: Any, old: Any = "", new: Any = "") -> None:
        if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
            self.budget.pay(len(text) + text.count(old) * len(new))

    # Filters and tests.

    def _guarded_test(self, function: Any) -> Callable[..., Any]:
        @functools.wraps(function)  # keeps jinja2's marks on it
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.budget.step()
            return function(*args, **kwargs)

        return guarded

    def _guarded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0  # a context or environment comes first
        check = getattr(self, f"_check_{name}_filter", None)

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.budget.step()
            if name == "join" and len(args) > skip and not hasattr(args[skip], "__len__"):
                args = (*args[:skip], list(args[skip]), *args[skip + 1 :])
            if check is not None:
                check(*args[skip:], **kwargs)
            result = function(*args, **kwargs)
            if isinstance(result, int) and result.bit_length() > _MAX_BITS:
                raise SecurityError(f"it computes with numbers of over {_MAX_BITS} bits")
            if isinstance(result, GeneratorType):
                # Still true as a whole and read once, but not to be stacked a million deep.
                result = iter(self._drained(result, name in _SELECTING))
            elif isinstance(result, (str, list, tuple, dict)):
                if name in _SELECTING:
                    self.budget.pay(len(result))
                else:
                    self.budget.pay_for(result)
            return result

        return guarded

    def _drained(self, values: Iterable[Any], selecting: bool) -> list[Any]:
        kept = []
        for value in values:
            self.budget.step()
            self.budget.pay_for(None if selecting else value)
            kept.append(value)
        return kept

    # What single filters are about to make. Each takes what its filter takes, without jinja2's context.

    def _check_center_filter(self, value: Any, width: Any = 80) -> None:
        self.budget.pay(max(width, 0))

    def _check_indent_filter(self, text: Any, width: Any = 4, *flags: Any, **more: Any) -> None:
        if isinstance(text, str):
            self.budget.pay(len(text.splitlines()) * (width if isinstance(width, int) else len(width)))

    def _check_format_filter(self, text: Any, *args: Any, **kwargs: Any) -> None:
        self._check_percent(str(text), [args, kwargs])

    def _check_replace_filter(self, text: Any, old: Any, new: Any, count: Any = None) -> None:
        self._check_replace(str(text), str(old), str(new))

    def _check_join_filter(self, values: Any, between: Any = "", attribute: Any = None) -> None:
        self.budget.pay(len(values) * len(str(between)))

    def _check_list_filter(self, value: Any) -> None:
        if isinstance(value, str):
            self.budget.pay(_PARTS * len(value))

    _check_title_filter = _check_wordcount_filter = _check_list_filter

    def _check_trim_filter(self, text: Any, characters: Any = None) -> None:
        if isinstance(text, str) and isinstance(characters, str):
            self.budget.pay(len(text) * len(characters) // 64)

    def _check_sum_filter(self, values: Any, attribute: Any = None, start: Any = 0) -> None:
        if not isinstance(start, (int, float)):
            raise SecurityError("it sums what are no numbers")

    def _check_batch_filter(self, values: Any, count: Any, fill: Any = None) -> None:
        if fill is not None:
            self.budget.pay(count * self.budget.weight(fill)[0])

    def _check_round_filter(self, value: Any, precision: Any = 0, method: Any = "common") -> None:
        if isinstance(precision, int) and abs(precision) > 100:
            raise SecurityError(f"it rounds to {precision} digits")

    def _check_tojson_filter(
        self,
        value: Any,
        ensure_ascii: Any = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: Any = False,
    ) -> None:
        weight, depth = self.budget.weight(value)
        width = 0 if indent is None else max(4, indent if isinstance(indent, int) else len(indent))
        between = sum(len(text) for text in separators or ())
        self.budget.pay(weight * (1 + width * depth + between))


# -------------------------------------------------------------------------------------- what templates expect


def _raise_exception(message: object) -> NoReturn:
    raise _Refused(str(message)[:500])


def _range(*bounds: int) -> range:
    # Between larger numbers there are 100,000 with the same hash, and one dict of them takes a minute.
    if any(abs(bound) > 2**31 for bound in bounds):
        raise SecurityError("it counts beyond 2,147,483,648")
    return safe_range(*bounds)


def _strftime_now(format: str) -> str:
    if len(format) > 200:
        raise SecurityError("it formats the time with over 200 characters")
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it: jinja2's own filter would write `<` as `\\u003c`."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Dict:
    """`dict(…)` and `dict.fromkeys(…)`, without the class behind them."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """`namespace(…)`, whose names do not begin with an underscore, and which prints nothing of its
    contents."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no `self`: it is a name like others
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(
            f"it keeps {name!r} in a namespace; names there must not begin with an underscore"
        )
