"""trim_heap(): memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """Return what was freed to the system, after what took much memory for once: loading, compiling.

    glibc keeps it where something is still in use above it. Other C libraries have no such call.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, TypeError, AttributeError):  # no glibc; on Windows no library without a name
        return
