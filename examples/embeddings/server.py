"""A small server of embeddings in the API of OpenAI: `python server.py HOST PORT`.

Its vectors are hashed counts of word beginnings, made by scikit-learn without a model to download. A model takes the
place of `VECTORIZER`.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sklearn.feature_extraction.text import HashingVectorizer

VECTORIZER = HashingVectorizer(
    n_features=512, token_pattern=r"\b[a-z]{3,5}", stop_words="english", alternate_sign=False, norm="l2"
)


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """List the only model; this is the health check."""
        self._answer(200, {"object": "list", "data": [{"id": "hashed-words", "object": "model"}]})

    def do_POST(self) -> None:
        """Embed a text or a list of texts."""
        try:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            texts = [body["input"]] if isinstance(body["input"], str) else [str(text) for text in body["input"]]
        except (KeyError, TypeError, ValueError) as error:
            message = f"the body needs an input: {error!r}"
            self._answer(400, {"error": {"message": message, "type": "invalid_request_error"}})
            return
        vectors = VECTORIZER.transform(texts).toarray()
        data = [
            {"object": "embedding", "index": number, "embedding": vector.round(4).tolist()}
            for number, vector in enumerate(vectors)
        ]
        words = sum(len(text.split()) for text in texts)
        usage = {"prompt_tokens": words, "total_tokens": words}
        self._answer(200, {"object": "list", "model": body.get("model"), "data": data, "usage": usage})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Write no line for each request."""


if __name__ == "__main__":
    host, port = sys.argv[1:]
    print("the model is loaded", flush=True)
    ThreadingHTTPServer((host, int(port)), Handler).serve_forever()
