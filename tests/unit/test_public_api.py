"""Compares the public names, their signatures and the options of the command line with public_api.txt.

After an intended change of the public interface, `python -m tests.unit.test_public_api` writes the file again. The
commit message should describe the change.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import click

import streamllm
from streamllm.cache import rolling_cache
from streamllm.cli import cli
from streamllm.generation_config import SamplingSettings

# Members of SinkCache for models and compiled steps. They are not part of the public interface.
INTERNAL_MEMBERS = {
    "seen_counts",
    "plan",
    "commit",
    "finish_commit",
    "plan_token",
    "check_model",
    "commit_token",
    "token_kinds",
    "write_places",
    "starts",
    "has_gap",
    "sizes",
    "tensors",
}
LIST = Path(__file__).with_name("public_api.txt")


def public_api() -> list[str]:
    """One line for each public name: its signature; for each command: its options with types and defaults."""
    lines = []
    for name in sorted(streamllm.__all__):
        value = getattr(streamllm, name)
        if inspect.isclass(value) and issubclass(value, Exception):
            lines.append(f"streamllm.{name}: {', '.join(base.__name__ for base in value.__mro__[1:-1])}")
            continue
        lines.append(f"streamllm.{name}{_signature(value)}")
        if inspect.isclass(value):
            lines += [f"streamllm.{name}.{member}" for member in _members(value)]
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        lines.append(f"$ streamllm {name}")
        lines += [f"$ streamllm {name} {_option(parameter)}" for parameter in command.params]
    return lines


def _members(owner: type) -> list[str]:
    found = []
    members = {name: value for base in _own_bases(owner) for name, value in vars(base).items()}
    for name, value in sorted(members.items()):
        if name.startswith("_") or (owner is streamllm.SinkCache and name in INTERNAL_MEMBERS):
            continue
        if isinstance(value, property):
            found.append(f"{name} (property)")
        else:
            value = inspect.unwrap(getattr(owner, name))
            found.append(f"{name}{_signature(value)}" if callable(value) else name)
    return found


def _own_bases(owner: type) -> list[type]:
    """The class and those of its bases whose members belong to the public interface, the class last."""
    return [
        base for base in reversed(owner.__mro__) if base is owner or base.__module__ == rolling_cache.__name__
    ]


def _signature(value: object) -> str:
    """The signature, with SamplingSettings expanded to keyword arguments."""
    if not callable(value):
        return ""
    signature = inspect.signature(value)
    parameters = []
    for parameter in signature.parameters.values():
        if parameter.annotation == "Unpack[SamplingSettings]":
            parameters += [
                inspect.Parameter(
                    name, parameter.KEYWORD_ONLY, default=None, annotation=annotation.__forward_arg__
                )
                for name, annotation in SamplingSettings.__annotations__.items()
            ]
        else:
            parameters.append(parameter)
    # The order of keyword-only arguments does not matter to callers.
    parameters.sort(
        key=lambda parameter: (parameter.kind, parameter.kind == parameter.KEYWORD_ONLY and parameter.name)
    )
    return str(signature.replace(parameters=parameters))


def _option(parameter: click.Parameter) -> str:
    names = " ".join([*parameter.opts, *parameter.secondary_opts])
    default = parameter.default if isinstance(parameter.default, (str, int, float, bool)) else None
    multiple = " (several times)" if getattr(parameter, "multiple", False) or parameter.nargs == -1 else ""
    return f"{names}: {parameter.type.to_info_dict()['param_type']}{multiple} = {default}"


def test_the_public_interface_equals_the_list() -> None:
    assert public_api() == LIST.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    LIST.write_text("\n".join(public_api()) + "\n", encoding="utf-8")
