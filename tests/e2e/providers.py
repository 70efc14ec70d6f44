"""A provider with limits, as an object of a test or as a program.

python providers.py HOST PORT WINDOW_S REQUESTS
"""

import json
import sys
import threading
import time
from collections import Counter, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Provider(ThreadingHTTPServer):
    """A provider that takes so many requests, and tokens, in any window of time, and refuses the others."""

    request_queue_size = 1024
    daemon_threads = True

    def __init__(
        self,
        window_s: float,
        requests: int,
        tokens: int = 1 << 30,
        delay_s: float = 0.0,
        address: tuple[str, int] = ("127.0.0.1", 0),
    ) -> None:
        super().__init__(address, Handler)
        self.window_s, self.requests, self.tokens, self.delay_s = window_s, requests, tokens, delay_s
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.taken: list[tuple[float, str]] = []
        self.statuses: Counter[int] = Counter()
        self.next_refusals: deque[str] = deque()  # Their `Retry-After`.
        self.elsewhere: int | None = None  # How many requests of a window others use, if it tells what is left.
        self.at_once = self.most_at_once = 0
        self._counted: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()

    def take(self, key: str, tokens: int) -> tuple[int, dict[str, str]]:
        """Count a request; return the status of its answer, and headers."""
        with self._lock:
            now = time.monotonic()
            while self._counted and self._counted[0][0] <= now - self.window_s:
                self._counted.popleft()
            used = sum(count for _, count in self._counted)
            status, headers = 200, {}
            if self.next_refusals:
                status, headers = 429, {"retry-after": self.next_refusals.popleft()}
            elif len(self._counted) >= self.requests - (self.elsewhere or 0) or used + tokens > self.tokens:
                status = 429
            else:
                self._counted.append((now, tokens))
                self.taken.append((now, key))
            if self.elsewhere is not None:
                left = max(0, self.requests - self.elsewhere - len(self._counted))
                headers["x-ratelimit-remaining-requests"] = str(left)
                headers["x-ratelimit-reset-requests"] = f"{self.window_s:g}s"
            self.statuses[status] += 1
            return status, headers

    def count(self, change: int) -> None:
        """Count the requests at one time."""
        with self._lock:
            self.at_once += change
            self.most_at_once = max(self.most_at_once, self.at_once)


class Handler(BaseHTTPRequestHandler):
    """Answers one request with its number of tokens: those of the prompt, and as many as it asks for."""

    protocol_version = "HTTP/1.1"
    server: Provider

    def do_POST(self) -> None:
        """Answer, or refuse."""
        self.server.count(1)
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt, output = len(body["prompt"].split()), body["tokens"]
        status, headers = self.server.take(self.headers["authorization"], prompt + output)
        usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
        choice = {"index": 0, "text": "x", "finish_reason": "stop"}
        answer = {"choices": [choice], "usage": usage} if status == 200 else {"error": {"code": "rate_limit_exceeded"}}
        data = json.dumps(answer).encode()
        time.sleep(self.server.delay_s)
        self.server.count(-1)
        self.send_response(status)
        for name, value in {**headers, "content-type": "application/json", "content-length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        """Answer with how often each status was answered."""
        data = json.dumps(self.server.statuses).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Write no line for each request."""


if __name__ == "__main__":
    host, port, window_s, requests = sys.argv[1:]
    provider = Provider(float(window_s), int(requests), address=(host, int(port)))
    print("the provider listens", flush=True)
    provider.serve_forever()
