"""The error of this package."""


class TokenizerError(ValueError):
    """A tokenizer's file, or a text or id given to it, cannot be used. The message says what to do."""
