from __future__ import annotations

import pytest
import torch

from galley_plugins.embedding.latent_attention import PREFIX, LatentAttention
from loadtest import reference

SIZE, LATENTS, HEADS = 24, 10, 4

# The public checkpoint's names, with its sizes d = 4096, 512 latents, 8 heads of 4096 shrunken.
SHAPES = {
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


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Of a layer's usual size: larger scores make a softmax that magnifies float32's rounding."""
    generator = torch.Generator().manual_seed(3)
    return {
        PREFIX + name: torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 1)
        for name, shape in SHAPES.items()
    }


def test_names_and_shapes_are_the_public_checkpoints() -> None:
    found = {
        name: tuple(tensor.shape)
        for name, tensor in LatentAttention(SIZE, LATENTS, HEADS).state_dict().items()
    }
    assert found == SHAPES


def test_it_computes_what_the_paper_describes_folded_or_not(tensors: dict[str, torch.Tensor]) -> None:
    rows = torch.randn(7, SIZE, generator=torch.Generator().manual_seed(4))
    expected = reference.latent_attention(rows, tensors, HEADS)
    head = LatentAttention.from_tensors(tensors, HEADS)
    torch.testing.assert_close(head(rows), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.fold()(rows), expected, rtol=1e-4, atol=1e-4)


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(tensors: dict[str, torch.Tensor]) -> None:
    short = dict(tensors)
    del short[f"{PREFIX}cross_attend_blocks.1.fn.net.2.bias"]
    with pytest.raises(ValueError, match=r"cross_attend_blocks\.1\.fn\.net\.2\.bias"):
        LatentAttention.from_tensors(short, HEADS)
    del short[f"{PREFIX}latents"]
    with pytest.raises(ValueError, match=r"found no tensor latent_attention_model\.latents"):
        LatentAttention.from_tensors(short, HEADS)
    tensors[f"{PREFIX}cross_attend_blocks.0.fn.to_out.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="to_out"):
        LatentAttention.from_tensors(tensors, HEADS)
