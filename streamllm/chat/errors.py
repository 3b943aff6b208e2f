"""The error of this package, and how a template refuses messages."""

from jinja2 import TemplateError


class ChatTemplateError(ValueError):
    """There is no chat template, or it is broken, refused the messages, or did something forbidden."""


class RefusedByTemplate(TemplateError):
    """The template called `raise_exception("…")`."""
