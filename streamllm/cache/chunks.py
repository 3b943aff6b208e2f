"""What the tokens of a chunk see, and where they go: one layer's ring. Pure functions, as `plan_token` of ring.py.

t counts the tokens of a row from 0; `seen` is the t of the first token of the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamllm.cache.ring import Layout, Move, Writes
from streamllm.models.step import Band, Step, is_visible


def plan_chunk(
    layout: Layout,
    origin: int,
    seen: int,
    start: int,
    length: int,
    device: torch.device,
    sinks_differ: bool = False,
) -> tuple[Step, Writes]:
    """T tokens, all rows in lockstep. They meet the sinks, the tokens held behind them in order, and each other.

    New sinks are written at once and hidden among the chunk's own keys. While nothing has left a text that began
    in this cache, the keys are the whole text in order, and each query sees all before it.
    sinks_differ: the ring stores sinks with other numbers than a chunk's own keys.

    S = 2, W = 3, 4 tokens after 7: the slots hold 0 1 5 6 4, of which the first query, 7, sees 0 1 and 5 6. So
    the keys are 0 1, then the run 5 6 7 8 9 10. Tokens 8 9 10 are written on commit.
    """
    sinks, window = layout.sinks, layout.window
    end = seen + length
    columns = min(sinks, end)
    held = max(0, min(seen - start, window - 1))  # tokens behind the sinks that the first query sees
    first = seen - held
    slot = layout.slot_of(max(first, sinks))
    ahead = min(held, layout.slots - slot)  # of them, those up to the end of the ring
    ranges = (0, columns), (slot, slot + ahead), (sinks, sinks + held - ahead)
    reads = tuple(part for part in ranges if part[0] < part[1])

    places = torch.arange(seen, end, device=device, dtype=torch.int64)[None]
    slots = layout.slot_of(places)
    whole = origin == 0 and end <= layout.slots and start == sinks
    apart = sinks > 0 and not whole
    band = Band(seen, first, columns, sinks, window)
    if whole and (seen >= sinks or (seen == 0 and not sinks_differ)):
        band = Band(seen, 0, 0, 0, layout.slots)
        if seen == 0:
            columns, reads = 0, ()
    run = torch.arange(origin + first, origin + end, device=device, dtype=torch.int64)
    step = Step(
        slots=slots,
        query_place=places + origin,
        sink_query_place=layout.sink_query_place(places, start),
        new_key_place=_key_place(layout, origin, places),
        key_place=torch.cat((torch.arange(columns, device=device, dtype=torch.int64), run))[None],
        visible=None,
        sinks=columns if apart else 0,
        rope_length=layout.slots,
        band=band,
    )
    tokens = torch.arange(length, device=device, dtype=torch.int64)
    new_sinks = max(0, min(sinks, end) - seen)
    kept = max(0, sinks - seen, length - window)  # earlier tokens are sinks, or gone before the chunk ends
    free = layout.slot_of(seen + kept)
    to_end = min(
        length - kept, layout.slots - free
    )  # of the tokens that stay, those up to the end of the ring
    moved = (kept, free, to_end), (kept + to_end, sinks, length - kept - to_end)
    return step, Writes(
        reads=reads,
        now=Move(None, tokens[:new_sinks], slots[0, :new_sinks], True, False) if new_sinks else None,
        on_commit=Move(None, tokens[kept:] if kept else None, slots[0, kept:], False, True, moved),
    )


def plan_ragged_chunk(
    layout: Layout,
    origin: int,
    seen: Sequence[int],
    starts: Sequence[int],
    counts: Sequence[int],
    length: int,
    device: torch.device,
) -> tuple[Step, Writes]:
    """T tokens per row, of which `counts` are real. They meet the slots in their order, and behind them each other.

    S = 2, W = 3, 4 tokens on an empty row: 2 slots are read, so the keys are the slots 0 1 and the tokens
    0 1 2 3. Tokens 0 and 1 are written first and hidden behind: token 3 sees keys at the places 0 1 - - 2 3.
    """
    sinks, window = layout.sinks, layout.window
    first, start = (
        torch.tensor(given, dtype=torch.int64, device="cpu")[:, None] for given in (seen, starts)
    )  # [R, 1]
    end = first + torch.tensor(counts, dtype=torch.int64, device="cpu")[:, None]
    reads = max(min(max(seen), layout.slots), min(int(end.max()), sinks))
    column = torch.arange(length, dtype=torch.int64, device="cpu")
    places = first + column  # [R, T]
    real = column < end - first
    is_sink = places < sinks
    slots = layout.slot_of(places)
    slot = torch.arange(reads, dtype=torch.int64, device="cpu")
    # A slot holds what it held before the chunk, or a sink that the chunk brings.
    held = torch.where((slot < sinks) & (slot < end), slot, layout.token_in(slot, first))
    held = torch.where((slot < sinks) | (held >= start), held, -1)
    keys = torch.cat((held, torch.where(real & is_sink, -1, places)), 1)  # [R, reads + T]
    apart = sinks > 0 and (origin > 0 or int(places.max()) >= layout.slots or max(starts) > sinks)
    columns = min(sinks, reads) if apart else 0
    shifted = torch.arange(keys.shape[1], dtype=torch.int64, device="cpu") >= columns
    step = Step(
        slots=slots.to(device),
        query_place=(places + origin).to(device),
        sink_query_place=layout.sink_query_place(places, start).to(device),
        new_key_place=_key_place(layout, origin, places).to(device),
        key_place=torch.where(shifted, keys + origin, keys).to(device),
        visible=is_visible(keys[:, None, :], places[:, :, None], sinks, window).to(device),
        sinks=columns,
        rope_length=layout.slots,
    )
    recent = real & ~is_sink & (places >= end - window)
    new_sinks = real & is_sink
    return step, Writes(
        reads=((0, reads),),
        now=_move(new_sinks, slots, device, to_sinks=True) if bool(new_sinks.any()) else None,
        on_commit=_move(recent, slots, device, to_sinks=False),
    )


def _key_place(layout: Layout, origin: int, t: Tensor) -> Tensor:
    """The place where the key of token t is rotated, once."""
    return torch.where(t < layout.sinks, t, t + origin) if origin else t


def _move(chosen: Tensor, slots: Tensor, device: torch.device, to_sinks: bool) -> Move:
    """The chosen [R, T] tokens and their slots."""
    rows, tokens = chosen.nonzero(as_tuple=True)
    taken = slots[rows, tokens].to(device)
    return Move(rows.to(device), tokens.to(device), taken, to_sinks, not to_sinks)
