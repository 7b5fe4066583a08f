"""MLP memory: a trained memory in place of a retriever, from a corpus to a served model."""
