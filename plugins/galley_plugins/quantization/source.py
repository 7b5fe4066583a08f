"""The safetensors files of a model folder, read tensor by tensor."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from pathlib import Path

    import torch

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class CheckpointError(ValueError):
    """A folder is not the checkpoint it should be; the message names the file or tensor."""


class Source:
    """Opens a model folder; a context manager.

    Raises:
        CheckpointError: the folder has no safetensors files, or not those that its index names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "config.json")
        index = folder / INDEX
        if index.is_file():
            files = read_json(index).get("weight_map", {})
        elif (folder / SINGLE).is_file():
            files = {}
        else:
            raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}, expected safetensors files")
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        try:
            for name in sorted(set(files.values()) or {SINGLE}):
                self._files[name] = self._stack.enter_context(safe_open(folder / name, framework="pt"))
            self._place = files or dict.fromkeys(self._files[SINGLE].keys(), SINGLE)
            for name, file in self._files.items():
                missing = {tensor for tensor, at in self._place.items() if at == name} - set(file.keys())
                if missing:
                    raise CheckpointError(f"{folder / name} lacks {min(missing)}, which the index names")
        except (OSError, SafetensorError) as error:
            self._stack.close()
            raise CheckpointError(f"{folder}: {error}") from error
        except CheckpointError:
            self._stack.close()
            raise

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """Of all tensors, file by file in the files' order."""
        return list(self._place)

    def files(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of what the model is read from: another model has others."""
        return sorted(
            (path.name, path.stat().st_size, path.stat().st_mtime_ns)
            for path in self.folder.iterdir()
            if path.suffix in {".safetensors", ".json"}
        )

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self._place[name]].get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        return self._files[self._place[name]].get_tensor(name)


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: the file is not there, or no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: found {type(found).__name__}, expected an object")
    return found
