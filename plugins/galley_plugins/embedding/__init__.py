"""Vectors from hidden states: pooling that knows neither runner nor scheduler."""
