"""vLLM loads Galley's quantized checkpoints: `quant_method: galley`, on a CPU its compressed-tensors too.

On a CPU whose compiled products are there (`galley_kernels.quantized.cpu_gemm`) weights stay packed.
Elsewhere, and under tensor parallelism or torch.compile, a layer keeps vLLM's own weight and its loader:
packed tensors become numbers and go through that loader as if the checkpoint had held them, so that shards
and fused maps are vLLM's affair.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import CompilationMode, get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.platforms import current_platform

from galley_kernels import PackedMatrix, SparseRows, w4a16_gemm, w8a16_gemm
from galley_kernels.quantized import cpu_gemm
from galley_plugins import vllm_compat
from galley_plugins.quantization.layout import (
    COMPRESSED_TENSORS,
    METHOD,
    PARTS,
    matrix_of,
    own_description,
)
from galley_plugins.quantization.source import CheckpointError

Shard = str | int | None
PRODUCTS = {4: w4a16_gemm, 8: w8a16_gemm}


def register() -> None:
    """Make the method known to vLLM in this process.

    Raises:
        IncompatibleVllmError: this vLLM has no such registry.
    """
    vllm_compat.check("quantization")
    register_quantization_config(METHOD)(GalleyQuantization)


class GalleyQuantization(QuantizationConfig):
    """What a checkpoint says of its matrices.

    Raises:
        CheckpointError: Galley did not write it, or a newer one did.
    """

    def __init__(self, matrices: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.matrices = matrices

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GalleyQuantization:
        return cls(dict(own_description(config, "config.json")["matrices"]))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """On a CPU, whose kernels for packed weights not every processor has."""
        compressed = hf_quant_cfg.get("quant_method") == COMPRESSED_TENSORS and METHOD in hf_quant_cfg
        return METHOD if compressed and current_platform.is_cpu() else None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.matrices = hf_to_vllm_mapper.apply_dict(self.matrices)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if not isinstance(layer, LinearBase):
            return None
        parent, _, last = prefix.rpartition(".")
        shards = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(last, [last])]
        packed = sum(shard in self.matrices for shard in shards)
        return PackedLinearMethod(prefix, packed, len(shards)) if packed else UnquantizedLinearMethod()


class PackedLinearMethod(UnquantizedLinearMethod):
    """Takes packed tensors for a layer's weight.

    Args:
        prefix: the layer's name, for errors.
        packed: how many of the maps that the layer fuses are packed.
        fused: how many it fuses.
    """

    def __init__(self, prefix: str, packed: int, fused: int) -> None:
        super().__init__()
        self._prefix = prefix
        self._packed = packed
        self._fused = fused
        self._eager = get_current_vllm_config().compilation_config.mode == CompilationMode.NONE
        self._matrix: PackedMatrix | None = None
        self._found: dict[Shard, dict[str, torch.Tensor]] = {}

    def create_weights(self, layer: torch.nn.Module, *args: Any, **named: Any) -> None:
        super().create_weights(layer, *args, **named)
        for part, dtype in PARTS.items():
            place = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            place.weight_loader = self._keeper(part)
            layer.register_parameter(part, place)

    def _keeper(self, part: str) -> Any:
        def keep(_: torch.nn.Parameter, loaded: torch.Tensor, shard: Shard = None) -> None:
            self._found.setdefault(shard, {})[part] = loaded.clone()

        return keep

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """
        Raises:
            CheckpointError: a tensor is missing or wrong, by name.
        """
        for part in PARTS:
            delattr(layer, part)
        if len(self._found) != self._packed:
            raise CheckpointError(
                f"{self._prefix}: found packed tensors of {len(self._found)} maps, expected {self._packed}"
            )
        shards: dict[Shard, PackedMatrix] = {}
        for shard, parts in self._found.items():
            name = self._prefix if shard is None else f"{self._prefix}[{shard}]"
            named = {f"{name}.{part}": tensor for part, tensor in parts.items()}
            shards[shard] = matrix_of(name, None, named.get)
        self._found.clear()
        if self._stays_packed(layer):
            self._matrix = _joined([shards[shard] for shard in sorted(shards, key=_place)])
        if self._matrix is not None:
            layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
            return
        for shard, matrix in shards.items():
            dense = matrix.dequantize().to(layer.weight.dtype)
            layer.weight.weight_loader(layer.weight, dense, *(() if shard is None else (shard,)))
        super().process_weights_after_loading(layer)

    def _stays_packed(self, layer: torch.nn.Module) -> bool:
        return (
            self._packed == self._fused
            and layer.tp_size == 1
            and self._eager
            and current_platform.is_cpu()
            and cpu_gemm.available()
        )

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self._matrix is None:
            return super().apply(layer, x, bias)
        out = PRODUCTS[self._matrix.bits](x, self._matrix, implementation="cpu")
        return out if bias is None else out + bias


def _place(shard: Shard) -> int:
    """Of a map among those that its layer fuses."""
    return {"q": 0, "k": 1, "v": 2, None: 0}[shard] if isinstance(shard, str | None) else shard


def _joined(matrices: list[PackedMatrix]) -> PackedMatrix | None:
    """One matrix of several, an output after the other; None where bits or group sizes differ."""
    first = matrices[0]
    if any((each.bits, each.group_size) != (first.bits, first.group_size) for each in matrices):
        return None
    if len(matrices) == 1:
        return first
    apart = [each.outliers for each in matrices]
    joined = None
    if any(apart):
        rows = [own or _nothing(each) for own, each in zip(apart, matrices, strict=True)]
        starts, at = [torch.zeros(1, dtype=torch.int32)], 0
        for each in rows:
            starts.append(each.starts[1:] + at)
            at += len(each.columns)
        joined = SparseRows(
            torch.cat(starts),
            torch.cat([each.columns for each in rows]),
            torch.cat([each.values for each in rows]),
            max(each.most for each in rows),
        )
    return PackedMatrix(
        torch.cat([each.words for each in matrices]),
        torch.cat([each.scales for each in matrices]),
        first.bits,
        joined,
    )


def _nothing(matrix: PackedMatrix) -> SparseRows:
    """No weights apart."""
    none = torch.empty(0, dtype=torch.int64)
    return SparseRows.of(none, none, torch.empty(0, dtype=torch.bfloat16), matrix.outputs)
