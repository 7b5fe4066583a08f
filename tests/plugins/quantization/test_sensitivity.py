"""What errors cost, beside gradients of transformers' own model and beside what errors do to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from galley_plugins.quantization import sensitivity
from galley_plugins.quantization.sensitivity import measure, own_text, sensitivities
from tests.support.small_llama import small_llama

if TYPE_CHECKING:
    from pathlib import Path

MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]


@pytest.fixture
def model() -> Any:
    return small_llama()


def test_text_is_sampled_from_the_model(model: Any) -> None:
    text = own_text(model, texts=3000, tokens=3, seed=4)
    assert text.shape == (3000, 3)
    assert (text[:, 0] == model.generation_config.bos_token_id).all()
    with torch.inference_mode():
        first = model(text[:1, :1]).logits[0, -1].softmax(-1)
        likely = int(first.argmax())
        second = model(torch.tensor([[int(text[0, 0]), likely]])).logits[0, -1].softmax(-1)
    share = torch.bincount(text[:, 1], minlength=len(first)) / 3000
    assert (share - first).abs().max() < 4 * float((first * (1 - first) / 3000).sqrt().max())
    after = text[text[:, 1] == likely, 2]
    share = torch.bincount(after, minlength=len(second)) / len(after)
    assert (share - second).abs().max() < 4 * float((second * (1 - second) / len(after)).sqrt().max())
    assert torch.equal(own_text(model, texts=3000, tokens=3, seed=4), text)
    assert not torch.equal(own_text(model, texts=3000, tokens=3, seed=5), text)


def test_without_a_first_token_the_ends_is_taken_and_without_both_it_is_refused(model: Any) -> None:
    model.generation_config.bos_token_id = None
    model.generation_config.eos_token_id = [7, 8]
    assert (own_text(model, texts=2, tokens=2)[:, 0] == 7).all()
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="found neither bos_token_id nor eos_token_id"):
        own_text(model, texts=2, tokens=2)


def test_of_one_predicted_token_they_are_the_squares_of_its_weights_gradients(model: Any) -> None:
    """Of two tokens the first alone predicts: a weight's gradient is one input times one output's."""
    text = torch.tensor([[1, 17]])
    gradients = {}
    model(text, labels=text).loss.backward()
    for name in MODULES:
        gradients[name] = model.get_submodule(name).weight.grad.clone()
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: inputs.__setitem__(name, arguments[0].detach()[0])
        )
        for name in MODULES
    ]
    model(text)
    for hook in hooks:
        hook.remove()
    found = measure(model, text, MODULES)
    for name in MODULES:
        known, entered = found[name], inputs[name]
        assert torch.allclose(known.inputs, entered.square().mean(0), rtol=1e-4)
        expected = gradients[name].square()  # [output, input]
        assert torch.allclose(
            2 * known.outputs[:, None] * entered[0].square(), expected, rtol=1e-3, atol=1e-9 * expected.max()
        )


def test_they_are_means_over_texts_and_tokens(model: Any) -> None:
    text = own_text(model, texts=6, tokens=9)
    whole = measure(model, text, MODULES)
    each = [measure(model, row[None], MODULES) for row in text]
    for name in MODULES:
        for part in ("inputs", "outputs"):
            mean = torch.stack([getattr(one[name], part) for one in each]).mean(0)
            assert torch.allclose(getattr(whole[name], part), mean, rtol=1e-4)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"])
def test_errors_cost_the_divergence_that_is_foretold(model: Any, name: str) -> None:
    """Kullback-Leibler divergence from the model with small random errors, by its definition."""
    text = own_text(model, texts=64, tokens=24)
    weight = model.get_submodule(name).weight
    known = measure(model, text, [name])[name]
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        before = model(text).logits[:, :-1].double().log_softmax(-1)
        kept, actual, foretold = weight.clone(), 0.0, 0.0
        for _ in range(8):
            errors = 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
            weight.copy_(kept + errors)
            after = model(text).logits[:, :-1].double().log_softmax(-1)
            actual += float((before.exp() * (before - after)).sum()) / text.numel()
            foretold += float(known.costs(errors).sum())
        weight.copy_(kept)
    assert actual == pytest.approx(foretold, rel=0.35)


def test_a_map_that_transformers_has_not_is_named(model: Any) -> None:
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.w1: LlamaForCausalLM of transformers has no such"
    ):
        measure(model, torch.tensor([[1, 2]]), ["model.layers.0.w1"])


def test_gradients_that_overflow_are_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**small_llama().config.to_diff_dict())).eval()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(ValueError, match="found gradients that are not finite"):
        measure(model, torch.tensor([[1, 2, 3]]), MODULES)
    with pytest.raises(ValueError, match="found logits that are not finite"):
        own_text(model, texts=2, tokens=2)


@pytest.fixture
def folder(tmp_path: Path, model: Any) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_what_was_found_is_kept_for_a_run_that_was_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, stages = tmp_path / "kept", []

    def run() -> Any:
        stages.clear()
        return sensitivities(folder, MODULES, kept, started=lambda stage, _: stages.append(stage))

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sensitivity, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert load_file(kept).keys() == {"text"}
    found = run()
    assert stages == ["weighing errors"]
    again = run()
    assert stages == []
    for name in MODULES:
        assert torch.equal(found[name].inputs, again[name].inputs)
        assert torch.equal(found[name].outputs, again[name].outputs)
    kept.write_bytes(kept.read_bytes()[:100])
    run()
    assert stages == ["writing text", "weighing errors"]
    small_llama(seed=9).save_pretrained(folder)
    run()
    assert stages == ["writing text", "weighing errors"]
    assert not list(tmp_path.glob("*.new"))
