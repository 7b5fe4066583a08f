"""Models by name: turns what the configuration calls `weights` into something that vLLM can load."""

from galley_plugins.models.builtin import engine_options, resolve
from galley_plugins.models.errors import ModelError

__all__ = ["ModelError", "engine_options", "resolve"]
