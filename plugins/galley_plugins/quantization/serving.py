"""vLLM loads Galley's quantized checkpoints: `quant_method: galley`, on a CPU its compressed-tensors too.

Plain checkpoints are quantized while they are loaded, where the options say how.

On a CPU whose compiled products are there (`galley_kernels.quantized.cpu_gemm`) weights stay packed.
Elsewhere, and under tensor parallelism or torch.compile, a layer keeps vLLM's own weight and its loader:
packed tensors become numbers and go through that loader as if the checkpoint had held them, so that shards
and fused maps are vLLM's affair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CompilationMode, get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.platforms import current_platform

from galley_kernels import PackedMatrix, SparseRows, compiled, pack_codes, w4a16_gemm, w8a16_gemm
from galley_kernels.compiled import IntegerLinear, InterleavedMatrix
from galley_kernels.quantized import cpu_gemm
from galley_plugins import vllm_compat
from galley_plugins.options import PluginOptions
from galley_plugins.quantization.grouping import absmax_scales
from galley_plugins.quantization.layout import (
    COMPRESSED_TENSORS,
    METHOD,
    PARTS,
    matrix_of,
    own_description,
    packed,
)
from galley_plugins.quantization.matrix import encode
from galley_plugins.quantization.source import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from galley_plugins.quantization.options import QuantizationOptions
    from galley_plugins.quantization.plan import Plan

Shard = str | int | None
PRODUCTS = {4: w4a16_gemm, 8: w8a16_gemm}
INTEGER_TYPES = (torch.float32, torch.bfloat16)
OUTPUT_GROUP, OUTPUT_ROWS = (
    64,
    8192,
)  # of 8-bit weights of the output layer: inputs a scale, rows made at once


def register() -> None:
    """Make the method known to vLLM in this process.

    Raises:
        IncompatibleVllmError: this vLLM has no such registry.
    """
    vllm_compat.check("quantization")
    register_quantization_config(METHOD)(GalleyQuantization)


class GalleyQuantization(QuantizationConfig):
    """What a checkpoint says of its matrices, or what becomes of those of a plain one while it is loaded.

    Args:
        matrices: by module, what the checkpoint says; None for a plain one.

    Raises:
        CheckpointError: Galley did not write it, or a newer one did.
    """

    def __init__(self, matrices: dict[str, dict[str, Any]] | None = None) -> None:
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
        if self.matrices is not None:
            self.matrices = hf_to_vllm_mapper.apply_dict(self.matrices)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        here = _Here.now()
        if isinstance(layer, ParallelLMHead):
            return OutputLayerMethod(prefix, here, packed=prefix in (self.matrices or {}))
        if not isinstance(layer, LinearBase):
            return None
        parent, _, last = prefix.rpartition(".")
        shards = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(last, [last])]
        plan = PluginOptions.from_vllm_config(get_current_vllm_config()).quantization.plan()
        if self.matrices is None:
            return self._while_loading(plan, prefix, shards, here)
        if plan is not None:
            raise ValueError(
                f"quantization: found the method {plan.default.method} for a checkpoint that is quantized "
                "already, expected none"
            )
        packed = sum(shard in self.matrices for shard in shards)
        return PackedLinearMethod(prefix, here, packed, len(shards)) if packed else UnquantizedLinearMethod()

    def _while_loading(self, plan: Plan | None, prefix: str, shards: list[str], here: _Here) -> Any:
        if plan is None:
            raise ValueError(
                "quantization: found galley for a plain checkpoint, expected a method to quantize by"
            )
        chosen = {plan.options_of(shard) for shard in shards}
        if len(chosen) > 1:
            raise ValueError(
                f"{', '.join(shards)}: found different options, expected the same, as vLLM fuses them"
            )
        options = chosen.pop()
        return (
            OnlineLinearMethod(prefix, here, options, len(shards)) if options else UnquantizedLinearMethod()
        )


@dataclass(frozen=True)
class _Here:
    """What this engine computes with.

    Attributes:
        packed: packed weights, by compiled code.
        integers: and activations as integers.
        rounds_output: the output layer's weights are rounded to 8 bits.
    """

    packed: bool
    integers: bool
    rounds_output: bool

    @classmethod
    def now(cls) -> _Here:
        config = get_current_vllm_config()
        options = PluginOptions.from_vllm_config(config).quantization
        eager = config.compilation_config.mode == CompilationMode.NONE
        packed = eager and current_platform.is_cpu() and cpu_gemm.available()
        integers = (
            packed
            and options.activations == "integer"
            and config.model_config.dtype in INTEGER_TYPES
            and compiled.available()
        )
        return cls(packed, integers, integers and options.output_bits == 8)


class _ShardedMethod(UnquantizedLinearMethod):
    """A layer whose maps, one or several that it fuses, are packed matrices once they are loaded.

    Args:
        prefix: the layer's name, for errors.
        fused: how many maps it fuses.

    Attributes:
        integer: how the layer computes, where activations are integers.
    """

    def __init__(self, prefix: str, here: _Here, fused: int) -> None:
        super().__init__()
        self._prefix = prefix
        self._here = here
        self._fused = fused
        self._matrix: PackedMatrix | None = None
        self.integer: IntegerLinear | None = None

    def _keep(self, layer: torch.nn.Module, shards: dict[Shard, PackedMatrix]) -> bool:
        """Let the layer compute with these, if it can; else it needs them as numbers."""
        if not (self._here.packed and layer.tp_size == 1 and (None in shards or len(shards) == self._fused)):
            return False
        matrices = [shards[shard] for shard in sorted(shards, key=_place)]
        if self._here.integers and all(InterleavedMatrix.suits(matrix) for matrix in matrices):
            self.integer = IntegerLinear(matrices)
        else:
            self._matrix = _joined(matrices)
        if self.integer is None and self._matrix is None:
            return False
        layer.weight.data = torch.empty(0, dtype=layer.weight.dtype)
        return True

    @property
    def _kept(self) -> bool:
        return self.integer is not None or self._matrix is not None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if not self._kept:
            super().process_weights_after_loading(layer)
        elif self.integer is not None and layer.bias is not None and not layer.skip_bias_add:
            self.integer.add_bias(layer.bias)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.integer is not None:
            return self.integer(x)
        if self._matrix is None:
            return super().apply(layer, x, bias)
        out = PRODUCTS[self._matrix.bits](x, self._matrix, implementation="cpu")
        return out if bias is None else out + bias


class PackedLinearMethod(_ShardedMethod):
    """Takes packed tensors for a layer's weight.

    Args:
        packed: how many of the maps that the layer fuses are packed.
    """

    def __init__(self, prefix: str, here: _Here, packed: int, fused: int) -> None:
        super().__init__(prefix, here, fused)
        self._packed = packed
        self._found: dict[Shard, dict[str, torch.Tensor]] = {}

    def create_weights(self, layer: torch.nn.Module, *args: Any, **named: Any) -> None:
        super().create_weights(layer, *args, **named)
        _take_parts(
            layer, lambda part, loaded, shard: self._found.setdefault(shard, {}).update({part: loaded})
        )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """
        Raises:
            CheckpointError: a tensor is missing or wrong, by name.
        """
        _drop_parts(layer)
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
        if not self._keep(layer, shards):
            for shard, matrix in shards.items():
                dense = matrix.dequantize().to(layer.weight.dtype)
                layer.weight.weight_loader(layer.weight, dense, *(() if shard is None else (shard,)))
        super().process_weights_after_loading(layer)


class OnlineLinearMethod(_ShardedMethod):
    """Quantizes a plain checkpoint's matrices as they come, whole ones, however vLLM shards them then.

    A layer's weights are numbers only until the last of the maps that it fuses has come.
    """

    def __init__(self, prefix: str, here: _Here, options: QuantizationOptions, fused: int) -> None:
        super().__init__(prefix, here, fused)
        self._options = options
        self._found: dict[Shard, torch.Tensor] = {}

    def create_weights(self, layer: torch.nn.Module, *args: Any, **named: Any) -> None:
        super().create_weights(layer, *args, **named)
        weight, into = layer.weight, layer.weight.weight_loader

        def load(_: torch.nn.Parameter, loaded: torch.Tensor, shard: Shard = None) -> None:
            self._found[shard] = loaded
            if shard is None or len(self._found) == self._fused:
                self._quantize(layer, into)

        weight.weight_loader = load

    def _quantize(self, layer: torch.nn.Module, into: Any) -> None:
        """
        Raises:
            ValueError: the matrices cannot be quantized so, by the layer's name.
        """
        from galley_plugins.quantization.quantizer import (
            quantize_together,
        )  # compiles, so not everyone needs it

        try:
            quantized = quantize_together(list(self._found.values()), self._options)
        except ValueError as error:
            raise ValueError(f"{self._prefix}: {error}") from None
        shards = {shard: packed(matrix) for shard, matrix in zip(self._found, quantized, strict=True)}
        self._found.clear()
        if self._keep(layer, shards):
            return
        for shard, matrix in shards.items():
            dense = matrix.dequantize().to(layer.weight.dtype)
            into(layer.weight, dense, *(() if shard is None else (shard,)))


class OutputLayerMethod(UnquantizedEmbeddingMethod):
    """The largest matrix of most small models: 8-bit weights on a CPU. Tied embeddings stay as they are.

    Args:
        prefix: the layer's name, for errors.
        packed: the checkpoint has it packed.
    """

    def __init__(self, prefix: str, here: _Here, *, packed: bool) -> None:
        self._prefix = prefix
        self._here = here
        self._packed = packed
        self._tied = False
        self._found: dict[str, torch.Tensor] = {}
        self.integer: IntegerLinear | None = None

    def create_weights(self, layer: torch.nn.Module, *args: Any, **named: Any) -> None:
        super().create_weights(layer, *args, **named)
        if self._packed:
            _take_parts(layer, lambda part, loaded, _: self._found.update({part: loaded}))

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: Any) -> Any:
        self._tied = True
        return super().tie_weights(layer, embed_tokens)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """
        Raises:
            CheckpointError: a tensor is missing or wrong, by name.
        """
        matrices: list[PackedMatrix] = []
        if self._packed:
            _drop_parts(layer)
            named = {f"{self._prefix}.{part}": tensor for part, tensor in self._found.items()}
            matrices = [matrix_of(self._prefix, None, named.get)]
            self._found.clear()
        elif self._here.rounds_output and layer.tp_size == 1 and layer.weight.shape[1] % OUTPUT_GROUP == 0:
            matrices = [_eight_bits(some) for some in layer.weight.data.split(OUTPUT_ROWS)]
        suited = bool(matrices) and all(InterleavedMatrix.suits(matrix) for matrix in matrices)
        if suited and self._here.integers and layer.tp_size == 1:
            self.integer = IntegerLinear(matrices)
            if not self._tied:
                layer.weight = torch.nn.Parameter(
                    torch.empty(0, dtype=layer.weight.dtype), requires_grad=False
                )
            return
        if self._packed:
            layer.weight.weight_loader(layer.weight, matrices[0].dequantize().to(layer.weight.dtype))
        super().process_weights_after_loading(layer)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.integer is None:
            return super().apply(layer, x, bias)
        # In bfloat16 a small model's best tokens tie, and whoever reads the list first decides.
        out = self.integer(x, torch.float32)
        return out if bias is None else out + bias


def _eight_bits(weights: torch.Tensor) -> PackedMatrix:
    weights = weights.float()
    scales = absmax_scales(weights, OUTPUT_GROUP, 8)
    return PackedMatrix(pack_codes(encode(weights, scales, 8), 8), scales, 8)


def _take_parts(layer: torch.nn.Module, keep: Callable[[str, torch.Tensor, Shard], None]) -> None:
    """Parameters of a layer that receive what a checkpoint has for a packed matrix."""
    for part, dtype in PARTS.items():
        place = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        place.weight_loader = _keeper(part, keep)
        layer.register_parameter(part, place)


def _keeper(part: str, keep: Callable[[str, torch.Tensor, Shard], None]) -> Any:
    def load(_: torch.nn.Parameter, loaded: torch.Tensor, shard: Shard = None) -> None:
        keep(part, loaded.clone(), shard)

    return load


def _drop_parts(layer: torch.nn.Module) -> None:
    for part in PARTS:
        delattr(layer, part)


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
