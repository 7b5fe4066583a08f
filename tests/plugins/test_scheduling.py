"""The real scheduler with a real prefix cache, over a model of which only the configuration exists."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, SpeculativeConfig, VllmConfig
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from galley_plugins.embedding.adapter import AdapterSettings, Base, save_adapter
from galley_plugins.embedding.options import EmbeddingOptions
from galley_plugins.options import PluginOptions
from galley_plugins.speculation.handover import stop_asking, with_drafts
from galley_plugins.speculation.options import SpeculationOptions

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("own_environment")

BLOCK = 16
PROMPT = list(range(50))  # three whole blocks and two tokens more
MEAN = PluginOptions(embedding=EmbeddingOptions())
LAST = PluginOptions(embedding=EmbeddingOptions(method="last"))
OFF = PluginOptions()


@pytest.fixture
def model(llama: Path) -> ModelConfig:
    return ModelConfig(model=str(llama), skip_tokenizer_init=True, dtype="float32")


class Share:
    """A share of a step that is given and writes down what it is told."""

    def __init__(self, share: int) -> None:
        self.share = share
        self.ended: list[int | None] = []

    def begin(self, now: float) -> None: ...
    def pause(self) -> None: ...

    def tokens(self) -> int:
        return self.share

    def end(self, tokens: int | None) -> None:
        self.ended.append(tokens)


def scheduler(
    model: ModelConfig,
    options: PluginOptions,
    *,
    asynchronous: bool = False,
    share: int = 256,
    drafts: int = 0,
) -> Any:
    """What an engine core with these options schedules with."""
    config = VllmConfig(
        model_config=model,
        scheduler_config=SchedulerConfig(
            max_num_seqs=8,
            max_num_batched_tokens=256,
            max_model_len=256,
            is_encoder_decoder=False,
            scheduler_cls="galley_plugins.scheduling.make_scheduler",
        ),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
        additional_config=options.to_additional_config(),
        speculative_config=SpeculativeConfig(method="ngram", num_speculative_tokens=drafts)
        if drafts
        else None,
    )
    config.scheduler_config.async_scheduling = asynchronous  # which vLLM never chooses on a CPU
    config.cache_config.num_gpu_blocks = 64
    attention = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    init_none_hash(sha256)
    made = config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], attention)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
    )
    if options.pools:
        made._step_share = Share(share)
    return made


def chat(name: str) -> Request:
    parameters = SamplingParams(max_tokens=4)
    return Request(name, PROMPT, parameters, None, block_hasher=get_request_block_hasher(BLOCK, sha256))


def embedding(name: str) -> Request:
    parameters = PoolingParams(task="embed")
    return Request(name, PROMPT, None, parameters, block_hasher=get_request_block_hasher(BLOCK, sha256))


def first_chunks(scheduler: Any, *requests: Request) -> dict[str, tuple[int, int]]:
    """For each request, the tokens read from the cache and those to compute, in the step that admits it."""
    for request in requests:
        scheduler.add_request(request)
    step = scheduler.schedule()
    return {
        request.req_id: (request.num_computed_tokens, step.num_scheduled_tokens[request.req_id])
        for request in step.scheduled_new_reqs
    }


@pytest.mark.parametrize("asynchronous", [False, True])
def test_only_embeddings_compute_their_whole_prompt_where_a_mean_is_taken(
    model: ModelConfig, asynchronous: bool
) -> None:
    mean = scheduler(model, MEAN, asynchronous=asynchronous)
    assert first_chunks(mean, chat("first")) == {"first": (0, 50)}
    assert first_chunks(mean, chat("second"), embedding("vector")) == {"second": (48, 2), "vector": (0, 50)}


def test_steps_are_longer_while_no_chat_runs(model: ModelConfig) -> None:
    both = scheduler(model, replace(MEAN, step_tokens=32, embed_step_tokens=96))
    assert first_chunks(both, embedding("a"), embedding("b")) == {"a": (0, 50), "b": (0, 46)}
    other = Request("c", list(range(60, 110)), SamplingParams(max_tokens=4), None, block_hasher=hasher())
    assert first_chunks(both, other) == {"c": (0, 28)}  # b goes on with its last 4 of 32
    both.finish_requests("c", RequestStatus.FINISHED_ABORTED)
    assert first_chunks(both, embedding("d")) == {"d": (0, 50)}


def test_gems_special_token_stays_out_of_a_cache_that_its_text_fills(
    model: ModelConfig, tmp_path: Path
) -> None:
    settings = AdapterSettings("gem", Base("llama", 1, 1, ""), "", sizes={"tokens": 1, "combine": "mean"})
    save_adapter(tmp_path / "gem", settings, {})
    options = EmbeddingOptions.from_values({"adapter": str(tmp_path / "gem")})
    gem = scheduler(model, PluginOptions(embedding=options))
    whole = list(range(3 * BLOCK))  # its special token ends a block
    first = Request("a", whole, None, PoolingParams(task="embed"), block_hasher=hasher())
    assert first_chunks(gem, first) == {"a": (0, 48)}
    longer = Request("b", [*whole, 1, 2], SamplingParams(max_tokens=4), None, block_hasher=hasher())
    assert first_chunks(gem, longer) == {"b": (2 * BLOCK, 18)}


def hasher() -> Any:
    return get_request_block_hasher(BLOCK, sha256)


def test_a_chat_reads_the_prefix_that_an_embedding_left(model: ModelConfig) -> None:
    mean = scheduler(model, MEAN)
    assert first_chunks(mean, embedding("vector")) == {"vector": (0, 50)}
    assert first_chunks(mean, chat("chat")) == {"chat": (48, 2)}


@pytest.mark.parametrize("options", [LAST, OFF])
def test_embeddings_read_the_cache_where_no_mean_is_taken(model: ModelConfig, options: PluginOptions) -> None:
    other = scheduler(model, options)
    first_chunks(other, chat("first"))
    assert first_chunks(other, embedding("vector")) == {"vector": (48, 2)}


@pytest.mark.parametrize("options", [MEAN, LAST, OFF])
def test_the_scheduler_is_the_one_that_vllm_would_use(model: ModelConfig, options: PluginOptions) -> None:
    assert isinstance(scheduler(model, options, asynchronous=True), AsyncScheduler)
    synchronous = scheduler(model, options)
    assert isinstance(synchronous, Scheduler)
    assert not isinstance(synchronous, AsyncScheduler)


def test_an_embedding_ends_with_the_step_that_brings_its_vector_and_no_token(model: ModelConfig) -> None:
    mean = scheduler(model, MEAN)
    for request in (embedding("vector"), chat("chat")):
        mean.add_request(request)
    step = mean.schedule()
    vector = torch.ones(4)
    output = ModelRunnerOutput(
        req_ids=["vector", "chat"],
        req_id_to_index={"vector": 0, "chat": 1},
        sampled_token_ids=[[], [7]],
        pooler_output=[vector, None],
    )
    outputs = {each.request_id: each for each in mean.update_from_output(step, output)[0].outputs}
    assert outputs["vector"].pooling_output is vector
    assert outputs["vector"].finished
    assert outputs["vector"].new_token_ids == []
    assert outputs["chat"].new_token_ids == [7]
    assert not outputs["chat"].finished
    assert mean.schedule().num_scheduled_tokens == {"chat": 1}


def sharing(model: ModelConfig, share: int) -> Any:
    return scheduler(model, replace(MEAN, step_tokens=32, embed_step_tokens=256), share=share)


def unlike(name: str, first: int, tokens: int = 50, *, embeds: bool = False) -> Request:
    """A request that shares no prefix with others."""
    parameters = (
        {"pooling_params": PoolingParams(task="embed"), "sampling_params": None}
        if embeds
        else {"pooling_params": None, "sampling_params": SamplingParams(max_tokens=4)}
    )
    ids = list(range(first, first + tokens))
    return Request(name, ids, **parameters, block_hasher=hasher())


def sampled(scheduler: Any, step: Any, *decoding: str) -> None:
    """Tell the scheduler what came of a step: one token of each of these."""
    names = list(step.num_scheduled_tokens)
    output = ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=[[7] if name in decoding else [] for name in names],
        pooler_output=[None] * len(names),
    )
    scheduler.update_from_output(step, output)


def test_embeddings_get_their_share_of_a_step_with_chats(model: ModelConfig) -> None:
    both = sharing(model, 10)
    assert first_chunks(both, unlike("document", 0, 200, embeds=True)) == {"document": (0, 200)}
    both = sharing(model, 10)
    both.add_request(unlike("document", 0, 200, embeds=True))
    both.add_request(unlike("chat", 300, 30))
    taken = []
    for _ in range(3):
        step = both.schedule()
        taken.append(step.num_scheduled_tokens)
        sampled(both, step, *(["chat"] if sum(each.get("chat", 0) for each in taken) >= 30 else []))
    assert taken == [{"chat": 22, "document": 10}, {"chat": 8, "document": 10}, {"chat": 1, "document": 10}]
    assert both._step_share.ended == [None, None, 10]  # where a prompt was read, the time says nothing


def test_a_chat_passes_the_embeddings_that_wait_and_run(model: ModelConfig) -> None:
    both = sharing(model, 10)
    both.max_num_running_reqs = 2
    for index in range(4):
        both.add_request(unlike(f"document {index}", 1000 * index, 200, embeds=True))
    both.schedule()  # 256 tokens: all of one document and a part of the next
    both.add_request(unlike("chat", 5000, 20))
    both.finish_requests("document 0", RequestStatus.FINISHED_ABORTED)
    step = both.schedule()
    assert step.num_scheduled_tokens == {"document 1": 10, "chat": 20}
    sampled(both, step, "chat")
    assert [request.request_id for request in both.running] == ["document 1", "chat"]
    assert list(both.schedule().num_scheduled_tokens.items()) == [("chat", 1), ("document 1", 10)]
    assert [request.request_id for request in both.waiting] == ["document 2", "document 3"]


def test_a_step_that_measures_chats_has_no_embedding(model: ModelConfig) -> None:
    both = sharing(model, 0)
    both.add_request(unlike("document", 0, 200, embeds=True))
    assert first_chunks(both, unlike("chat", 300, 50)) == {"chat": (0, 32)}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("share", [1, 3, 256])
def test_one_token_is_all_that_is_left_of_an_embedding_beside_drafts(
    model: ModelConfig, share: int, *, asynchronous: bool
) -> None:
    both = scheduler(model, replace(LAST, step_tokens=32), share=share, drafts=4, asynchronous=asynchronous)
    both.add_request(unlike("chat", 300, 20))
    sampled(both, both.schedule(), "chat")
    for name in ("first", "second"):
        both.add_request(unlike(name, 500, 1, embeds=True))
    step = both.schedule()
    embedded = ["first", "second"][:share]
    decoded = 5 if asynchronous else 1  # with places for drafts that are yet to come, or without any drafts
    assert step.num_scheduled_tokens == {"chat": decoded, **dict.fromkeys(embedded, 1)}
    assert step.total_num_scheduled_tokens == decoded + len(embedded)
    assert not set(embedded) & step.scheduled_spec_decode_tokens.keys()
    assert [both.requests[name].num_computed_tokens for name in embedded] == [1] * len(embedded)


def test_documents_alone_take_every_token_again(model: ModelConfig) -> None:
    both = sharing(model, 10)
    both.add_request(unlike("chat", 300, 20))
    assert first_chunks(both, unlike("document", 0, 200, embeds=True)) == {
        "chat": (0, 20),
        "document": (0, 10),
    }
    both.finish_requests("chat", RequestStatus.FINISHED_ABORTED)
    assert both.schedule().num_scheduled_tokens == {"document": 190}


WHOLE = PluginOptions(
    embedding=EmbeddingOptions(method="token-prepending", start_layer=1, exit_layer=2), step_tokens=32
)


def test_a_prompt_of_one_step_gets_it_however_few_tokens_a_step_has(model: ModelConfig) -> None:
    """50 tokens against 32 a step: the chat's prompt is split, the embedding's is not."""
    whole = scheduler(model, WHOLE)
    assert first_chunks(whole, chat("chat")) == {"chat": (0, 32)}
    whole.add_request(embedding("vector"))
    step = whole.schedule()
    assert step.num_scheduled_tokens == {"chat": 18, "vector": 50}
    assert whole.schedule().num_scheduled_tokens.get("vector") is None


def test_it_waits_where_others_take_the_step(model: ModelConfig) -> None:
    whole = scheduler(model, WHOLE)
    for request in (chat("one"), embedding("vector")):
        whole.add_request(request)
    assert whole.schedule().num_scheduled_tokens == {"one": 50}
    assert whole.schedule().num_scheduled_tokens == {"vector": 50}


def test_other_keys_and_values_than_a_chats_are_neither_found_nor_read(model: ModelConfig) -> None:
    whole = scheduler(model, WHOLE)
    assert first_chunks(whole, embedding("vector")) == {"vector": (0, 50)}
    assert first_chunks(whole, chat("chat"))["chat"][0] == 0
    whole = scheduler(model, WHOLE)
    whole.add_request(chat("chat"))
    for _ in range(2):
        whole.schedule()
    assert first_chunks(whole, embedding("vector")) == {"vector": (0, 50)}


def test_an_aborted_prompt_no_longer_makes_steps_large(model: ModelConfig) -> None:
    whole = scheduler(model, WHOLE)
    whole.add_request(embedding("vector"))
    whole.finish_requests("vector", RequestStatus.FINISHED_ABORTED)
    assert first_chunks(whole, chat("chat")) == {"chat": (0, 32)}


DRAFTING = PluginOptions(speculation=SpeculationOptions())


def test_drafts_that_came_with_a_step_are_verified_in_the_next(model: ModelConfig) -> None:
    drafting = scheduler(model, DRAFTING, drafts=4)
    drafting.add_request(unlike("chat", 300, 20))
    step = drafting.schedule()
    output = ModelRunnerOutput(req_ids=["chat"], req_id_to_index={"chat": 0}, sampled_token_ids=[[7]])
    runner = SimpleNamespace(take_draft_token_ids=lambda: DraftTokenIds(["chat", "gone"], [[8, 9], [1]]))
    came = pickle.loads(pickle.dumps(with_drafts(output, runner)))  # as from another process
    drafting.update_from_output(step, came)
    step = drafting.schedule()
    assert step.scheduled_spec_decode_tokens == {"chat": [8, 9]}
    assert step.num_scheduled_tokens == {"chat": 3}
    output.sampled_token_ids, output.galley_drafts = [[8, 5]], None  # one of the two held, and nothing new
    drafting.update_from_output(step, output)
    assert drafting.schedule().num_scheduled_tokens == {"chat": 1}


def test_only_engines_whose_drafts_come_with_steps_are_not_asked(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = scheduler(model, DRAFTING, drafts=4).vllm_config
    other = scheduler(model, PluginOptions(), drafts=4).vllm_config
    kind: Any = Executor.get_class(ours)
    asked = []
    monkeypatch.setattr(kind, "take_draft_token_ids", asked.append)
    stop_asking(ours)
    stop_asking(ours)
    for config in (ours, other):
        executor = object.__new__(kind)
        executor.vllm_config = config
        executor.take_draft_token_ids()
    assert [executor.vllm_config for executor in asked] == [other]
