"""Thin adapters that give vLLM's two model runners, V1 and V2, the same extra abilities."""
