"""A memory on disk: a folder with `galley_memory.json` and `memory.safetensors`, whole or not there.

The settings say everything that serving needs: the layer that is read, the memory's share of the mix, sizes,
and hashes of the model, the tokenizer and the corpus. Tensors are those of `network.MemoryNetwork`, float32,
float16 or bfloat16, and `columns` int32 [outputs], the tokens that the output layer has rows for, where those
are not all. Without `lm_head.weight` the output layer is the model's own.

The authors' folders (`mlp_memory_config.json` beside `knn_generator/`) are read too.
"""

from __future__ import annotations

import hashlib
import json
import pickle  # for the name of its error alone
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from galley_plugins.memory.network import MemoryNetwork, Sizes
from galley_plugins.models.store import replacing
from galley_plugins.quantization.source import CheckpointError, Source

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from galley_plugins.memory.network import Family

SETTINGS, WEIGHTS = "galley_memory.json", "memory.safetensors"
MEMORY = "memory"  # the memory's folder in that of a build
RELEASED, GENERATOR = "mlp_memory_config.json", "knn_generator"
FORMAT = 1
HEAD = "lm_head.weight"
RELEASED_WEIGHT = 0.25  # section 4.1, language modelling; the authors' folders do not say
_OUTPUT_LAYERS = ("lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight", "wte.weight")


class MemoryFileError(ValueError):
    """A folder is not a memory, or not one of this model; the message says what was found and expected."""


@dataclass(frozen=True)
class Base:
    """The model that a memory belongs to.

    Attributes:
        hidden_size, layers, vocabulary: sizes of the model.
        model: hash of its norms, which quantization leaves as they are.
        tokenizer: hash of its vocabulary.
    """

    hidden_size: int
    layers: int
    vocabulary: int
    model: str
    tokenizer: str

    @classmethod
    def of(cls, folder: Path, tokenizer: Any = None) -> Base:
        """Of a model in a folder.

        Args:
            tokenizer: the folder's, if it is loaded already.

        Raises:
            CheckpointError: the folder has no safetensors files.
        """
        from transformers import AutoConfig

        from galley_plugins.speculation.store import tokenizer_hash

        config = AutoConfig.from_pretrained(folder).get_text_config()
        return cls(
            config.hidden_size,
            config.num_hidden_layers,
            config.vocab_size,
            model_hash(folder),
            tokenizer_hash(tokenizer if tokenizer is not None else folder),
        )


@dataclass(frozen=True)
class MemorySettings:
    """What a memory is.

    Attributes:
        sizes: of its network.
        layer: the decoder layer whose MLP's input it reads, from 0.
        weight: its share of the mixed distribution.
        base: the model that it was built for; None where a folder does not say (the authors').
        version: of Galley.
        corpus: what it was built from: hash, tokens.
        training: how it came to be, for people.
    """

    sizes: Sizes
    layer: int
    weight: float
    base: Base | None = None
    version: str = ""
    corpus: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def model_hash(folder: Path) -> str:
    """SHA-256 over the norms of a model: their names, sorted, and their values in float32.

    Norms tell models apart, and are the same in a model and its quantized forms.

    Raises:
        CheckpointError: the folder has no safetensors files, or no norms in them.
    """
    digest = hashlib.sha256()
    with Source(folder) as source:
        norms = sorted(name for name in source.names if name.endswith("norm.weight") or ".ln_" in name)
        if not norms:
            raise CheckpointError(f"{folder}: found no norm among its tensors, expected a decoder's")
        for name in norms:
            digest.update(name.encode())
            digest.update(source.tensor(name).float().numpy().tobytes())
    return digest.hexdigest()


def output_rows(folder: Path, columns: torch.Tensor | None) -> torch.Tensor:
    """float32 [outputs, hidden]: rows of a model's output layer, its input embeddings where those are tied.

    Raises:
        CheckpointError: the model keeps it elsewhere, or quantized.
    """
    with Source(folder) as source:
        name = next((name for name in _OUTPUT_LAYERS if name in source.names), None)
        if name is None:
            raise CheckpointError(f"{folder}: found none of {', '.join(_OUTPUT_LAYERS)}")
        other = next((other for other in source.names if other.startswith("lm_head.")), name)
        if name != HEAD and other != name:
            raise CheckpointError(f"{folder}: found {other}, expected {HEAD}")
        rows = source.tensor(name)
    return (rows if columns is None else rows[columns.long()]).float()


def save_memory(folder: Path, settings: MemorySettings, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a memory; one that lies there is replaced.

    Raises:
        MemoryFileError: the folder holds something else.
    """
    if folder.exists() and not (folder / SETTINGS).is_file() and any(folder.iterdir()):
        raise MemoryFileError(f"{folder}: found other files, expected a memory to replace, or nothing")
    with replacing(folder) as temporary:
        save_file(
            {name: row.detach().cpu().contiguous() for name, row in tensors.items()}, temporary / WEIGHTS
        )
        text = json.dumps({"format": FORMAT, **asdict(settings)}, indent=1)
        (temporary / SETTINGS).write_text(text + "\n", encoding="utf-8")


def memory_folder(path: Path) -> Path:
    """The memory's own folder, where `path` is that of a build."""
    return path / MEMORY if (path / MEMORY / SETTINGS).is_file() else path


def load_settings(folder: Path) -> MemorySettings:
    """
    Raises:
        MemoryFileError: the folder is no memory, or one of another version of the format.
    """
    if not (folder / SETTINGS).is_file() and (folder / RELEASED).is_file():
        return _released_settings(folder)
    values = _object(folder / SETTINGS)
    written = values.pop("format", None)
    if written != FORMAT:
        raise MemoryFileError(f"memory: {folder / SETTINGS}: found format {written}, expected {FORMAT}")
    try:
        base = values.pop("base")
        sizes = Sizes(**values.pop("sizes"))
        settings = MemorySettings(sizes=sizes, base=None if base is None else Base(**base), **values)
    except (KeyError, TypeError, ValueError) as error:
        expected = ", ".join(entry.name for entry in fields(MemorySettings))
        raise MemoryFileError(f"memory: {folder / SETTINGS}: {error}; expected {expected}") from None
    _check(folder / SETTINGS, settings)
    return settings


def check_base(folder: Path, base: Base) -> MemorySettings:
    """The settings of a memory that is to be mixed with this model.

    Raises:
        MemoryFileError: it was built for another model or tokenizer, with both hashes; or it is no memory.
    """
    settings = load_settings(folder)
    built = settings.base
    if built is None:
        if settings.sizes.inputs != base.hidden_size or settings.sizes.outputs != base.vocabulary:
            raise MemoryFileError(
                f"memory: {folder} reads states of {settings.sizes.inputs} and knows "
                f"{settings.sizes.outputs} tokens, the model here has {base.hidden_size} and "
                f"{base.vocabulary}"
            )
        settings = _counted_from_the_front(settings, base.layers)
    elif built != base:
        for name in ("tokenizer", "model"):
            if getattr(built, name) != getattr(base, name):
                raise MemoryFileError(
                    f"memory: {folder} was built for another {name}: found hash {getattr(built, name)}, the "
                    f"{name} here has {getattr(base, name)}"
                )
        raise MemoryFileError(f"memory: {folder} was built for {built}, the model here is {base}")
    if not 0 <= settings.layer < base.layers:
        raise MemoryFileError(
            f"memory: {folder}: layer: found {settings.layer}, expected 0 to {base.layers - 1}"
        )
    return settings


def load_network(
    folder: Path, settings: MemorySettings, model: Path | None = None
) -> tuple[MemoryNetwork, torch.Tensor | None]:
    """The network, float32, and its tokens: int64 [outputs], or None for all.

    Args:
        model: the folder of the model, whose output layer is read where the memory has none of its own.

    Raises:
        MemoryFileError: a tensor is missing, of another shape, or not finite, by name.
    """
    tensors = _tensors(folder)
    columns = tensors.pop("columns", None)
    outputs = settings.sizes.outputs
    vocabulary = settings.base.vocabulary if settings.base is not None else outputs
    if (columns is None and outputs != vocabulary) or (
        columns is not None and not _rise(columns, outputs, vocabulary)
    ):
        raise MemoryFileError(
            f"memory: {folder}: columns: found {'nothing' if columns is None else list(columns.shape)}, "
            f"expected {outputs} rising numbers from 0 to {vocabulary - 1}"
        )
    if columns is not None:
        columns = columns.long()
    if HEAD not in tensors:
        if model is None:
            raise MemoryFileError(f"memory: {folder} lacks {HEAD}, and no model was given that has one")
        tensors[HEAD] = output_rows(model, columns)
    with torch.device("meta"):
        network = MemoryNetwork(settings.sizes)
    for name, expected in network.state_dict().items():
        found = tensors.get(name)
        if found is None or found.shape != expected.shape:
            what = "nothing" if found is None else list(found.shape)
            raise MemoryFileError(f"memory: {folder}: {name}: found {what}, expected {list(expected.shape)}")
        if not bool(torch.isfinite(found).all()):
            raise MemoryFileError(f"memory: {folder}: {name}: found values that are no finite numbers")
    unknown = sorted(set(tensors) - set(network.state_dict()))
    if unknown:
        raise MemoryFileError(f"memory: {folder}: found tensors that it does not know: {', '.join(unknown)}")
    network.load_state_dict({name: row.float() for name, row in tensors.items()}, assign=True)
    return network.eval().requires_grad_(False), columns


def _rise(columns: torch.Tensor, outputs: int, vocabulary: int) -> bool:
    if columns.shape != (outputs,) or columns.is_floating_point():
        return False
    return bool((columns.diff() > 0).all()) and int(columns[0]) >= 0 and int(columns[-1]) < vocabulary


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    generator = folder / GENERATOR
    ours, safe = folder / WEIGHTS, generator / "model.safetensors"
    try:
        tensors: dict[str, torch.Tensor]
        if (folder / SETTINGS).is_file() or safe.is_file():
            tensors = load_file(ours if (folder / SETTINGS).is_file() else safe)
        else:
            # Pickled, as the authors save it: `weights_only` lets nothing but tensors through.
            path = generator / "pytorch_model.bin"
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(tensors, dict) or not all(
                isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
            ):
                raise ValueError("found other objects, expected tensors by name")
    except (OSError, EOFError, SafetensorError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise MemoryFileError(f"memory: the weights in {folder} cannot be read: {error}") from None
    return tensors


def _released_settings(folder: Path) -> MemorySettings:
    position = _object(folder / RELEASED).get("layer_position", -1)
    if not isinstance(position, int):
        raise MemoryFileError(
            f"memory: {folder / RELEASED}: layer_position: found {position!r}, expected a number"
        )
    config = _object(folder / GENERATOR / "config.json")
    try:
        if config.get("model_type") == "gpt2":
            width, epsilon = config["n_embd"], config.get("layer_norm_epsilon", 1e-5)
            inner, blocks = config.get("n_inner") or 4 * width, config["n_layer"]
        else:
            width, epsilon = config["hidden_size"], config.get("rms_norm_eps", 1e-6)
            inner, blocks = config["intermediate_size"], config["num_hidden_layers"]
        family: Family = "gpt2" if config.get("model_type") == "gpt2" else "llama"
        sizes = Sizes(family, width, width, inner, blocks, config["vocab_size"], epsilon)
        transform = _tensors(folder).get("embedding_transform.weight")
        if transform is not None:
            sizes = Sizes(**{**asdict(sizes), "inputs": transform.shape[1]})
    except (KeyError, TypeError, ValueError) as error:
        raise MemoryFileError(f"memory: {folder / GENERATOR / 'config.json'}: {error!r}") from None
    return MemorySettings(sizes, position, RELEASED_WEIGHT, version="released")


def _counted_from_the_front(settings: MemorySettings, layers: int) -> MemorySettings:
    layer = settings.layer if settings.layer >= 0 else layers + settings.layer
    return MemorySettings(settings.sizes, layer, settings.weight, version=settings.version)


def _check(path: Path, settings: MemorySettings) -> None:
    if not isinstance(settings.weight, int | float) or not 0 <= settings.weight <= 1:
        raise MemoryFileError(f"memory: {path}: weight: found {settings.weight!r}, expected 0 to 1")
    if not isinstance(settings.layer, int):
        raise MemoryFileError(f"memory: {path}: layer: found {settings.layer!r}, expected a number")


def _object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MemoryFileError(f"memory: {path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise MemoryFileError(f"memory: {path} is not JSON") from None
    if not isinstance(values, dict):
        raise MemoryFileError(f"memory: {path}: found {type(values).__name__}, expected an object")
    return values


def load_served(
    path: str | os.PathLike[str],
    model: Path,
    device: torch.device,
    dtype: torch.dtype,
    base: Base | None = None,
) -> tuple[MemorySettings, MemoryNetwork, torch.Tensor | None]:
    """A memory as it is served beside the model in the folder `model`.

    Args:
        base: of that model, if it is known already.

    Raises:
        MemoryFileError: it is not one of this model, or damaged.
    """
    folder = memory_folder(Path(path))
    settings = check_base(folder, base or Base.of(model))
    network, columns = load_network(folder, settings, model)
    return settings, network.to(device, dtype), None if columns is None else columns.to(device)
