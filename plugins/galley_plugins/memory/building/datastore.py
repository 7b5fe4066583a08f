"""The datastore of kNN-LM (arXiv 1911.00172): states of a corpus as keys, the tokens that follow as values.

MLP Memory (arXiv 2508.01832, section 3.1) takes the input of an MLP as the key. Of the held-out text the model's
own log-probability of each following token is kept too, which is all that a mix with another needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from galley_plugins.memory.building.tokens import HELD_OUT, TOKENS, TRAIN, entries_of, windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from galley_plugins.memory.building.stages import Stage
    from galley_plugins.memory.building.states import StateReader

KEYS, VALUES = "keys.f16", "values.i32"
HELD_KEYS, HELD_VALUES, HELD_LIKELIHOODS = "heldout_keys.f16", "heldout_values.i32", "heldout_logprobs.f32"
NOTED = 1 << 14  # entries between two notes of how far it is


def read_states(
    stage: Stage,
    tokens: Stage,
    reader: StateReader,
    context: int,
    advance: Callable[[int], None] = lambda entries: None,
) -> None:
    """Write keys and values of all entries of the stage `tokens`; an interrupted run goes on.

    Args:
        context: tokens that the model reads at once.
        advance: called with the entries read since the last call.

    Raises:
        StageError: the disk has no room.
    """
    progress = {"train": [0, 0], "heldout": [0, 0], **stage.begin()}
    ids = tokens.read(TOKENS, "int32")
    train, held = (tokens.read(name, "int64", 2) for name in (TRAIN, HELD_OUT))
    arrays = {
        name: stage.array(name, dtype, shape)
        for name, dtype, shape in (
            (KEYS, "float16", (entries_of(train), reader.width)),
            (VALUES, "int32", (entries_of(train),)),
            (HELD_KEYS, "float16", (entries_of(held), reader.width)),
            (HELD_VALUES, "int32", (entries_of(held),)),
            (HELD_LIKELIHOODS, "float32", (entries_of(held),)),
        )
    }
    for part, spans, names in (
        ("heldout", held, (HELD_KEYS, HELD_VALUES, HELD_LIKELIHOODS)),
        ("train", train, (KEYS, VALUES)),
    ):
        places = windows(spans, context)
        done, entry = progress[part]
        advance(entry)
        noted = entry
        for batch in _batches(places[done:], context * (16 if reader.device.type == "cuda" else 1)):
            found = _read(reader, ids, batch, likelihoods=part == "heldout")
            count = len(found[1])
            for name, rows in zip(names, found, strict=True):
                arrays[name][entry : entry + count] = rows
            entry += count
            done += len(batch)
            advance(count)
            if entry - noted >= NOTED:
                for name in names:
                    _flush(arrays[name])
                progress[part] = [done, entry]
                stage.note(progress)
                noted = entry
        progress[part] = [done, entry]
    for array in arrays.values():
        _flush(array)
    stage.finish({"layer": reader.layer, "width": reader.width, "entries": entries_of(train)})


def _batches(places: NDArray[np.int64], most: int) -> Iterator[NDArray[np.int64]]:
    """Neighbouring windows, padded to the longest no more than `most` tokens together."""
    first = 0
    while first < len(places):
        count, longest = 1, places[first, 1]
        while first + count < len(places):
            longest = max(longest, places[first + count, 1])
            if longest * (count + 1) > most:
                break
            count += 1
        yield places[first : first + count]
        first += count


def _read(
    reader: StateReader, ids: NDArray[np.int32], batch: NDArray[np.int64], *, likelihoods: bool
) -> list[NDArray[Any]]:
    """Keys [entries, width] float16, values [entries] int32, and log-probabilities [entries] if asked for."""
    longest = int(batch[:, 1].max())
    inputs = torch.zeros((len(batch), longest), dtype=torch.int64)
    following = torch.zeros_like(inputs)
    real = torch.arange(longest) < torch.from_numpy(batch[:, 1:].copy())
    for row, (begin, count) in enumerate(batch):
        text = torch.from_numpy(ids[begin : begin + count + 1].astype(np.int64))
        inputs[row, :count], following[row, :count] = text[:-1], text[1:]
    if likelihoods:
        states, values = reader.states_and_likelihoods(inputs, following)
        more = [values.cpu()[real].numpy()]
    else:
        states, more = reader.states(inputs), []
    largest = float(torch.finfo(torch.float16).max)
    keys = states[real.to(states.device)].float().clamp(-largest, largest).half().cpu().numpy()
    return [keys, following[real].to(torch.int32).numpy(), *more]


def _flush(array: NDArray[Any]) -> None:
    if isinstance(array, np.memmap):
        array.flush()
