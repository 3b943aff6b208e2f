"""The rolling cache: attention sinks plus a window.

sink_cache.py  SinkCache, what users see and what a forward asks of it
plan.py        slots, places and visibility of new tokens: pure functions of token counts
rings.py       the keys and values of a layer in memory, plain or in int8
"""

from streamllm.cache.sink_cache import SinkCache

__all__ = ["SinkCache"]
