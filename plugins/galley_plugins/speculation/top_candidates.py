"""The most probable tokens of every row of logits, in one pass over them (runner V1, CPU).

Floats are compared as integers: the bits of a float, all but the sign flipped where it is negative, order as
the floats do. Such comparisons vectorise, for bfloat16 too, which numba has no type for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import njit

from galley_plugins.speculation.drafting import TOP

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK = 64
_LEAST = -(2**31)


def top_candidates(logits: torch.Tensor) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The exact top 8 of each row and about how probable they are.

    They lie in the 8 blocks of 64 with the largest maxima. The softmax is taken over these blocks alone,
    which leaves out the mass of everything far from the top.

    Args:
        logits: [rows, vocabulary] on the CPU, any float dtype, without NaN.

    Returns:
        tokens: int32 [rows, 8], best first, the smaller id among equals, -1 beyond a vocabulary of fewer;
        probabilities: float32 [rows, 8].
    """
    bits = _bits_of(logits)
    tokens, probabilities = _top_of_32(bits) if bits.itemsize == 4 else _top_of_16(bits)
    return tokens, probabilities


def best_tokens(logits: torch.Tensor) -> NDArray[np.int32]:
    """The token of each row's largest logit, the smallest id among equals. int32 [rows]

    Args:
        logits: as `top_candidates` takes them.
    """
    bits = _bits_of(logits)
    best: NDArray[np.int32] = _best_of_32(bits) if bits.itemsize == 4 else _best_of_16(bits)
    return best


def _bits_of(logits: torch.Tensor) -> NDArray[Any]:
    """The same floats as integers of their width, 32 bits or bfloat16's 16."""
    if logits.dtype not in (torch.float32, torch.bfloat16):
        logits = logits.float()
    integers = torch.int32 if logits.dtype == torch.float32 else torch.int16
    bits: NDArray[Any] = logits.contiguous().view(integers).numpy()
    return bits


# Two functions, since one for both types would widen every integer to 64 bits and vectorise badly; and whole
# blocks apart from the last one's rest, since loops of a known length take 0.4 of the time.
@njit(cache=True)
def _peaks_of_32(bits: NDArray[np.int32], peaks: NDArray[np.int32]) -> None:
    rows, width = bits.shape
    for row in range(rows):
        for block in range(peaks.shape[1]):
            best = np.int32(_LEAST)
            start = block * _BLOCK
            if start + _BLOCK <= width:
                for place in range(_BLOCK):
                    raw = bits[row, start + place]
                    best = max(best, np.int32(raw ^ (np.int32(raw >> np.int32(31)) & np.int32(0x7FFFFFFF))))
            else:
                for place in range(start, width):
                    raw = bits[row, place]
                    best = max(best, np.int32(raw ^ (np.int32(raw >> np.int32(31)) & np.int32(0x7FFFFFFF))))
            peaks[row, block] = best


@njit(cache=True)
def _peaks_of_16(bits: NDArray[np.int16], peaks: NDArray[np.int32]) -> None:
    rows, width = bits.shape
    for row in range(rows):
        for block in range(peaks.shape[1]):
            best = np.int16(-32768)
            start = block * _BLOCK
            if start + _BLOCK <= width:
                for place in range(_BLOCK):
                    raw = bits[row, start + place]
                    best = max(best, np.int16(raw ^ (np.int16(raw >> np.int16(15)) & np.int16(0x7FFF))))
            else:
                for place in range(start, width):
                    raw = bits[row, place]
                    best = max(best, np.int16(raw ^ (np.int16(raw >> np.int16(15)) & np.int16(0x7FFF))))
            peaks[row, block] = best


@njit(cache=True)
def _new_peaks(bits: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
    rows, width = bits.shape
    return np.empty((rows, (width + _BLOCK - 1) // _BLOCK), np.int32)


@njit(cache=True)
def _top_of_32(bits: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    peaks = _new_peaks(bits)
    _peaks_of_32(bits, peaks)
    return _choose(bits, 0, peaks)


@njit(cache=True)
def _top_of_16(bits: NDArray[np.int16]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    peaks = _new_peaks(bits)
    _peaks_of_16(bits, peaks)
    return _choose(bits, 16, peaks)


@njit(cache=True)
def _best_of_32(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    peaks = _new_peaks(bits)
    _peaks_of_32(bits, peaks)
    return _first_peak(bits, np.int32(0x7FFFFFFF), peaks)


@njit(cache=True)
def _best_of_16(bits: NDArray[np.int16]) -> NDArray[np.int32]:
    peaks = _new_peaks(bits)
    _peaks_of_16(bits, peaks)
    return _first_peak(bits, np.int32(0x7FFF), peaks)


@njit(cache=True)
def _first_peak(
    bits: NDArray[np.integer[Any]], magnitude: int, peaks: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Where each row's largest value is first; `magnitude` has all bits of a value but the sign."""
    best = np.empty(len(peaks), np.int32)
    for row in range(len(peaks)):
        block = 0
        for other in range(1, peaks.shape[1]):
            if peaks[row, other] > peaks[row, block]:
                block = other
        token = block * _BLOCK
        while True:
            raw = np.int32(bits[row, token])
            if (raw ^ ((raw >> 31) & magnitude)) == peaks[row, block]:
                break
            token += 1
        best[row] = token
    return best


@njit(cache=True)
def _choose(
    bits: NDArray[np.int32],
    shift: int,
    peaks: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The top of each row from its blocks with the largest peaks; `bits` << `shift` are float32's bits."""
    rows, width = bits.shape
    tokens = np.full((rows, TOP), -1, np.int32)
    probabilities = np.zeros((rows, TOP), np.float32)
    blocks = peaks.shape[1]
    near = np.empty(TOP * _BLOCK, np.int32)
    values = near.view(np.float32)
    ids = np.empty(TOP * _BLOCK, np.int32)
    chosen = np.empty(TOP, np.int32)
    for row in range(rows):
        count = 0
        for block in range(blocks):
            peak = peaks[row, block]
            if count == TOP and peak <= peaks[row, chosen[TOP - 1]]:
                continue
            place = count if count < TOP else TOP - 1
            while place > 0 and peaks[row, chosen[place - 1]] < peak:
                chosen[place] = chosen[place - 1]
                place -= 1
            chosen[place] = block
            count = min(count + 1, TOP)
        chosen[:count].sort()  # so that of equals the smaller id comes first
        size = 0
        for index in range(count):
            start = chosen[index] * _BLOCK
            for token in range(start, min(start + _BLOCK, width)):
                near[size] = np.int32(bits[row, token]) << shift
                ids[size] = token
                size += 1
        found = 0
        for index in range(size):
            value = values[index]
            if found == TOP and value <= probabilities[row, TOP - 1]:
                continue
            place = found if found < TOP else TOP - 1
            while place > 0 and probabilities[row, place - 1] < value:
                probabilities[row, place] = probabilities[row, place - 1]
                tokens[row, place] = tokens[row, place - 1]
                place -= 1
            probabilities[row, place] = value
            tokens[row, place] = ids[index]
            found = min(found + 1, TOP)
        largest = probabilities[row, 0]
        if not np.isfinite(largest):  # every logit is masked, or one is infinite: the first takes it all
            probabilities[row, 0] = 1.0
            probabilities[row, 1:] = 0.0
            continue
        mass = np.float32(0.0)
        for index in range(size):
            mass += np.exp(values[index] - largest)
        for place in range(found):
            probabilities[row, place] = np.exp(probabilities[row, place] - largest) / mass
    return tokens, probabilities
