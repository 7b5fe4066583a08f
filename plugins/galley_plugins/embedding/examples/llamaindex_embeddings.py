"""A LlamaIndex index over a running Galley server: find the texts that answer a question.

    pip install llama-index-embeddings-openai-like
    python llamaindex_embeddings.py "Who repaired the station clock?" --model smollm2

`OpenAILikeEmbedding` takes any model's name, where `OpenAIEmbedding` only takes OpenAI's. It sends the same
fields with every text, so that queries and documents, for which the server may have different instructions,
take one object each.
"""

from __future__ import annotations

import argparse
import sys

import openai
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.embeddings.openai_like import OpenAILikeEmbedding

TEXTS = [
    "The lighthouse at Norr Point was built of granite in 1871.",
    "In March the watchmaker Ida Brandt repaired the clock of the railway station.",
    "The ferry to the island runs twice a day and takes bicycles.",
    "The baker on Mill Street starts his ovens at three in the morning.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Find the texts that answer a question, with LlamaIndex.")
    parser.add_argument("question")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="default: %(default)s")
    parser.add_argument(
        "--model", default="smollm2", help="a model that the server serves; default: %(default)s"
    )
    parser.add_argument("--key", default="none", help="an API key, if the server asks for one")
    options = parser.parse_args()

    def embedding(input_type: str) -> OpenAILikeEmbedding:
        return OpenAILikeEmbedding(
            model_name=options.model,
            api_base=options.base_url,
            api_key=options.key,
            embed_batch_size=64,  # texts of a request
            max_retries=2,
            additional_kwargs={"extra_body": {"input_type": input_type, "truncate": True}},
        )

    try:
        nodes = [TextNode(text=text) for text in TEXTS]
        index = VectorStoreIndex(nodes, embed_model=embedding("document"))
        retriever = index.as_retriever(similarity_top_k=2, embed_model=embedding("query"))
        for found in retriever.retrieve(options.question):
            print(f"{found.score:.3f}  {found.text}")
    except openai.OpenAIError as error:
        sys.exit(f"error: {options.base_url}: {error}")


if __name__ == "__main__":
    main()
