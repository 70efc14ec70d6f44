"""Retrieval for a language model: split documents, embed passages, index vectors, find passages for a question.

    lattice run examples/rag/main.py ["a question"]

Each file is split and embedded on its own, side by side with the others. The vectors are hashed counts of word
beginnings, made by scikit-learn without a model to download; to use a model, replace `embed`. They are sparse arrays
and travel between tasks as such.
"""

import re
import sys
from pathlib import Path

import scipy.sparse
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from lattice_client import LatticeClient, task

ROOT = Path(__file__).resolve().parent.parent.parent
PATTERNS = ("*.md", "docs/**/*.md", "proto/**/*.proto")
QUESTION = "What happens when a user's function crashes its process?"
PASSAGE_CHARACTERS = 200


@task
def split(path: str) -> list[dict]:
    """Cut a document, or the comments of a .proto file, into passages, each with the line it begins at."""
    passages = [{"path": path, "line": 1, "text": ""}]
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        text = line.strip() if path.endswith(".md") else "".join(re.findall(r"//\s*(.*)", line))
        if not text and len(passages[-1]["text"]) > PASSAGE_CHARACTERS:
            passages.append({"path": path, "line": number + 1, "text": ""})
        passages[-1]["text"] += f"{text} " if text else ""
    return [passage for passage in passages if passage["text"]]


@task
def embed(passages: list[dict]) -> scipy.sparse.csr_matrix:
    """Return one vector for each passage. Words count by their first five letters: `crash` and `crashed` are one."""
    vectorizer = HashingVectorizer(token_pattern=r"\b[a-z]{3,5}", stop_words="english", alternate_sign=False, norm=None)
    return vectorizer.transform([passage["text"] for passage in passages])


@task
def index(vectors: list[scipy.sparse.csr_matrix]) -> tuple:
    """Stack the vectors and weigh rare words up; returns the weights too, for the question."""
    counts = scipy.sparse.vstack(vectors)
    weights = TfidfTransformer(sublinear_tf=True).fit(counts)
    return weights, weights.transform(counts)


@task
def retrieve(passages: list[list[dict]], indexed: tuple, question: scipy.sparse.csr_matrix, count: int) -> list[dict]:
    """Return the passages whose vectors are nearest to the question's."""
    weights, vectors = indexed
    scores = (vectors @ weights.transform(question).T).toarray().ravel()
    flat = [passage for file in passages for passage in file]
    return [{**flat[number], "score": float(scores[number])} for number in scores.argsort()[::-1][:count]]


def main() -> None:
    question = " ".join(sys.argv[1:]) or QUESTION
    files = sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern)})
    with LatticeClient() as client:
        workflow = client.create_workflow("rag")
        passages = [workflow.add_task(split, {"path": str(path)}) for path in files]
        vectors = [workflow.add_task(embed, {"passages": part.output}) for part in passages]
        indexed = workflow.add_task(index, {"vectors": [part.output for part in vectors]})
        asked = workflow.add_task(embed, {"passages": [{"text": question}]})
        inputs = {"passages": [part.output for part in passages], "indexed": indexed.output, "count": 3}
        workflow.add_task(retrieve, {**inputs, "question": asked.output})
        found = workflow.run().result()["result"]
    print(f"{question}   ({len(files)} files)")
    for passage in found:
        print(f"\n{passage['score']:.2f}  {Path(passage['path']).relative_to(ROOT)}:{passage['line']}")
        print(f"      {passage['text'][:300]}")


if __name__ == "__main__":
    main()
