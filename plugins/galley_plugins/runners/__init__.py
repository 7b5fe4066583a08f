"""Thin adapters that give vLLM's two model runners the same extra abilities; V1 and V2 stand beside each other."""
