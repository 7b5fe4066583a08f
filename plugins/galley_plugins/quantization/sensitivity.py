"""What errors of weights cost, by text that the model writes itself.

A model's own text becomes less likely by about F d^2 / 2 nats where a weight is off by d, F being the mean
square of the gradient that its log-likelihood has there: the Fisher information, by which SqueezeLLM (arXiv
2306.07629, section 4) weighs weights too. For the weight from input i to output o that is E[(g_o x_i)^2],
kept as E[g_o^2] E[x_i^2], two vectors a matrix (K-FAC, arXiv 1503.05671, section 3). Text sampled from the
model, from its first token on, is what the definition asks for; as calibration data it was proposed in arXiv
2410.17170. No data comes from outside.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from galley_plugins.quantization.comparison import load
from galley_plugins.quantization.source import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

TEXTS, TEXT_TOKENS, SEED = 48, 128, 0
TEXTS_AT_ONCE = 4  # whose gradients are held together


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Of one matrix.

    Attributes:
        inputs: float32 [input], mean squares of what enters.
        outputs: float32 [output], mean squares of the gradient of the log-likelihood at what leaves.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor

    def costs(self, errors: torch.Tensor) -> torch.Tensor:
        """float32 [output, input]: what errors of weights cost, in nats a token."""
        return errors.square() * (self.inputs / 2) * self.outputs[:, None]


def sensitivities(
    folder: Path,
    modules: Sequence[str],
    kept: Path,
    *,
    started: Callable[[str, int], None] | None = None,
    advance: Callable[[], None] | None = None,
) -> dict[str, Sensitivity]:
    """Of the linear maps of the model in a folder, by their names.

    Holds the model in float32. What is found is kept in a file, by which a run that was stopped goes on.

    Args:
        kept: the file; written if need be, and again where it belongs to other weights.
        started: told of each stage, and how many steps it takes.
        advance: told of each step that is done.

    Raises:
        CheckpointError: as `comparison.load`.
        ValueError: transformers' model has no such linear map, or knows no token to begin with.
    """
    model = None
    with Source(folder) as source:
        mark = hashlib.sha256(
            json.dumps([source.files(), sorted(modules), TEXTS, TEXT_TOKENS, SEED]).encode()
        ).hexdigest()
    found = _read(kept, mark)
    if "text" not in found:
        model = load(folder).model
        if started is not None:
            started("writing text", TEXT_TOKENS - 1)
        found["text"] = own_text(model, advance=advance)
        _write(kept, mark, found)
    if len(found) == 1:
        model = load(folder).model if model is None else model
        if started is not None:
            started("weighing errors", -(-TEXTS // TEXTS_AT_ONCE))
        for name, each in measure(model, found["text"], modules, advance=advance).items():
            found |= {f"{name}.inputs": each.inputs, f"{name}.outputs": each.outputs}
        _write(kept, mark, found)
    return {name: Sensitivity(found[f"{name}.inputs"], found[f"{name}.outputs"]) for name in modules}


@torch.no_grad()
def own_text(
    model: Any,
    *,
    texts: int = TEXTS,
    tokens: int = TEXT_TOKENS,
    seed: int = SEED,
    advance: Callable[[], None] | None = None,
) -> torch.Tensor:
    """int64 [texts, tokens] sampled from the model as it is, the first token given.

    Args:
        model: of transformers.
        advance: told of each token of all texts.

    Raises:
        ValueError: the model's configuration names no token to begin with, or its logits are not finite.
    """
    settings = model.generation_config
    first = settings.bos_token_id if settings.bos_token_id is not None else settings.eos_token_id
    first = first[0] if isinstance(first, list) else first
    if first is None:
        raise ValueError("found neither bos_token_id nor eos_token_id, expected a token to begin text with")
    generator = torch.Generator().manual_seed(seed)
    last, cache = torch.full((texts, 1), first), None
    written = [last]
    for _ in range(tokens - 1):
        step = model(last.to(model.device), past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        shares = step.logits[:, -1].float().softmax(-1).cpu()
        if not torch.isfinite(shares).all():
            raise ValueError("found logits that are not finite, expected a model that writes text")
        last = torch.multinomial(shares, 1, generator=generator)
        written.append(last)
        if advance is not None:
            advance()
    return torch.cat(written, 1)


def measure(
    model: Any, text: torch.Tensor, modules: Sequence[str], *, advance: Callable[[], None] | None = None
) -> dict[str, Sensitivity]:
    """Sensitivities by text; the model's parameters take no gradients afterwards.

    Args:
        model: of transformers.
        text: int64 [texts, tokens].
        modules: names of linear maps.
        advance: told of each few texts.

    Raises:
        ValueError: the model has no such linear map, or text has gradients that are not finite.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if unknown := [name for name in modules if name not in linear]:
        raise ValueError(
            f"{unknown[0]}: {type(model).__name__} of transformers has no such linear map, expected one to "
            "calibrate; keep it as it is"
        )
    inputs = {name: torch.zeros(linear[name].in_features, device=model.device) for name in modules}
    outputs = {name: torch.zeros(linear[name].out_features, device=model.device) for name in modules}

    def add(total: torch.Tensor, found: torch.Tensor) -> None:
        total += found.flatten(0, -2).square().sum(0)

    def look(name: str) -> Callable[..., None]:
        def hook(_: Any, arguments: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
            add(inputs[name], arguments[0].detach())
            result.register_hook(partial(add, outputs[name]))

        return hook

    model.requires_grad_(False)
    hooks = [linear[name].register_forward_hook(look(name)) for name in modules]
    embeddings = model.get_input_embeddings()
    hooks.append(embeddings.register_forward_hook(lambda *found: found[-1].requires_grad_()))
    try:
        for some in text.to(model.device).split(TEXTS_AT_ONCE):
            logits = model(some, use_cache=False).logits[:, :-1].float()
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), some[:, 1:].flatten(), reduction="sum"
            ).backward()
            if advance is not None:
                advance()
    finally:
        for each in hooks:
            each.remove()
    count = text.numel()
    made = {
        name: Sensitivity((inputs[name] / count).cpu(), (outputs[name] / count).cpu()) for name in modules
    }
    for name, each in made.items():
        if not (torch.isfinite(each.inputs).all() and torch.isfinite(each.outputs).all()):
            raise ValueError(f"{name}: found gradients that are not finite, expected numbers")
    return made


def _read(path: Path, mark: str) -> dict[str, torch.Tensor]:
    """What is kept of the same weights; nothing where there is none, or a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("mark") == mark:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (OSError, SafetensorError):
        pass
    return {}


def _write(path: Path, mark: str, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    save_file(tensors, new, {"mark": mark})
    new.replace(path)
