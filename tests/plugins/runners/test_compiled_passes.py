from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from galley_plugins.runners.compiled_passes import loading_compiled

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A function that inductor compiled, as vLLM saves one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))

    def twice_the_sine(x: torch.Tensor) -> torch.Tensor:
        return 2 * torch.sin(x)

    with torch._dynamo.config.patch(enable_aot_compile=True):  # type: ignore[attr-defined]
        made: Any = torch.compile(
            twice_the_sine,
            fullgraph=True,
            options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
        )
        made.aot_compile(((torch.ones(3),), {})).save_compiled_function(str(tmp_path / "model"))
    return tmp_path / "model"


def test_a_pass_of_inductor_is_loaded_with_what_vllm_asks_of_it(saved: Path) -> None:
    load = torch.compiler.load_compiled_function
    with loading_compiled(), saved.open("rb") as file:
        loaded: Any = torch.compiler.load_compiled_function(file)
    assert loaded._artifacts.compiled_fn.finalize_loading(None) is None
    x = torch.tensor([0.0, 0.5, -2.0])
    torch.testing.assert_close(loaded(x), 2 * torch.sin(x))
    assert torch.compiler.load_compiled_function is load


def test_a_pass_that_has_a_way_to_finish_loading_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[Any] = []

    class Pass:
        finalize_loading = finished.append

    class Loaded:
        class _artifacts:  # noqa: N801
            compiled_fn = Pass

    monkeypatch.setattr(torch.compiler, "load_compiled_function", lambda *args, **kwargs: Loaded)
    with loading_compiled():
        loaded: Any = torch.compiler.load_compiled_function(None)  # type: ignore[arg-type]
    loaded._artifacts.compiled_fn.finalize_loading("config")
    assert finished == ["config"]
