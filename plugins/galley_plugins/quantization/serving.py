"""vLLM loads Galley's quantized checkpoints: `quant_method: galley`, and on a CPU its compressed-tensors too.

A layer keeps vLLM's own weight and its loader. Packed tensors are kept until all have come, become numbers,
and go through that loader as if the checkpoint had held them: shards of tensor parallelism, fused maps and
adapters of LoRA are vLLM's affair.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.platforms import current_platform

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
        return PackedLinearMethod(prefix, packed) if packed else UnquantizedLinearMethod()


class PackedLinearMethod(UnquantizedLinearMethod):
    """Takes packed tensors for a layer's weight.

    Args:
        prefix: the layer's name, for errors.
        packed: how many of the maps that the layer fuses are packed.
    """

    def __init__(self, prefix: str, packed: int) -> None:
        super().__init__()
        self._prefix = prefix
        self._packed = packed
        self._found: dict[Shard, dict[str, torch.Tensor]] = {}

    def create_weights(self, layer: torch.nn.Module, *args: Any, **named: Any) -> None:
        super().create_weights(layer, *args, **named)
        for part in PARTS:
            place = torch.nn.Parameter(torch.empty(0), requires_grad=False)
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
        for shard, parts in self._found.items():
            name = self._prefix if shard is None else f"{self._prefix}[{shard}]"
            named = {f"{name}.{part}": tensor for part, tensor in parts.items()}
            matrix = matrix_of(name, None, named.get)
            dense = matrix.dequantize().to(layer.weight.dtype)
            loader = layer.weight.weight_loader
            loader(layer.weight, dense, *(() if shard is None else (shard,)))
        self._found.clear()
        super().process_weights_after_loading(layer)
