"""`/v1/embeddings` as vLLM serves it, with the method's prompts and a few more parameters.

- `instruction`: what the vector is for, in the client's words; or `input_type`: "query" or "document", for
  which the configuration has words.
- `truncate`: true or "end" keeps the first tokens of a text that is too long, "start" its last ones; without
  it, such a text is refused. vLLM's own `truncate_prompt_tokens` and `truncation_side` work as well.
"""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.pooling.embed.protocol import EmbeddingCompletionRequest
from vllm.entrypoints.pooling.embed.serving import ServingEmbedding
from vllm.entrypoints.pooling.typing import PoolingEngineInput
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.utils.async_utils import make_async

from galley_plugins import vllm_compat
from galley_plugins.embedding.methods import make_method
from galley_plugins.embedding.placeholder import placeholder_of
from galley_plugins.embedding.pooling import KEY, to_extra
from galley_plugins.embedding.prompts import InputError, PromptBuilder, Side

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

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
        method = make_method(options, model_config.hf_text_config)
        self.plain = method.template.pieces == ("{instruction}", "{text}")
        self.limit = model_config.max_model_len - sampled
        if method.whole_prompt:
            self.limit = min(self.limit, options.max_tokens)
        self._builder = PromptBuilder(tokenizer, method.template, placeholder=placeholder_of(tokenizer))

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


class EmbeddingServing(ServingEmbedding):
    """vLLM's handler, with prompts built by `Texts`."""

    def prepare(self, texts: Texts) -> None:
        self._texts = texts
        self._build = make_async(self._build_inputs, executor=self._executor)

    async def _preprocessing(self, io_processor: Any, ctx: Any) -> None:
        if isinstance(ctx.request, EmbeddingCompletionRequest):
            ctx.engine_inputs = await self._build(ctx)
            return
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
        prompts = self._texts.build(
            _inputs(request.input),
            instruction=self._texts.instruction(extra.get("instruction"), extra.get("input_type")),
            cut=cut,
            limit=limit,
        )
        ctx.pooling_params.verify(self.model_config)
        arrived = time.time()
        found = []
        for prompt in prompts:
            params = copy.copy(ctx.pooling_params)
            params.extra_kwargs = to_extra(prompt.start, prompt.stop, prompt.placeholder)
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
    """Put the method's prompt around texts of other routes, such as scoring, too."""
    vllm_own = engine_client.encode

    async def encode(
        prompt: Any, pooling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        if KEY not in (pooling_params.extra_kwargs or {}):
            (built,) = texts.build([prompt["prompt_token_ids"]])
            pooling_params = copy.copy(pooling_params)
            pooling_params.extra_kwargs = to_extra(built.start, built.stop, built.placeholder)
            prompt = {**prompt, "prompt_token_ids": built.ids}
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
