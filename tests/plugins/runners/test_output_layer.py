from __future__ import annotations

from typing import Any

import pytest
import torch

from galley_plugins.runners.output_layer import OutputLayer


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.calls = 0

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.head(hidden_states)


@pytest.fixture
def model() -> Model:
    return Model()


def test_logits_are_the_models_own_where_somebody_looks_at_them(model: Model) -> None:
    states = torch.randn(3, 4)
    expected = model.head(states)
    OutputLayer(model, 10)
    assert torch.equal(model.compute_logits(states), expected)


def test_a_step_that_only_embeds_computes_none(model: Model) -> None:
    layer = OutputLayer(model, 10)
    layer.needed = False
    for rows in (2, 5, 3):
        logits = model.compute_logits(torch.randn(rows, 4))
        assert logits.shape == (rows, 10)
        assert logits.dtype == torch.float32
        assert not logits.any()
    assert model.calls == 0


@pytest.mark.parametrize(
    ("rows", "needed"), [(("e", "f"), False), (("e", "c"), True), (("c",), True), ((), True)]
)
def test_the_runner_leaves_it_out_only_where_every_row_is_an_embedding(
    rows: tuple[str, ...], needed: bool, model: Model, runner_of: Any, step: Any, embedding: Any, chat: Any,
    prompts: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    runner = runner_of("v1")
    runner.output_layer = layer = OutputLayer(model, 10)
    new = [embedding(name, 2) if name in "ef" else chat(name, 2) for name in rows]
    seen = []

    def prepare(self: Any) -> None:
        self._begin_output_layer()
        seen.append(layer.needed)

    monkeypatch.setattr(type(runner), "before_sampling", prepare)
    runner.run(step([(name, prompts.rows(2), 0) for name in rows], new=new))
    assert seen == [needed]
    assert layer.needed  # whoever pools through it, or drafts with it, gets logits
