"""Prompts and texts that the end-to-end tests share."""

PROMPTS = [
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one sentence about the sea.",
    "Count from one to ten.",
    "Why is the sky blue? Answer briefly.",
    "Translate 'good morning' into Spanish.",
    "List two uses of iron.",
    "Give a synonym of 'fast'.",
]

SHORT_TEXTS = [
    "A galley proof is checked before it is printed.",
    "Paris is the capital of France.",
    "The stock market fell sharply on Monday.",
    "def add(a, b): return a + b",
]


def long_text(words: int, seed: int = 0) -> str:
    """`words` distinct words of about five tokens each."""
    return " ".join(f"item{(index * 7 + seed) % 9973}" for index in range(words))
