"""A GGUF file's metadata, read with errors that name the key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import gguf

from galley_plugins.models.errors import ConversionError

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")


class GgufFile:
    """Metadata by key and tensors by name; the tensors stay on disk until they are read.

    Raises ConversionError if the file is not GGUF.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError) as error:
            raise ConversionError(f"{path} is not a readable GGUF file: {error}") from error
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in self._reader.tensors}

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of `key`, or `default`; raises ConversionError if there is neither or it is no `kind`."""
        field = self._reader.get_field(key)
        value = default if field is None else field.contents()
        if kind is float and isinstance(value, float):
            value = _shortest(value)
        if not isinstance(value, kind):
            raise ConversionError(f"{self.path}: {key} is {value!r}, expected {kind.__name__}")
        return value


def _shortest(value: float) -> float:
    """The shortest decimal that gives the same float32: 1e-05 instead of 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))
