"""Owns pages of lists. Rule: a page token names the last row of its page, never a position; a page fits a message."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from google.protobuf.message import Message
from lattice.v1 import cluster_pb2, run_pb2, service_pb2, task_pb2, workflow_pb2

from lattice_server.core.errors import invalid_field
from lattice_server.rpc.chunking import PART_BYTES

Item = TypeVar("Item")
Shown = TypeVar("Shown", bound=Message)
Request = (
    workflow_pb2.ListRunsRequest
    | workflow_pb2.ListWorkflowsRequest
    | workflow_pb2.GetRunGraphRequest
    | task_pb2.ListTasksRequest
    | cluster_pb2.ListNodesRequest
    | service_pb2.ListServicesRequest
)
DEFAULT_PAGE = 100
MAX_PAGE = 1000
MAX_TOKEN_LENGTH = 18


def number_after(request: Request) -> int | None:
    """Return the number of the row a page comes after; None for the first page. Raises InvalidError."""
    token = request.page_token
    if not token:
        return None
    if not (token.isascii() and token.isdecimal() and len(token) <= MAX_TOKEN_LENGTH):
        raise invalid_field("page_token", "is not a token of this server")
    return int(token)


def page(
    request: Request, rows: Iterable[tuple[int | str, Item]], show: Callable[[Item], Shown]
) -> tuple[list[Shown], str]:
    """Return one page as shown and the token of the next, empty at the end.

    Args:
        request: the request for the page.
        rows: the rows after the request's token, in order, each with its name in a token. Only the rows of the page are
            taken, so that the cost of a page is that of its rows.
        show: makes the message of a row.

    Raises:
        InvalidError: the page size is not from 1.
    """
    size = page_limit(request)
    shown: list[Shown] = []
    total, last = 0, ""
    for name, item in rows:
        if len(shown) == size:
            return shown, last
        message = show(item)
        total += message.ByteSize()
        if shown and total > PART_BYTES:
            return shown, last
        shown.append(message)
        last = str(name)
    return shown, ""


def page_limit(request: Request) -> int:
    """Return how many rows a page may have. Raises InvalidError when the request asks for none."""
    size = request.page_size if request.HasField("page_size") else DEFAULT_PAGE
    if size < 1:
        raise invalid_field("page_size", "must be from 1; leave it out for the default")
    return min(size, MAX_PAGE)


def is_full(view: int) -> bool:
    """Whether a request has the full view. Raises InvalidError."""
    if view not in run_pb2.View.values():
        raise invalid_field("view", f"there is no view {view}")
    return view == run_pb2.VIEW_FULL
