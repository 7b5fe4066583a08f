"""Answer a question from texts: one Galley server embeds them and writes the answer, Qdrant finds them.

    pip install openai qdrant-client
    python rag.py "Who repaired the station clock?" --model smollm2
    python rag.py "How long is the warranty?" --folder manuals --store index   # indexes a folder
    python rag.py "Who pays for shipping?" --store index                       # asks the same index again

Paragraphs are embedded as documents and kept in Qdrant, which runs within this process, in memory or in a
folder, one collection for each model. The question is embedded as a query, and the chat model reads the
paragraphs that are nearest to it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import openai
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams

BATCH = 64  # texts of a request
ENDINGS = (".txt", ".md")
PARAGRAPHS = {
    "lighthouse": "The lighthouse at Norr Point was built of granite in 1871. It is 34 metres high.",
    "clock": "In March the watchmaker Ida Brandt repaired the clock of the railway station.",
    "ferry": "The ferry to the island runs twice a day and takes bicycles, but no cars.",
    "bakery": "The baker on Mill Street starts his ovens at three in the morning.",
}
RULES = "Answer the question in one sentence, from these paragraphs:"


class Rag:
    """Texts in a vector store, and a server that embeds them and answers."""

    def __init__(self, server: openai.OpenAI, model: str, store: QdrantClient) -> None:
        self._server = server
        self._model = model
        self._store = store
        self._collection = model.replace("/", "--")

    @property
    def is_empty(self) -> bool:
        return not self._store.collection_exists(self._collection)

    def index(self, texts: dict[str, str]) -> None:
        """Embed texts, given by name, as documents; they replace what the store has."""
        names = list(texts)
        vectors: list[list[float]] = []
        for start in range(0, len(names), BATCH):
            vectors += self._embed([texts[name] for name in names[start : start + BATCH]], "document")
        if not self.is_empty:
            self._store.delete_collection(self._collection)
        size = VectorParams(size=len(vectors[0]), distance=Distance.COSINE)
        self._store.create_collection(self._collection, vectors_config=size)
        points = [
            PointStruct(id=place, vector=vector, payload={"name": name, "text": texts[name]})
            for place, (name, vector) in enumerate(zip(names, vectors, strict=True))
        ]
        self._store.upsert(self._collection, points)

    def retrieve(self, question: str, top: int) -> list[tuple[float, str, str]]:
        """Cosine, name and text of the `top` texts nearest to a question, the nearest first."""
        (vector,) = self._embed([question], "query")
        points = self._store.query_points(self._collection, query=vector, limit=top).points
        return [(point.score, point.payload["name"], point.payload["text"]) for point in points]

    def answer(self, question: str, texts: list[str]) -> str:
        """What the chat model says after reading the texts, the last of them right before the question."""
        rules = "\n\n".join([RULES, *texts])
        completion = self._server.chat.completions.create(
            model=self._model,
            messages=[{"role": "system", "content": rules}, {"role": "user", "content": question}],
            temperature=0,
            max_tokens=200,
        )
        return completion.choices[0].message.content or ""

    def _embed(self, texts: list[str], input_type: str) -> list[list[float]]:
        # A text that is too long for the model is cut, not refused.
        fields = {"input_type": input_type, "truncate": True}
        answer = self._server.embeddings.create(model=self._model, input=texts, extra_body=fields)
        return [row.embedding for row in answer.data]


def paragraphs(folder: Path) -> dict[str, str]:
    """The paragraphs of a folder's text files, by file and number; empty lines part them.

    Raises:
        ValueError: there are none.
    """
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in ENDINGS):
        parts = path.read_text(encoding="utf-8").split("\n\n")
        for number, text in enumerate(filter(None, map(str.strip, parts)), 1):
            found[f"{path.relative_to(folder)}:{number}"] = text
    if not found:
        raise ValueError(f"--folder: found no text in {folder}, expected {' or '.join(ENDINGS)} files")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answer a question from texts.")
    parser.add_argument("question")
    parser.add_argument("--folder", type=Path, help="index its .txt and .md files; default: a few of its own")
    parser.add_argument("--store", help="a folder that keeps the index; default: memory")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="default: %(default)s")
    parser.add_argument("--model", default="smollm2", help="it chats and embeds; default: %(default)s")
    parser.add_argument("--key", default="none", help="an API key, if the server asks for one")
    parser.add_argument("--top", type=int, default=2, help="paragraphs to read; default: %(default)s")
    return parser.parse_args()


def main() -> None:
    options = parse()
    server = openai.OpenAI(base_url=options.base_url, api_key=options.key)
    store = QdrantClient(path=options.store) if options.store else QdrantClient(":memory:")
    rag = Rag(server, options.model, store)
    try:
        if options.folder:
            rag.index(paragraphs(options.folder))
        elif rag.is_empty:
            rag.index(PARAGRAPHS)
        found = rag.retrieve(options.question, options.top)
        for score, name, text in found:
            print(f"{score:.3f}  {name}  {text}")
        # The nearest last: small models heed it more there.
        print("\n" + rag.answer(options.question, [text for _, _, text in reversed(found)]))
    except openai.OpenAIError as error:
        sys.exit(f"error: {options.base_url}: {error}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    finally:
        store.close()


if __name__ == "__main__":
    main()
