"""Quantized checkpoints: a model folder whose matrices are packed codes, scales, and weights kept apart.

A matrix `NAME.weight` becomes, as in compressed-tensors' `pack-quantized` format,

    NAME.weight_packed    int32 [output, input * bits / 32]
    NAME.weight_scale     bfloat16 [output, groups]
    NAME.weight_shape     int64 [2]

and, where weights are kept apart (EasyQuant),

    NAME.outlier_starts   int32 [output + 1]
    NAME.outlier_columns  int32 [weights]
    NAME.outlier_values   bfloat16 [weights]

`config.json` says how under `quantization_config`. Where no weights are kept apart, that is what
compressed-tensors writes and vLLM reads without Galley; else `quant_method` is `galley`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from galley_kernels import PackedMatrix, SparseRows, pack_codes
from galley_plugins.quantization.options import SERVED_AS
from galley_plugins.quantization.source import CheckpointError, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from galley_plugins.quantization.matrix import QuantizedMatrix

FORMAT_VERSION = 1
METHOD, COMPRESSED_TENSORS = SERVED_AS, "compressed-tensors"
PARTS = {
    "weight_packed": torch.int32,
    "weight_scale": torch.bfloat16,
    "weight_shape": torch.int64,
    "outlier_starts": torch.int32,
    "outlier_columns": torch.int32,
    "outlier_values": torch.bfloat16,
}


def packed(matrix: QuantizedMatrix) -> PackedMatrix:
    """A matrix as kernels read it."""
    apart = matrix.outliers
    rows = None
    if apart is not None:
        rows = SparseRows.of(apart.rows, apart.columns, apart.values, len(matrix.codes))
    return PackedMatrix(pack_codes(matrix.codes, matrix.bits), matrix.scales, matrix.bits, rows)


def tensors_of(name: str, matrix: QuantizedMatrix) -> dict[str, torch.Tensor]:
    """A matrix as a checkpoint holds it."""
    made = packed(matrix)
    tensors = {
        f"{name}.weight_packed": made.words,
        f"{name}.weight_scale": made.scales,
        f"{name}.weight_shape": torch.tensor(made.shape),
    }
    if made.outliers is not None:
        tensors[f"{name}.outlier_starts"] = made.outliers.starts
        tensors[f"{name}.outlier_columns"] = made.outliers.columns
        tensors[f"{name}.outlier_values"] = made.outliers.values
    return tensors


def matrix_of(name: str, bits: int | None, tensor: Callable[[str], torch.Tensor | None]) -> PackedMatrix:
    """A matrix out of a checkpoint.

    Args:
        bits: of a code; None is what the sizes say.
        tensor: gives a tensor by its name, None for one that is not there.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape or type, or not finite, by its name.
    """

    def need(part: str) -> torch.Tensor:
        dtype, found = PARTS[part], tensor(f"{name}.{part}")
        if found is None:
            raise CheckpointError(f"{name}.{part} is missing")
        if found.dtype != dtype:
            raise CheckpointError(f"{name}.{part}: found {found.dtype}, expected {dtype}")
        if found.is_floating_point() and not bool(torch.isfinite(found).all()):
            raise CheckpointError(f"{name}.{part}: found values that are not finite")
        return found

    words, scales = need("weight_packed"), need("weight_scale")
    shape = tuple(need("weight_shape").tolist())
    if bits is None:
        bits = 32 * words.shape[-1] // max(shape[-1], 1)
    apart = None
    if tensor(f"{name}.outlier_starts") is not None:
        starts, columns = need("outlier_starts"), need("outlier_columns")
        values = need("outlier_values")
        counts = starts.diff()
        if (
            starts.shape != (shape[0] + 1,)
            or columns.shape != values.shape
            or int(starts[0]) != 0
            or int(starts[-1]) != len(columns)
            or int(counts.min()) < 0
            or (len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < shape[1])
        ):
            raise CheckpointError(f"{name}.outlier_starts: found rows that do not fit a matrix {list(shape)}")
        apart = SparseRows(starts, columns, values, int(counts.max()))
    try:
        matrix = PackedMatrix(words, scales, bits, apart)
    except ValueError as error:
        raise CheckpointError(f"{name}.weight_packed: {error}") from None
    if matrix.shape != shape:
        raise CheckpointError(f"{name}.weight_packed: found {list(matrix.shape)}, expected {list(shape)}")
    return matrix


def own_description(described: Any, where: str) -> dict[str, Any]:
    """What Galley wrote into a `quantization_config`.

    Raises:
        CheckpointError: it did not write it, or a newer one did.
    """
    if not isinstance(described, dict):
        raise CheckpointError(f"{where}: found no quantization_config")
    own = described if described.get("quant_method") == METHOD else described.get(METHOD)
    if (
        not isinstance(own, dict)
        or not isinstance(own.get("format_version"), int)
        or not isinstance(own.get("matrices"), dict)
    ):
        raise CheckpointError(f"{where}: found a checkpoint that Galley did not quantize")
    if own["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: found format version {own['format_version']}, expected at most {FORMAT_VERSION}; "
            "a newer Galley wrote it"
        )
    return own


def read_quantized(folder: Path) -> Iterator[tuple[str, PackedMatrix | torch.Tensor]]:
    """A quantized checkpoint's matrices by module and other tensors by name, one after the other.

    Raises:
        CheckpointError: the folder is no such checkpoint, of a newer version, or damaged, by name.
    """
    with Source(folder) as model:
        own = own_description(model.config.get("quantization_config"), str(folder / "config.json"))
        names, matrices = set(model.names), own["matrices"]

        def tensor(name: str) -> torch.Tensor | None:
            return model.tensor(name) if name in names else None

        for module, how in matrices.items():
            yield module, matrix_of(module, how["bits"], tensor)
        for name in model.names:
            if name.rsplit(".", 1)[0] not in matrices:
                yield name, model.tensor(name)
