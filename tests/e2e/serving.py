"""The programs of services in tests: a small HTTP server that tells its process and can be told what to do.

    python serving.py HOST PORT [--child FILE] [--slow-start SECONDS] [--stubborn]

`/pid` answers with its process id, `/env/NAME` with a variable, `/say/TEXT` writes a line, `/hold` answers when the
file that `--hold` names exists, `/hold/pid` then answers with its process id, `/exit/STATUS` ends it. Other paths
answer with 503 while the file that `--sick` names exists.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    given: argparse.Namespace

    def do_GET(self) -> None:
        """Answer."""
        what, _, value = self.path[1:].partition("/")
        status, text = 200, ""
        match what:
            case "pid":
                text = str(os.getpid())
            case "env":
                text = os.environ.get(value, "")
            case "say":
                print(value, flush=True)
            case "hold":
                while not Path(self.given.hold).exists():
                    time.sleep(0.02)
                text = str(os.getpid()) if value == "pid" else ""
            case "exit":
                os._exit(int(value))
            case _:
                status = 503 if self.given.sick and Path(self.given.sick).exists() else 200
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Write no line for each request."""


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    for flag in ("--child", "--hold", "--sick"):
        parser.add_argument(flag, default="")
    parser.add_argument("--slow-start", type=float, default=0.0)
    parser.add_argument("--stubborn", action="store_true")
    given = Handler.given = parser.parse_args()
    if given.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if given.child:
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        with open(given.child, "a") as file:
            file.write(f"{child.pid}\n{os.getpid()}\n")
    time.sleep(given.slow_start)
    print(f"listening on port {given.port}", flush=True)
    ThreadingHTTPServer((given.host, given.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
