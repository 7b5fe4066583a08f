"""`/v1/embeddings` as vLLM serves it, with the method's prompts and a few more parameters.

- `instruction`: what the vector is for, in the client's words; or `input_type`: "query" or "document", for
  which the configuration has words.
- `truncate`: true or "end" keeps the first tokens of a text that is too long, "start" its last ones; without
  it, such a text is refused. vLLM's own `truncate_prompt_tokens` and `truncation_side` work as well.
- Of a sparse method, `embedding` is an object `{token id: weight}`, the largest weights first, at most
  `dimensions` of them; `encoding_format` is "float".
"""

from __future__ import annotations

import asyncio
import copy
import time
from typing import TYPE_CHECKING, Any

import torch
from fastapi.responses import JSONResponse
from vllm.entrypoints.pooling.embed.protocol import EmbeddingCompletionRequest
from vllm.entrypoints.pooling.embed.serving import ServingEmbedding
from vllm.entrypoints.pooling.typing import PoolingEngineInput
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.utils.async_utils import make_async

from galley_plugins import vllm_compat
from galley_plugins.embedding.adapter import ENCODER
from galley_plugins.embedding.methods import make_method
from galley_plugins.embedding.placeholder import placeholder_of
from galley_plugins.embedding.pooling import KEY, finish, from_sparse, to_extra
from galley_plugins.embedding.prompts import InputError, PromptBuilder, Side

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from galley_plugins.embedding.methods.method import Method
    from galley_plugins.embedding.options import EmbeddingOptions
    from galley_plugins.embedding.prompts import Input, Prompt

TRUNCATE: dict[Any, Side | None] = {
    None: None, False: None, "none": None, True: "end", "end": "end", "right": "end",
    "start": "start", "left": "start",
}  # fmt: skip


class Texts:
    """What a model makes of the inputs of its embedding requests.

    Args:
        sampled: places that the engine keeps for tokens it samples, at the end of a prompt.
    """

    def __init__(self, options: EmbeddingOptions, model_config: Any, tokenizer: Any, sampled: int) -> None:
        self._options = options
        method = self.method = make_method(options, model_config.hf_text_config)
        self.limit = model_config.max_model_len - sampled
        if method.whole_prompt:
            self.limit = min(self.limit, options.max_tokens)
        placeholder = placeholder_of(tokenizer)
        unused = [tokenizer.convert_tokens_to_ids(placeholder)]  # other embeddings stand in its place
        self._builder = PromptBuilder(
            tokenizer,
            method.template,
            placeholder=placeholder,
            prefix=unused if method.context else (),
            suffix=[tokenizer.eos_token_id] if method.eos else unused if method.specials else (),
        )
        self._tokenizer = tokenizer
        self._encoder_tokenizer = _encoder_tokenizer(method)

    @property
    def plain(self) -> bool:
        """A prompt is the text and nothing else."""
        method = self.method
        around = method.context or method.eos or method.specials
        return method.template.pieces == ("{instruction}", "{text}") and not around

    def instruction(self, instruction: Any, input_type: Any) -> str:
        """
        Raises:
            VLLMValidationError: naming the parameter that cannot be used.
        """
        if instruction is None and input_type is None:
            return ""
        if instruction is None:
            if input_type not in self._options.instructions:
                known = ", ".join(self._options.instructions)
                raise VLLMValidationError(
                    f"input_type: found {input_type!r}, expected one of {known}", parameter="input_type"
                )
            instruction = self._options.instructions[input_type]
        if not isinstance(instruction, str):
            raise VLLMValidationError(
                f"instruction: found {type(instruction).__name__}, expected a string", parameter="instruction"
            )
        return self._options.instruction_template.replace("{instruction}", instruction) if instruction else ""

    def build(
        self,
        inputs: Sequence[Input],
        *,
        instruction: str = "",
        cut: Side | None = None,
        limit: int | None = None,
    ) -> list[Prompt]:
        """
        Raises:
            VLLMValidationError: an input is empty or too long, naming its index.
        """
        try:
            return self._builder.build(
                inputs, min(limit or self.limit, self.limit), instruction=instruction, cut=cut
            )
        except InputError as error:
            raise VLLMValidationError(str(error), parameter="input") from None

    def extras(self, inputs: Sequence[Input], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """What the worker has to know of each prompt, as `PoolingParams.extra_kwargs`."""
        known: list[dict[str, Any]] = [{} for _ in prompts]
        for more, prompt in zip(known, prompts, strict=True):
            if prompt.placeholder is not None:
                more["placeholder"] = prompt.placeholder
        if self._encoder_tokenizer is not None:
            from galley_plugins.embedding.context_encoder import encoder_ids

            texts = [
                entry if isinstance(entry, str) else self._tokenizer.decode(entry, skip_special_tokens=True)
                for entry in inputs
            ]
            for more, ids in zip(known, encoder_ids(self._encoder_tokenizer, texts), strict=True):
                more["context"] = ids
        return [
            to_extra(prompt.start, prompt.stop, **more) for more, prompt in zip(known, prompts, strict=True)
        ]


def _encoder_tokenizer(method: Method) -> Any:
    if not method.context:
        return None
    from transformers import AutoTokenizer

    assert method.adapter is not None
    return AutoTokenizer.from_pretrained(method.adapter / ENCODER, local_files_only=True)


class EmbeddingServing(ServingEmbedding):
    """vLLM's handler, with prompts built by `Texts`."""

    def prepare(self, texts: Texts) -> None:
        self._texts = texts
        self._build = make_async(self._build_inputs, executor=self._executor)

    async def _preprocessing(self, io_processor: Any, ctx: Any) -> None:
        if isinstance(ctx.request, EmbeddingCompletionRequest):
            ctx.engine_inputs = await self._build(ctx)
            return
        if self._texts.method.sparse is not None:
            raise VLLMValidationError("this model's vectors are sparse: expected `input`", parameter="input")
        if not self._texts.plain:
            raise VLLMValidationError(
                "messages: this model embeds texts with a prompt of its own, expected `input`",
                parameter="messages",
            )
        await super()._preprocessing(io_processor, ctx)

    def _build_inputs(self, ctx: Any) -> list[PoolingEngineInput]:
        request = ctx.request
        extra = request.model_extra or {}
        cut, limit = _truncation(request, extra.get("truncate"), self._texts.limit)
        if self._texts.method.sparse is not None and request.encoding_format != "float":
            raise VLLMValidationError(
                f"encoding_format: found {request.encoding_format!r}, expected 'float': vectors are sparse",
                parameter="encoding_format",
            )
        inputs = _inputs(request.input)
        prompts = self._texts.build(
            inputs,
            instruction=self._texts.instruction(extra.get("instruction"), extra.get("input_type")),
            cut=cut,
            limit=limit,
        )
        ctx.pooling_params.verify(self.model_config)
        arrived = time.time()
        found = []
        for prompt, extra_kwargs in zip(prompts, self._texts.extras(inputs, prompts), strict=True):
            params = copy.copy(ctx.pooling_params)
            params.extra_kwargs = extra_kwargs
            engine_input = tokens_input(prompt.ids, cache_salt=request.cache_salt)
            engine_input["arrival_time"] = arrived
            found.append(
                PoolingEngineInput(
                    prompts=engine_input,
                    params=params,
                    lora_requests=ctx.lora_request,
                    priorities=ctx.priorities,
                )
            )
        return found

    def _build_openai_response(self, ctx: Any) -> Any:
        if self._texts.method.sparse is None:
            return super()._build_openai_response(ctx)
        data = [
            {"object": "embedding", "index": index, "embedding": from_sparse(result.outputs.data)}
            for index, result in enumerate(ctx.final_res_batch)
        ]
        tokens = sum(len(result.prompt_token_ids) for result in ctx.final_res_batch)
        return JSONResponse(
            {
                "id": ctx.request_id,
                "object": "list",
                "created": ctx.created_time,
                "model": ctx.model_name,
                "data": data,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )


def install(state: Any, engine_client: Any, options: EmbeddingOptions, sampled: int) -> None:
    """Serve embeddings by `options` from an API server whose state vLLM has set up."""
    vllm_compat.check("embedding-frontend")
    own = state.serving_embedding
    texts = Texts(options, own.model_config, engine_client.renderer.tokenizer, sampled)
    ours = EmbeddingServing(
        engine_client,
        own.models,
        request_logger=own.request_logger,
        chat_template_config=own.chat_template_config,
        log_error_stack=own.log_error_stack,
    )
    ours.prepare(texts)
    state.serving_embedding = ours
    if not texts.plain:
        _prompt_everything(engine_client, texts)


def _prompt_everything(engine_client: Any, texts: Texts) -> None:
    """Put the method's prompt around texts of other routes, such as scoring, too.

    A text with several special tokens becomes as many prompts, and their vectors one.
    """
    vllm_own = engine_client.encode
    specials = texts.method.specials

    async def encode(
        prompt: Any, pooling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        if KEY not in (pooling_params.extra_kwargs or {}):
            inputs = [prompt["prompt_token_ids"]]
            (built,) = prompts = texts.build(inputs)
            pooling_params = copy.copy(pooling_params)
            (pooling_params.extra_kwargs,) = texts.extras(inputs, prompts)
            prompt = {**prompt, "prompt_token_ids": built.ids}

        async def part(special: int) -> Any:
            params = copy.copy(pooling_params)
            more = {**pooling_params.extra_kwargs[KEY], "special": special, "part": True}
            params.extra_kwargs = {KEY: more}
            async for output in vllm_own(prompt, params, f"{request_id}-{special}", *args, **kwargs):
                found = output
            return found

        if specials > 1:
            outputs = await asyncio.gather(*map(part, range(specials)))
            vectors = torch.stack([output.outputs.data for output in outputs])
            whole = vectors.mean(0) if texts.method.combine == "mean" else vectors.flatten()
            normalize = pooling_params.use_activation is not False
            outputs[0].outputs.data = finish(whole, pooling_params.dimensions, normalize=normalize)
            outputs[0].request_id = request_id
            yield outputs[0]
            return
        async for output in vllm_own(prompt, pooling_params, request_id, *args, **kwargs):
            yield output

    engine_client.encode = encode


def _inputs(value: Any) -> list[Input]:
    """One input or several, as a list."""
    if isinstance(value, str) or (value and isinstance(value[0], int)):
        return [value]
    return list(value)


def _truncation(request: Any, truncate: Any, most: int) -> tuple[Side | None, int | None]:
    """Which side is cut, and the most tokens of a prompt."""
    try:
        cut = TRUNCATE[truncate.lower() if isinstance(truncate, str) else truncate]
    except (KeyError, TypeError):
        raise VLLMValidationError(
            f"truncate: found {truncate!r}, expected true, false, 'start', 'end' or 'none'",
            parameter="truncate",
        ) from None
    tokens = request.truncate_prompt_tokens
    if tokens is None:
        return cut, None
    side: Side = "start" if request.truncation_side == "left" else "end"
    return cut or side, most if tokens < 1 else tokens
