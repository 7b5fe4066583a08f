from __future__ import annotations

from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from galley_plugins.memory.frontend import validate_requests


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What reaches vLLM's own check, which is put back afterwards."""
    found: list[Any] = []
    monkeypatch.setattr(SamplingParams, "verify", lambda self, *given: found.append(given))
    return found


def test_requests_that_are_right_reach_vllms_own_check(seen: list[Any]) -> None:
    validate_requests({"wiki": 0.25})
    SamplingParams(extra_args={"memory_weight.wiki": 0.5}).verify("model", None)
    SamplingParams().verify("model", None)
    assert seen == [("model", None)] * 2


@pytest.mark.parametrize(
    ("configured", "extra"), [({"wiki": 0.25}, {"memory_weight": 3}), ({}, {"memory_weight": 0.5})]
)
def test_wrong_ones_are_the_clients_error(
    seen: list[Any], configured: dict[str, float], extra: dict[str, Any]
) -> None:
    validate_requests(configured)
    with pytest.raises(VLLMValidationError, match=r"memory_weight: found .*, expected") as caught:
        SamplingParams(extra_args=extra).verify("model", None)
    assert caught.value.parameter == "vllm_xargs"
    assert not seen
