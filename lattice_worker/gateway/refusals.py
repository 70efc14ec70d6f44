"""Whether a provider refused a request because of a limit, and for how long. Rule: an account without money is no limit
that passes."""

import contextlib
import json
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from aiohttp import web

from lattice_worker.gateway.stream import error_body

LIMIT_STATUSES = frozenset({429, 529})
# Of accounts that have no money left: the same answer would come again.
SPENT = ("insufficient_quota", "billing", "credit", "payment")
MAX_S = 3600.0
MAX_REQUEST_BYTES = 64 * 1024 * 1024
TOO_LARGE = ("request_too_large", f"a request may have {MAX_REQUEST_BYTES} bytes")
TOO_DEEP = ("invalid_json", "the body is nested too deeply")
ENDED_KEY = ("invalid_api_key", "the key is not valid on this node: it ends with its task")


def key_of(request: web.Request) -> str:
    """Return the key that a request has, in either of the headers in which clients send it."""
    given = request.headers.get("authorization", "")
    return (given[7:] if given[:7].lower() == "bearer " else request.headers.get("x-api-key", "")).strip()


def is_limit(status: int, headers: Mapping[str, str], body: bytes) -> bool:
    """Whether an answer says that a limit was exceeded, so that the request may be made later."""
    if status not in LIMIT_STATUSES and not (status == 503 and "retry-after" in headers):
        return False
    with contextlib.suppress(ValueError):
        found = json.loads(body)
        error = found.get("error") if isinstance(found, dict) else None
        if isinstance(error, dict):
            told = f"{error.get('code')} {error.get('type')}".lower()
            return not any(word in told for word in SPENT)
    return True


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return after how many seconds the request may be made again; None when the answer does not say."""
    with contextlib.suppress(ValueError):
        if "retry-after-ms" in headers:
            return min(MAX_S, max(0.0, float(headers["retry-after-ms"]) / 1000))
        if "retry-after" in headers:
            return _seconds(headers["retry-after"])
    return None


def _seconds(text: str) -> float:
    """Return the seconds of a number or of a date. Raises ValueError."""
    try:
        found = float(text)
    except ValueError:
        found = parsedate_to_datetime(text).timestamp() - time.time()
    return min(MAX_S, max(0.0, found))


class LimitedError(Exception):
    """A request was refused because of a limit; None for a refusal that names no time."""

    def __init__(self, retry_after_s: float | None) -> None:
        super().__init__()
        self.retry_after_s = retry_after_s


class Refusal(Exception):
    """A request is refused with a status, a code and a sentence."""

    def __init__(self, status: int, code: str, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after_s = status, code, message, retry_after_s

    def response(self) -> web.Response:
        """Return the answer. The gateway has tried already, so that a client must not."""
        headers = {"x-should-retry": "false"}
        if self.retry_after_s is not None:
            headers = {"retry-after": str(self.retry_after_s)}
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        body = error_body(self.message, self.code, kind)
        return web.json_response(body, status=self.status, headers=headers)
