"""How good a model's vectors are: similarity, retrieval and classification, through a running server."""
