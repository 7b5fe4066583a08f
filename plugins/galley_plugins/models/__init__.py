"""Models by name: turns what the configuration calls `weights` into something that vLLM can load."""

from galley_plugins.models.builtin import resolve
from galley_plugins.models.errors import ModelError

__all__ = ["ModelError", "resolve"]
