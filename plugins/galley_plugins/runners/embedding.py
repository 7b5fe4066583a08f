"""What both runner adapters do for embedding requests: register, pool, and mark rows between layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from galley_plugins.embedding.methods import make_method
from galley_plugins.embedding.pooling import PromptPooler
from galley_plugins.options import PluginOptions
from galley_plugins.runners.layer_taps import LayerTaps, TappedRows, decoder_layers

if TYPE_CHECKING:
    from collections.abc import Sequence


class EmbeddingRows:
    """The embedding requests of a runner.

    Raises:
        ValueError: the method needs to reach between layers, and this engine compiles its model.
    """

    def __init__(self, vllm_config: Any) -> None:
        options = PluginOptions.from_vllm_config(vllm_config)
        assert options.embedding is not None
        self.method = make_method(options.embedding, vllm_config.model_config.hf_text_config)
        self.pooler = PromptPooler(self.method.make_pool, every_row=self.method.every_row)
        self._generates = options.generate
        self._taps: LayerTaps | None = None
        if self.method.touches_layers:
            reason = _unsuited_engine(vllm_config)
            if reason:
                raise ValueError(f"embedding.method: {options.embedding.method} needs {reason}")

    def tasks(self, own: tuple[str, ...]) -> tuple[str, ...]:
        return (*own, "embed") if self._generates else ("embed",)

    def attach(self, model: Any) -> None:
        """Reach between the layers of a model that has been loaded, where the method asks for it."""
        if self.method.touches_layers:
            self._taps = LayerTaps(decoder_layers(model), self.method.copy_layers, self.method.layer)

    def begin_step(self, request_ids: Sequence[str], starts: Any, computed: Any, device: Any) -> None:
        """Mark the rows of the step that is about to run.

        Args:
            request_ids: in the order of the batch.
            starts: int [requests + 1], first token of each in the batch.
            computed: int [requests], tokens of each that were computed before.
        """
        if self._taps is None:
            return
        sources: list[int] = []
        targets: list[int] = []
        read: list[int] = []
        for row, request_id in enumerate(request_ids):
            if request_id not in self.pooler:
                continue
            prompt = self.pooler[request_id]
            first, stop = int(starts[row]), int(starts[row + 1])
            done = int(computed[row])
            if done + stop - first < prompt.length:
                if self.method.whole_prompt:
                    raise RuntimeError(
                        f"request {request_id}: found part of a prompt, expected all {prompt.length} tokens"
                    )
                continue
            last = first + prompt.length - 1 - done
            read.append(last)
            if prompt.placeholder is not None:
                sources.append(last)
                targets.append(first + prompt.placeholder)
        if not read:
            self._taps.begin(None)
            return
        indices = torch.tensor([*sources, *targets, *read], device=device, dtype=torch.int64)
        self._taps.begin(TappedRows(*indices.split([len(sources), len(targets), len(read)])))

    def end_step(
        self,
        rows: Sequence[int],
        request_ids: Sequence[str],
        starts: Any,
        computed: Any,
        hidden: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Pool what the step computed.

        Args:
            rows: of the batch, those of embedding requests.
            request_ids, starts, computed: as for `begin_step`.
            hidden: [tokens, hidden], the model's output.

        Returns:
            vectors of the prompts that the step completed, on the device.
        """
        tapped = self._taps.end() if self._taps is not None else None
        vectors: dict[str, torch.Tensor] = {}
        place = 0
        for row in rows:
            request_id, start = request_ids[row], int(computed[row])
            chunk = hidden[int(starts[row]) : int(starts[row + 1])]
            if self.method.layer is not None:
                length = self.pooler[request_id].length
                if start + len(chunk) < length:
                    continue
                assert tapped is not None
                chunk, start = tapped[place : place + 1], length - 1
                place += 1
            vector = self.pooler.pool(request_id, chunk, start)
            if vector is not None:
                vectors[request_id] = vector
        return vectors


def _unsuited_engine(vllm_config: Any) -> str | None:
    """What reaching between layers needs that this engine has not, if anything."""
    from vllm.config import CompilationMode

    if vllm_config.compilation_config.mode != CompilationMode.NONE:
        return "a model that is not compiled (compile: off)"
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return "all layers in one process (pipeline-parallel-size: 1)"
    return None
