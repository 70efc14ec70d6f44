"""A small server of OpenAI's API, as an engine in tests.

    python openai_server.py HOST PORT [--delay SECONDS] [--fault FAULT]

It answers with the words of the last message, one a chunk, and names its process in `system_fingerprint`. `--fault`
names the fault of every answer: `cut` closes the connection after two words, `silent` ends the stream without a
reason to finish, `abort` finishes with the reason `abort`, `busy` answers with 503.
"""

import argparse
import json
import os
import signal
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    given: argparse.Namespace

    def do_GET(self) -> None:
        """List the only model."""
        self._answer(200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    def do_POST(self) -> None:
        """Answer a request."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.given.fault == "busy":
            self._answer(503, {"error": {"message": "busy"}})
        elif self.path == "/v1/embeddings":
            texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
            data = [{"object": "embedding", "index": i, "embedding": [float(len(t))]} for i, t in enumerate(texts)]
            self._answer(200, {"object": "list", "model": body["model"], "data": data})
        elif body.get("stream"):
            self._stream(self._words(body), body["model"])
        else:
            for _ in self._words(body):
                time.sleep(self.given.delay)
            message = {"role": "assistant", "content": " ".join(self._words(body))}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self._answer(200, self._chunk(body["model"], choice) | {"object": "chat.completion"})

    def _words(self, body: dict[str, Any]) -> list[str]:
        text = body["messages"][-1]["content"] if "messages" in body else str(body.get("input", body.get("prompt")))
        if text == "authorization":
            text = self.headers.get("authorization", "none")
        return str(text).split()

    def _chunk(self, model: str, choice: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": "1",
            "object": "chat.completion.chunk",
            "created": 0,
            "model": model,
            "choices": [choice],
            "system_fingerprint": str(os.getpid()),
        }

    def _stream(self, words: list[str], model: str) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for number, word in enumerate(words):
            if self.given.fault == "cut" and number == 2:
                self.connection.close()
                return
            self._event(self._chunk(model, {"index": 0, "delta": {"content": f"{word} "}, "finish_reason": None}))
            time.sleep(self.given.delay)
        if self.given.fault != "silent":
            reason = "abort" if self.given.fault == "abort" else "stop"
            self._event(self._chunk(model, {"index": 0, "delta": {}, "finish_reason": reason}))
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.flush()

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Write no line for each request."""


class Server(ThreadingHTTPServer):
    """As many connections may wait as for the servers of engines."""

    request_queue_size = 2048
    daemon_threads = True


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--fault", default="", choices=["", "cut", "silent", "abort", "busy"])
    given = Handler.given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    print("the model is loaded", flush=True)
    Server((given.host, given.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
