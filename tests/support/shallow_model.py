"""The built-in model's first layers: real weights that run several times as fast, and say nothing sensible.

For tests that compare one engine's answers with another's, whatever they are.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save_file

from galley_plugins.models import resolve
from loadtest.servers import MODEL

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = 8


def make_shallow_model(folder: Path) -> Path:
    """Write the model into an empty folder, which is returned."""
    source = resolve(MODEL)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = LAYERS
    (folder / "config.json").write_text(json.dumps(config))
    with safe_open(source / "model.safetensors", "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys() if _layer_of(name) < LAYERS}  # noqa: SIM118
        save_file(kept, folder / "model.safetensors", metadata=file.metadata())
    return folder


def _layer_of(name: str) -> int:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else 0
