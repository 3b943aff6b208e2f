"""Memory beside the heap, and memory of the heap that goes back to the system."""

from __future__ import annotations

import ctypes
import mmap
import os


def trim_heap() -> None:
    """Return what was freed to the system, after what took much memory for once: loading, compiling.

    glibc keeps it where something is still in use above it. Other C libraries have no such call.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, TypeError, AttributeError):  # no glibc; on Windows no library without a name
        return


def anonymous_memory(nbytes: int) -> mmap.mmap:
    """Zeros that are no part of the heap. The system gives a page when it is first written, and takes all back."""
    if os.name == "posix":
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, nbytes)
