"""What both runner adapters do for embedding requests: register, mark rows inside the model, and pool."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from galley_plugins.embedding.adapter import ENCODER, Base, load_settings, load_tensors
from galley_plugins.embedding.methods import make_method
from galley_plugins.embedding.pooling import PromptPooler, PromptRows
from galley_plugins.memory.mixed_model import own_states
from galley_plugins.options import PluginOptions
from galley_plugins.runners.layer_taps import LayerTaps, TappedRows, decoder_layers
from galley_plugins.runners.row_attention import RowAttention
from galley_plugins.runners.row_inputs import RowInputs
from galley_plugins.runners.row_lora import RowLora, rows_of
from galley_plugins.speculation.store import tokenizer_hash

if TYPE_CHECKING:
    from collections.abc import Sequence

    from galley_plugins.embedding.context_encoder import ContextEncoder
    from galley_plugins.embedding.pooling import Head


@dataclass(slots=True)
class _Marks:
    """Rows of one step, as indices into its tokens unless they are said to be of the batch."""

    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    adapted: list[tuple[int, int]] = field(default_factory=list)  # spans
    inputs: list[tuple[int, PromptRows]] = field(default_factory=list)
    bidirectional: list[int] = field(default_factory=list)  # rows of the batch


class EmbeddingRows:
    """The embedding requests of a runner.

    Raises:
        ValueError: the method needs to reach inside the model, which this engine does not allow.
    """

    def __init__(self, vllm_config: Any) -> None:
        options = PluginOptions.from_vllm_config(vllm_config)
        assert options.embedding is not None
        self.method = make_method(options.embedding, vllm_config.model_config.hf_text_config)
        self.pooler = PromptPooler(
            self.method.make_pool, every_row=self.method.every_row, sparse=self.method.sparse
        )
        self.attention = RowAttention() if self.method.bidirectional else None
        self._model_config = vllm_config.model_config
        self._generates = options.generate
        self._model: Any = None
        self._taps: LayerTaps | None = None
        self._lora: RowLora | None = None
        self._inputs: RowInputs | None = None
        self._specials: torch.Tensor | None = None
        self._encoder: ContextEncoder | None = None
        reason = _unsuited_engine(vllm_config, self.method)
        if reason:
            raise ValueError(f"embedding.method: {options.embedding.method} needs {reason}")

    @property
    def marks_rows(self) -> bool:
        return bool(self._taps or self._lora or self._inputs or self.attention)

    def tasks(self, own: tuple[str, ...]) -> tuple[str, ...]:
        return (*own, "embed") if self._generates else ("embed",)

    def attach(self, model: Any) -> None:
        """Reach inside a model that has been loaded, where the method asks for it.

        Raises:
            ValueError: the adapter was made for another model.
        """
        method = self.method
        self._model = model
        if method.layer is not None or method.copy_layers:
            self._taps = LayerTaps(decoder_layers(model), method.copy_layers, method.layer)
        weights = next(model.parameters())
        tensors = self._adapter_tensors()
        if method.lora != "none":
            self._lora = RowLora(decoder_layers(model), tensors, weights.device, weights.dtype)
        if method.specials:
            self._specials = _expected(
                tensors, "special", (method.specials, self._model_config.get_hidden_size())
            )
            self._specials = self._specials.to(weights.device, weights.dtype)
        if method.context:
            self._encoder = self._load_encoder(tensors).to(weights.device)
        if method.specials or method.context:
            self._inputs = RowInputs(model.model.embed_tokens)
        head = self._head(model, tensors, weights)
        if head is not None:
            self.pooler.make_pool = partial(method.make_pool, head=head)

    def _adapter_tensors(self) -> dict[str, torch.Tensor]:
        folder = self.method.adapter
        if folder is None:
            return {}
        base = Base.of(self._model_config.hf_text_config, tokenizer_hash(self._model_config.tokenizer))
        return load_tensors(folder, base)

    def _load_encoder(self, tensors: dict[str, torch.Tensor]) -> ContextEncoder:
        from galley_plugins.embedding.context_encoder import ContextEncoder

        assert self.method.adapter is not None
        return ContextEncoder.load(
            self.method.adapter / ENCODER, self._model_config.get_hidden_size(), tensors
        )

    def _head(self, model: Any, tensors: dict[str, torch.Tensor], weights: torch.Tensor) -> Head | None:
        if self.method.head == "none":
            return None
        if self.method.head == "splade":
            return lambda rows: model.compute_logits(rows).float().relu_().log1p_()
        if self.method.adapter is None:
            head = model.take_head()
        else:
            from galley_plugins.embedding.latent_attention import PREFIX, LatentAttention

            settings = load_settings(self.method.adapter)
            own = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
            head = LatentAttention.from_tensors(own, settings.sizes["heads"])
        folded: Head = head.fold().to(weights.device, weights.dtype)
        return folded

    def begin_step(self, request_ids: Sequence[str], starts: Any, computed: Any, device: Any) -> None:
        """Mark the rows of the step that is about to run.

        Args:
            request_ids: in the order of the batch.
            starts: int [requests + 1], first token of each in the batch.
            computed: int [requests], tokens of each that were computed before.
        """
        if not self.marks_rows:
            return
        marks = _Marks()
        for row, request_id in enumerate(request_ids if self.pooler else ()):
            if request_id in self.pooler:
                span = int(starts[row]), int(starts[row + 1])
                self._mark(marks, row, request_id, span, int(computed[row]))
        self._begin(marks, len(request_ids), device)

    def _mark(self, marks: _Marks, row: int, request_id: str, span: tuple[int, int], done: int) -> None:
        """Add the rows of one request: tokens `span` of the step, after `done` earlier ones."""
        method, prompt = self.method, self.pooler[request_id]
        first, stop = span
        complete = done + stop - first >= prompt.length
        if method.whole_prompt and not (complete and done == 0):
            raise RuntimeError(
                f"request {request_id}: found part of a prompt, expected all {prompt.length} tokens"
            )
        stop = min(stop, first + prompt.length - done)
        if method.bidirectional:
            marks.bidirectional.append(row)
        if method.lora == "all":
            marks.adapted.append((first, stop))
        if method.context and done == 0:
            marks.inputs.append((first, prompt))
        if not complete:
            return
        marks.last.append(stop - 1)
        if method.lora == "last":
            marks.adapted.append((stop - 1, stop))
        if method.specials:
            marks.inputs.append((stop - 1, prompt))
        if prompt.placeholder is not None:
            marks.sources.append(stop - 1)
            marks.targets.append(first + prompt.placeholder)

    def _begin(self, marks: _Marks, requests: int, device: Any) -> None:
        if self._taps is not None:
            rows = (marks.sources, marks.targets, marks.last)
            indices = [torch.tensor(part, device=device, dtype=torch.int64) for part in rows]
            self._taps.begin(TappedRows(*indices) if marks.last else None)
        if self._lora is not None:
            self._lora.begin(rows_of(marks.adapted, device))
        if self.attention is not None:
            self.attention.begin(marks.bidirectional, requests, device)
        if self._inputs is not None:
            if marks.inputs:
                places = torch.tensor([place for place, _ in marks.inputs], device=device)
                self._inputs.begin(places, self._values([prompt for _, prompt in marks.inputs]))
            else:
                self._inputs.begin(None, None)

    def _values(self, prompts: list[PromptRows]) -> torch.Tensor:
        """[prompts, hidden]: what stands in place of a token's embedding."""
        if self._encoder is not None:
            with torch.inference_mode():
                contexts: torch.Tensor = self._encoder([prompt.context for prompt in prompts])
            return contexts
        assert self._specials is not None
        return self._specials[[prompt.special for prompt in prompts]]

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
            hidden: [tokens, hidden], the model's output, or more columns with a memory.

        Returns:
            vectors of the prompts that the step completed, on the device.
        """
        hidden = own_states(self._model, hidden)
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


def _expected(tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    found = tensors.get(name)
    if found is None or found.shape != shape:
        what = "none" if found is None else list(found.shape)
        raise ValueError(f"adapter: {name}: found {what}, expected {list(shape)}")
    return found


def _unsuited_engine(vllm_config: Any, method: Any) -> str | None:
    """What reaching inside the model needs that this engine has not, if anything."""
    from vllm.config import CompilationMode

    if not method.touches_layers and method.head == "none":
        return None
    parallel = vllm_config.parallel_config
    if method.touches_layers and vllm_config.compilation_config.mode != CompilationMode.NONE:
        return "a model that is not compiled (compile: off)"
    if parallel.pipeline_parallel_size > 1:
        return "all layers in one process (pipeline-parallel-size: 1)"
    if method.adapter is not None and parallel.tensor_parallel_size > 1:
        return "whole layers in one process (tensor-parallel-size: 1)"
    return None
