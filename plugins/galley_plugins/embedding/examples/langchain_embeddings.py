"""LangChain's vector stores over a running Galley server: find the texts that answer a question.

    pip install langchain-openai
    python langchain_embeddings.py "Who repaired the station clock?" --model smollm2

`check_embedding_ctx_length=False` must not be left out. Without it, `OpenAIEmbeddings` cuts texts into
tokens of an OpenAI model and sends their ids. Galley takes token ids too, but those of the model that it
serves: the same numbers are other words there, or none at all. With it, texts are sent as texts; the server
tokenizes them and, with `truncate`, cuts one that is too long.

The other settings that are right for long texts: `tiktoken_enabled=False`, `tiktoken_model_name` the served
model's folder or hub id, `embedding_ctx_length` the most tokens that the server takes. A text is then
embedded in pieces, still sent as text, and their vectors are averaged; it needs `transformers`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import openai
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings

TEXTS = [
    "The lighthouse at Norr Point was built of granite in 1871.",
    "In March the watchmaker Ida Brandt repaired the clock of the railway station.",
    "The ferry to the island runs twice a day and takes bicycles.",
    "The baker on Mill Street starts his ovens at three in the morning.",
]


class GalleyEmbeddings(OpenAIEmbeddings):
    """Tells the server whether a text is a query or a document, for which it may have instructions."""

    def embed_documents(
        self, texts: list[str], chunk_size: int | None = None, **kwargs: Any
    ) -> list[list[float]]:
        fields = {"extra_body": {"input_type": "document", "truncate": True}, **kwargs}
        return super().embed_documents(texts, chunk_size, **fields)

    def embed_query(self, text: str, **kwargs: Any) -> list[float]:
        fields = {"extra_body": {"input_type": "query", "truncate": True}, **kwargs}
        return super().embed_query(text, **fields)


def main() -> None:
    parser = argparse.ArgumentParser(description="Find the texts that answer a question, with LangChain.")
    parser.add_argument("question")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="default: %(default)s")
    parser.add_argument(
        "--model", default="smollm2", help="a model that the server serves; default: %(default)s"
    )
    parser.add_argument("--key", default="none", help="an API key, if the server asks for one")
    options = parser.parse_args()
    embeddings = GalleyEmbeddings(
        model=options.model,
        base_url=options.base_url,
        api_key=options.key,
        check_embedding_ctx_length=False,
        chunk_size=64,  # texts of a request
    )
    store = InMemoryVectorStore(embeddings)
    try:
        store.add_texts(TEXTS)
        for document, score in store.similarity_search_with_score(options.question, k=2):
            print(f"{score:.3f}  {document.page_content}")
    except openai.OpenAIError as error:
        sys.exit(f"error: {options.base_url}: {error}")


if __name__ == "__main__":
    main()
