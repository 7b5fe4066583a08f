"""The mix on a CPU by compiled code (mix.cpp), where there is a compiler to build it."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from galley_kernels import compiler


def available() -> bool:
    """Whether the code is there; builds it the first time."""
    return _library() is not None


@functools.cache
def _library() -> Any:
    folder = Path(__file__).parent
    found = compiler.load(folder / "mix.cpp", folder.parent / "lanes.h")
    if found is not None:
        found.galley_mix.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 5 + [ctypes.c_int]
        found.galley_mix.restype = None
    return found


def mix(
    logits: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor | None
) -> torch.Tensor:
    """float32 [rows, vocabulary]."""
    (rows, vocabulary), count = logits.shape, other.shape[1]
    out = torch.empty(rows, vocabulary)
    if not out.numel():
        return out
    logits, other, weight = _dense(logits), _dense(other), weight.float().contiguous()
    places = None if columns is None else columns.contiguous()
    pointers = (
        logits.data_ptr(),
        other.data_ptr(),
        weight.data_ptr(),
        places.data_ptr() if places is not None else None,
    )
    sizes = (rows, vocabulary, count, logits.stride(0), other.stride(0))
    _library().galley_mix(*pointers, out.data_ptr(), *sizes, torch.get_num_threads())
    return out


def _dense(logits: torch.Tensor) -> torch.Tensor:
    wide = logits.float()
    return wide if wide.stride(1) == 1 else wide.contiguous()
