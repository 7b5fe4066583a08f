"""Training the methods that bring an adapter: `galley embed train gem|causal2vec|nv-embed`."""
