"""Writes quantized checkpoints (`layout`), tensor by tensor.

Files are written beside the final folder, finished part by finished part, and renamed into it when all are
there: a run that was stopped goes on with the parts that it has.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from galley_plugins.quantization.layout import COMPRESSED_TENSORS, FORMAT_VERSION, METHOD, tensors_of
from galley_plugins.quantization.outliers import CostLevel
from galley_plugins.quantization.plan import SUFFIX, Plan, fused_name
from galley_plugins.quantization.quantizer import count_costs, quantize_together
from galley_plugins.quantization.source import INDEX, CheckpointError, Source, read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import torch

    from galley_plugins.quantization.options import QuantizationOptions
    from galley_plugins.quantization.sensitivity import Sensitivity

PART_BYTES = 256 * 2**20
"""A part of the output is written when it holds so much."""

STATE = "galley-quantize.json"
SKIPPED = {INDEX, "model.safetensors", "config.json"}  # of the source, which the output has its own of


@dataclass(frozen=True)
class Row:
    """What was made of one matrix."""

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    bits_per_weight: float
    outlier_share: float
    error: float  # Frobenius norm of the difference over the matrix's own

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


def quantize_checkpoint(
    source: Path,
    out: Path,
    plan: Plan,
    *,
    sensitivities: Mapping[str, Sensitivity] | None = None,
    advance: Callable[[str, int], None] | None = None,
) -> list[Row]:
    """Quantize the model in folder `source` into the new folder `out`; what was made of each matrix.

    Holds one matrix (or those that vLLM fuses) and one part of the output at a time.

    Args:
        sensitivities: of each module that the plan quantizes; None is not known.
        advance: told of each module that is done, and its weights.

    Raises:
        CheckpointError: the source is no model, or is quantized already.
        ValueError: a pattern of the plan matches nothing, or a matrix cannot be quantized so, by name.
        FileExistsError: there is something at `out`.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists, expected a new folder")
    with Source(source) as model:
        if "quantization_config" in model.config:
            raise CheckpointError(f"{source} is quantized already, expected full weights")
        chosen = _chosen(model, plan)
        partial = out.with_name(out.name + ".partial")
        parts = _Parts(partial, _fingerprint(model, plan, sensitivities))
        level = None if sensitivities is None else _level(model, chosen, sensitivities)
        rows = [Row(**{**row, "shape": tuple(row["shape"])}) for row in parts.rows]
        done = {row.name for row in rows}
        for together in _in_turn(model, chosen):
            modules = [name.removesuffix(SUFFIX) for name in together if name in chosen]
            if not modules:
                parts.add({name: model.tensor(name) for name in together if name not in parts.written}, [])
            elif modules[0] not in done:
                made, tensors = _quantized(model, modules, chosen, sensitivities, level)
                rows += made
                parts.add(tensors, made)
            for name in together:
                if advance is not None:
                    advance(name, _size(model.shape(name)))
        config = {**model.config, "quantization_config": _description(plan, rows, sensitivities)}
        parts.finish(config, source, out)
    return rows


def _chosen(model: Source, plan: Plan) -> dict[str, QuantizationOptions]:
    """Options by the name of a tensor to quantize."""
    matrices = [name for name in model.names if name.endswith(SUFFIX) and len(model.shape(name)) == 2]
    modules = {name: name.removesuffix(SUFFIX) for name in matrices}
    unused = plan.unused(modules.values())
    if unused:
        raise ValueError(f"{unused[0]}: matches none of the model's {len(modules)} matrices")
    found = {name: plan.options_of(module) for name, module in modules.items()}
    return {name: options for name, options in found.items() if options is not None}


def matrices_together(model: Source, plan: Plan) -> list[list[str]]:
    """Names of the tensors that the plan quantizes, those that vLLM fuses in one list.

    Raises:
        ValueError: a pattern of the plan matches nothing.
    """
    chosen = _chosen(model, plan)
    return [names for names in _in_turn(model, chosen) if names[0] in chosen]


def _in_turn(model: Source, chosen: dict[str, QuantizationOptions]) -> Iterator[list[str]]:
    """Names of tensors, those to be quantized together in one list."""
    together: dict[str, list[str]] = {}
    for name in model.names:
        if name in chosen:
            together.setdefault(fused_name(name.removesuffix(SUFFIX)), []).append(name)
    for name in model.names:
        if name not in chosen:
            yield [name]
        elif (group := together[fused_name(name.removesuffix(SUFFIX))])[0] == name:
            yield group


def _level(
    model: Source, chosen: dict[str, QuantizationOptions], sensitivities: Mapping[str, Sensitivity]
) -> float:
    """What rounding an outlier costs at the least, so that there are as many as without sensitivities."""
    level = CostLevel()
    for name, options in chosen.items():
        if options.keeps_outliers:
            with _named(name.removesuffix(SUFFIX)) as module:
                count_costs(level, model.tensor(name), options, sensitivities[module])
    return level.value()


def _quantized(
    model: Source,
    modules: list[str],
    chosen: dict[str, QuantizationOptions],
    sensitivities: Mapping[str, Sensitivity] | None,
    level: float | None,
) -> tuple[list[Row], dict[str, torch.Tensor]]:
    options = {chosen[module + SUFFIX] for module in modules}
    if len(options) > 1:
        raise ValueError(
            f"{', '.join(modules)}: found different options, expected the same, as vLLM fuses them"
        )
    weights = [model.tensor(module + SUFFIX) for module in modules]
    with _named(modules[0]):
        matrices = quantize_together(
            weights,
            options.pop(),
            sensitivities=None if sensitivities is None else [sensitivities[module] for module in modules],
            level=level,
        )
    rows, tensors = [], {}
    for module, original, matrix in zip(modules, weights, matrices, strict=True):
        whole = original.float()
        off = float((matrix.dequantize() - whole).norm() / whole.norm().clamp_min(1e-30))
        rows.append(
            Row(
                module,
                (whole.shape[0], whole.shape[1]),
                matrix.bits,
                matrix.group_size,
                matrix.bits_per_weight,
                matrix.outlier_share,
                off,
            )
        )
        tensors.update(tensors_of(module, matrix))
    return rows, tensors


@contextmanager
def _named(module: str) -> Iterator[str]:
    """Puts the module's name before what is wrong with its weights."""
    try:
        yield module
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from None


def _size(shape: Iterable[int]) -> int:
    size = 1
    for each in shape:
        size *= each
    return size


def _fingerprint(model: Source, plan: Plan, sensitivities: Mapping[str, Sensitivity] | None) -> str:
    """Changes with the plan, the source's files, what is known of them, and the format."""
    described: list[Any] = [FORMAT_VERSION, plan.to_values(), model.files()]
    found = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, each in sorted((sensitivities or {}).items()):
        found.update(name.encode() + each.inputs.numpy().tobytes() + each.outputs.numpy().tobytes())
    return found.hexdigest()


class _Parts:
    """The unfinished output: files of tensors, and a note of what they hold."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._state: dict[str, Any] = {"fingerprint": fingerprint, "parts": [], "rows": []}
        state = folder / STATE
        if state.is_file():
            try:
                before = read_json(state)
            except CheckpointError:
                before = {}
            if before.get("fingerprint") == fingerprint:
                self._state = before
            else:
                shutil.rmtree(folder)  # of another plan or source
        folder.mkdir(parents=True, exist_ok=True)
        self._tensors: dict[str, torch.Tensor] = {}
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._state["rows"]
        return rows

    @property
    def written(self) -> set[str]:
        return {name for part in self._state["parts"] for name in part["tensors"]}

    def add(self, tensors: dict[str, torch.Tensor], rows: list[Row]) -> None:
        self._tensors.update(tensors)
        self._rows += [values_of(row) for row in rows]
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._bytes >= PART_BYTES:
            self._write()

    def _write(self) -> None:
        if not self._tensors:
            return
        name = f"part-{len(self._state['parts']) + 1:05d}.safetensors"
        target = self._folder / name
        save_file(
            {key: value.contiguous() for key, value in self._tensors.items()},
            f"{target}.new",
            {"format": "pt"},
        )
        Path(f"{target}.new").replace(target)
        self._state["parts"].append({"file": name, "tensors": list(self._tensors), "bytes": self._bytes})
        self._state["rows"] += self._rows
        _write_json(self._folder / STATE, self._state)
        self._tensors, self._rows, self._bytes = {}, [], 0

    def finish(self, config: dict[str, Any], source: Path, out: Path) -> None:
        self._write()
        parts = self._state["parts"]
        index: dict[str, Any] = {"metadata": {"total_size": sum(part["bytes"] for part in parts)}}
        index["weight_map"] = {}
        for number, part in enumerate(parts, 1):
            name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            if (self._folder / part["file"]).exists():
                (self._folder / part["file"]).replace(self._folder / name)
            index["weight_map"] |= dict.fromkeys(part["tensors"], name)
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name not in SKIPPED and path.suffix not in {".safetensors", ".bin"}:
                shutil.copy2(path, self._folder / path.name)
        _write_json(self._folder / INDEX, index)
        _write_json(self._folder / "config.json", config)
        (self._folder / STATE).unlink()
        self._folder.replace(out)


def values_of(row: Row) -> dict[str, Any]:
    """As JSON."""
    return {
        "name": row.name,
        "shape": list(row.shape),
        "bits": row.bits,
        "group_size": row.group_size,
        "bits_per_weight": row.bits_per_weight,
        "outlier_share": row.outlier_share,
        "error": row.error,
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def _description(
    plan: Plan, rows: list[Row], sensitivities: Mapping[str, Sensitivity] | None
) -> dict[str, Any]:
    """`quantization_config`, with what made it under `galley`."""
    own = {
        "format_version": FORMAT_VERSION,
        "plan": plan.to_values(),
        "calibrated": sensitivities is not None,
        "matrices": {
            row.name: {
                "bits": row.bits,
                "group_size": row.group_size,
                "outlier_share": round(row.outlier_share, 6),
            }
            for row in rows
        },
    }
    if any(row.outlier_share for row in rows):
        return {"quant_method": METHOD, **own}
    groups: dict[tuple[int, int, int], list[str]] = {}
    for row in rows:
        groups.setdefault((row.bits, row.group_size, row.shape[1]), []).append(row.name)
    schemes: dict[str, Any] = {}
    for (bits, size, inputs), names in sorted(groups.items()):
        channel = size == inputs
        schemes[f"group_{len(schemes)}"] = {
            "targets": names,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "channel" if channel else "group",
                "group_size": None if channel else size,
                "dynamic": False,
            },
        }
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": schemes,
        "ignore": [],
        METHOD: own,
    }
