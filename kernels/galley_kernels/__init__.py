"""Tensor operations for the hot paths: one contract each, a readable reference and fast implementations."""
