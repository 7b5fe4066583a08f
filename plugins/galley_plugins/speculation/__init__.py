"""Draft-verify speculation without a draft model: drafters, and how they meet vLLM's runners."""
