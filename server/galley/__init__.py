"""Galley: an OpenAI-compatible gateway in front of vLLM workers."""

__version__ = "0.1.0"
