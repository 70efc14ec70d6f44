"""Embeddings of this project's documents by a served model, and the passages that are nearest to a question.

    lattice run examples/embeddings/main.py ["a question"]

The model is a service with up to two instances, which start when the tasks need them. Each file is a task, which sends
its passages to the model in batches. A budget bounds the requests of all tasks together.
"""

import json
import re
import sys
import urllib.request
from pathlib import Path

from lattice_client import LatticeClient, context, task

ROOT = Path(__file__).resolve().parent.parent.parent
SERVER = Path(__file__).resolve().parent / "server.py"
QUESTION = "What happens when a user's function crashes its process?"
BATCH = 64


@task(cpu=0.25)
def split(path: str) -> list[dict]:
    """Cut a document into its paragraphs."""
    texts = (" ".join(text.split()) for text in re.split(r"\n\s*\n", Path(path).read_text()))
    return [{"path": path, "text": text} for text in texts if len(text) > 80]


@task(cpu=0.25, needs_llm="embedder")
def embed(texts: list[str]) -> list[list[float]]:
    """Return one vector for each text."""
    model = context.llm("embedder")
    headers = {"authorization": f"Bearer {model.api_key}", "content-type": "application/json"}
    vectors = []
    for begin in range(0, len(texts), BATCH):
        body = json.dumps({"model": model.model, "input": texts[begin : begin + BATCH]}).encode()
        request = urllib.request.Request(f"{model.base_url}/embeddings", body, headers)
        with urllib.request.urlopen(request) as answer:
            vectors += [found["embedding"] for found in json.load(answer)["data"]]
    return vectors


@task(cpu=0.25)
def texts_of(passages: list[dict]) -> list[str]:
    """Return the texts of passages."""
    return [passage["text"] for passage in passages]


@task(cpu=0.25)
def nearest(passages: list[list[dict]], vectors: list[list], question: list, count: int) -> list[dict]:
    """Return the passages whose vectors are nearest to that of the question."""
    flat = [passage for file in passages for passage in file]
    scores = [sum(map(float.__mul__, vector, question[0])) for file in vectors for vector in file]
    best = sorted(range(len(flat)), key=scores.__getitem__, reverse=True)[:count]
    return [{**flat[number], "score": scores[number]} for number in best]


def main() -> None:
    question = " ".join(sys.argv[1:]) or QUESTION
    files = sorted(ROOT.glob("docs/*.md"))
    with LatticeClient() as client:
        client.llm.start(
            "embedder",
            command=[sys.executable, str(SERVER), "{host}", "{port}"],
            cpu=0.25,
            replicas=0,
            max_replicas=2,
            concurrency=2,
            requests_per_minute=6000,
            limit_window=1,
            wait=False,
        )
        workflow = client.create_workflow("embeddings")
        passages = [workflow.add_task(split, {"path": str(path)}) for path in files]
        texts = [workflow.add_task(texts_of, {"passages": part.output}) for part in passages]
        vectors = [workflow.add_task(embed, {"texts": part.output}) for part in texts]
        asked = workflow.add_task(embed, {"texts": [question]})
        inputs = {"passages": [part.output for part in passages], "vectors": [part.output for part in vectors]}
        workflow.add_task(nearest, {**inputs, "question": asked.output, "count": 3})
        found = workflow.run().result()["result"]
        use = client.services.get("embedder").budget_use
        client.llm.stop("embedder")
    print(f"{question}   ({len(files)} files, {use.permitted} requests)")
    for passage in found:
        print(f"\n{passage['score']:.2f}  {Path(passage['path']).relative_to(ROOT)}")
        print(f"      {passage['text'][:300]}")


if __name__ == "__main__":
    main()
