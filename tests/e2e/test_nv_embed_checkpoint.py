"""NV-Embed's public checkpoint, shrunken: the same names and settings, random weights, no code of its own."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, MistralConfig, MistralModel

from galley_plugins.models import resolve
from loadtest import reference
from loadtest.servers import FLOAT32, MODEL, NAME, galley_worker

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

SIZE, LATENTS, HEADS = 128, 16, 8
TEXT = {
    "hidden_size": SIZE,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 49_152,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
HEAD = {
    "latents": (LATENTS, SIZE),
    "cross_attend_blocks.0.norm.weight": (SIZE,),
    "cross_attend_blocks.0.norm.bias": (SIZE,),
    "cross_attend_blocks.0.norm_context.weight": (SIZE,),
    "cross_attend_blocks.0.norm_context.bias": (SIZE,),
    "cross_attend_blocks.0.fn.to_q.weight": (HEADS * SIZE, SIZE),
    "cross_attend_blocks.0.fn.to_kv.weight": (2 * HEADS * SIZE, SIZE),
    "cross_attend_blocks.0.fn.to_out.weight": (SIZE, HEADS * SIZE),
    "cross_attend_blocks.1.norm.weight": (SIZE,),
    "cross_attend_blocks.1.norm.bias": (SIZE,),
    "cross_attend_blocks.1.fn.net.0.weight": (8 * SIZE, SIZE),
    "cross_attend_blocks.1.fn.net.0.bias": (8 * SIZE,),
    "cross_attend_blocks.1.fn.net.2.weight": (SIZE, 4 * SIZE),
    "cross_attend_blocks.1.fn.net.2.bias": (SIZE,),
}
SENTENCES = ["A galley proof is checked before it is printed.", "Two men are playing chess.", "It rained."]
INSTRUCTION = "Given a question, retrieve passages that answer it"


def checkpoint(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Write one; gives its decoder in transformers and the tensors of its head."""
    torch.manual_seed(5)
    decoder = MistralModel(MistralConfig(**TEXT)).eval()
    head = {f"latent_attention_model.{name}": 0.2 * torch.randn(shape) for name, shape in HEAD.items()}
    folder.mkdir()
    weights = {f"embedding_model.{name}": tensor for name, tensor in decoder.state_dict().items()}
    save_file({**weights, **head}, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "architectures": ["NVEmbedModel"],
        "auto_map": {"AutoModel": "modeling_nvembed.NVEmbedModel"},
        "model_type": "nvembed",
        "add_eos": True,
        "is_mask_instruction": True,
        "mask_type": "b",
        "padding_side": "right",
        "hidden_size": SIZE,
        "latent_attention_config": {"model_type": "latent_attention"},
        "text_config": {"architectures": ["MistralModel"], "model_type": "bidir_mistral", **TEXT},
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    for path in resolve(MODEL).glob("*token*"):
        shutil.copy(path, folder)
    return decoder, head


@torch.no_grad()
def expected(
    decoder: Any, head: dict[str, torch.Tensor], tokenizer: Any, text: str, before: str
) -> torch.Tensor:
    """Bidirectional decoder, latent attention, mean over all but the instruction; the text ends with its end."""
    # The space before the text is part of its first token.
    skipped = len(tokenizer(before.rstrip())["input_ids"]) if before else 0
    ids = [*tokenizer(before + text)["input_ids"], tokenizer.eos_token_id]
    mask = torch.zeros(1, 1, len(ids), len(ids))
    rows = decoder(torch.tensor([ids]), attention_mask=mask).last_hidden_state[0]
    vector = reference.latent_attention(rows, head, HEADS)[skipped:].mean(0)
    return torch.nn.functional.normalize(vector, dim=-1)


def test_it_is_loaded_by_its_names_and_embeds_as_described(tmp_path: Path) -> None:
    folder = tmp_path / "nv-embed"
    decoder, head = checkpoint(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    flags = ("--weights", str(folder), "--tasks", "embed", "--embedding", '{"method": "nv-embed"}')
    with galley_worker({**FLOAT32, "max-num-batched-tokens": 64, "max-num-seqs": 8}, *flags) as server:
        documents = server.embed(SENTENCES)
        queries = server.embed(SENTENCES, instruction=INSTRUCTION)
        assert server.client.get("/v1/models").json()["data"][0]["id"] == NAME
    for text, document, query in zip(SENTENCES, documents, queries, strict=True):
        assert reference.cosine(document, expected(decoder, head, tokenizer, text, "")) > 0.9999
        before = f"Instruct: {INSTRUCTION}\nQuery: "
        assert reference.cosine(query, expected(decoder, head, tokenizer, text, before)) > 0.9999
    assert documents != queries
