"""What can be wrong with a checkpoint. A message says what was given, what is allowed, and the next step."""


class CheckpointError(Exception):
    """The checkpoint cannot be loaded; the kinds below say why, this one that its files are broken."""


class CheckpointNotFound(CheckpointError):
    """No such folder, repository, revision or file, no permission to read it, or no network to fetch it."""


class UnsupportedConfig(CheckpointError):
    """The files are whole, but say something that this library does not do."""
