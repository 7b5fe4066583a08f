"""A model's layers run as one decoder of compiled maps on a CPU, around vLLM's own attention.

Maps are of packed weights and integers, or of few rows and weights as they are (`galley_plugins.few_rows`).
vLLM runs a layer as some twenty operations, each called from Python; with 4-bit weights, those calls take
longer than the products, and with others nearly as long. Here a whole pass is one call
(`galley_kernels.compiled`), on processors where vLLM keeps keys and values in the layout that it reads, for
requests that attend to all before them, drafts that branch included. Elsewhere a layer is three: keys and
values into the cache, vLLM's attention, and the rest. Steps that something looks into between layers run as
vLLM runs them, but what enters an MLP is kept here too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaModel
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from galley_kernels.compiled import CompiledDecoder, DecoderLayer, FloatLinear, PagedCache, Requests
from galley_plugins import few_rows, vllm_compat
from galley_plugins.runners.layer_taps import MlpTap, looked_into
from galley_plugins.speculation.tree_attention import TreeAttentionMetadata

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

LAYOUT = "vec"  # of vLLM's caches on a CPU: that which `galley_kernels.compiled` reads

logger = init_logger("vllm.galley.quantization.decoder")


def install(model: Any) -> int:
    """Where all of its decoder layers are what `CompiledDecoder` computes, run them so; how many that are.

    Args:
        model: vLLM's, with its weights.
    """
    vllm_compat.check("compiled-decoder")
    inner: Any = getattr(model, "model", None)
    if type(inner) is not LlamaModel or not all(_suits(layer) for layer in inner.layers):
        return 0
    inner.forward = DecoderForward(inner)
    logger.info("%d layers run as compiled maps", len(inner.layers))
    return len(inner.layers)


def _suits(layer: Any) -> bool:
    if type(layer) is not LlamaDecoderLayer or type(layer.self_attn) is not LlamaAttention:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    rope = attention.rotary_emb
    return (
        type(mlp) is LlamaMLP
        and all(_compiled(module) for module in _maps(layer))
        and isinstance(rope, RotaryEmbedding)
        and type(rope).forward_cpu is RotaryEmbedding.forward_cpu
        and bool(rope.is_neox_style)
        and isinstance(attention.attn.impl, CPUAttentionBackendImpl)
        and attention.attn.kv_sharing_target_layer_name is None
        and attention.attn.query_quant is None
        and layer.input_layernorm.variance_size_override is None
    )


def _maps(layer: Any) -> tuple[Any, Any, Any, Any]:
    return (
        layer.self_attn.qkv_proj,
        layer.self_attn.o_proj,
        layer.mlp.gate_up_proj,
        layer.mlp.down_proj,
    )


def _compiled(module: Any) -> Any:
    """The layer's `CompiledLinear`, or None."""
    return getattr(getattr(module, "quant_method", None), "integer", None) or few_rows.linear_of(module)


class DecoderForward:
    """Stands for `LlamaModel.forward`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._plain = model.forward
        first = model.layers[0]
        attention, rope = first.self_attn, first.self_attn.rotary_emb
        dtype = next(model.embed_tokens.parameters()).dtype
        self._decoder = CompiledDecoder(
            [
                DecoderLayer(
                    layer.input_layernorm.weight.data,
                    layer.post_attention_layernorm.weight.data,
                    *(_compiled(module) for module in _maps(layer)),
                )
                for layer in model.layers
            ],
            model.norm.weight.data,
            rope.cos_sin_cache,
            query_heads=attention.num_heads,
            key_heads=attention.num_kv_heads,
            head=attention.head_dim,
            epsilon=first.input_layernorm.variance_epsilon,
            dtype=dtype,
        )
        self._attention: Sequence[Any] = [layer.self_attn.attn for layer in model.layers]
        self._names = [attention.layer_name for attention in self._attention]
        self._attends = self._decoder.attends and all(_plain(attention) for attention in self._attention)
        self._cache: PagedCache | None = None
        maps = [module for layer in model.layers for module in _maps(layer)]
        floating = any(isinstance(_compiled(module), FloatLinear) for module in maps)
        self._most = few_rows.MOST if floating else None  # rows of a step
        self._watched = [module for layer in model.layers for module in (layer, layer.self_attn, layer.mlp)]
        self._watched += maps
        self._taps = {
            place: hook
            for place, layer in enumerate(model.layers)
            for hook in layer.mlp._forward_pre_hooks.values()
            if isinstance(hook, MlpTap)
        }

    def __call__(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any,
        inputs_embeds: torch.Tensor | None = None,
        **more: Any,
    ) -> Any:
        context = get_forward_context()
        metadata = context.attn_metadata
        if (
            not isinstance(metadata, dict)
            or not isinstance(context.slot_mapping, dict)
            or more
            or intermediate_tensors is not None
            or (self._most is not None and len(positions) > self._most)
            or getattr(self._model, "aux_hidden_state_layers", None)
            or looked_into(self._watched, but=MlpTap)
        ):
            return self._plain(input_ids, positions, intermediate_tensors, inputs_embeds, **more)
        for place, tap in self._taps.items():
            self._decoder.keep(place, None if tap.idle() else tap.buffer)
        embedded = self._model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        requests = self._plain_requests(metadata, context.slot_mapping, len(positions))
        if requests is not None and self._cache is not None:
            return self._decoder.run(positions, embedded, self._cache, requests)
        decoder = self._decoder
        step = decoder.begin(positions, embedded)
        query, key, value = step.qkv.split([decoder.query_heads, decoder.key_heads, decoder.key_heads], 1)
        for place, attention in enumerate(self._attention):
            name, impl, cache = attention.layer_name, attention.impl, attention.kv_cache
            impl.do_kv_cache_update(attention, key, value, cache, context.slot_mapping[name])
            impl.forward(attention, query, key, value, cache, metadata[name], step.attention)
            decoder.follow(place, step)
        return step.result

    def _plain_requests(
        self, metadata: dict[str, Any], slots: dict[str, torch.Tensor], rows: int
    ) -> Requests | None:
        """Whose the rows and branches are, where all layers attend causally to all before; None elsewhere."""
        names = self._names
        first, slot = metadata[names[0]], slots.get(names[0])
        if (
            type(first) not in (CPUAttentionMetadata, TreeAttentionMetadata)
            or first.causal is not True
            or first.dynamic_causal is not None
            or first.num_actual_tokens != rows
            or slot is None
            or len(slot) != rows
            or not all(metadata[name] is first and slots.get(name) is slot for name in names)
        ):
            return None
        if self._cache is None:
            self._cache = self._paged_cache()
        again = None
        if isinstance(first, TreeAttentionMetadata) and first.extra_slots is not None:
            again = first.extra_tokens, first.extra_slots
        requests = Requests(first.query_start_loc, first.seq_lens, first.block_table, slot, again)
        return requests if requests.fits() else None

    def _paged_cache(self) -> PagedCache | None:
        """The layers' caches, where attention is of the kind that the decoder computes."""
        layer = self._attention[0]
        scales = {attention.impl.scale for attention in self._attention}
        if not self._attends or len(scales) > 1 or layer.isa != LAYOUT:
            return None
        return PagedCache(
            [attention.kv_cache for attention in self._attention], layer.head_size, scales.pop()
        )


def _plain(attention: Any) -> bool:
    """Whether a layer attends to all keys before a row by their products alone."""
    impl = attention.impl
    return (
        impl.sliding_window == -1
        and impl.alibi_slopes is None
        and not impl.logits_soft_cap
        and impl.sinks is None
        and impl.kv_cache_dtype == "auto"
        and attention.attn_type == AttentionType.DECODER
    )
