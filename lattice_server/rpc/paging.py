"""Owns pages of lists. Rule: a page token is a position; lists are walked in one direction; a page fits a message."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from google.protobuf.message import Message

from lattice_server.core.errors import invalid_field
from lattice_server.rpc.parts import in_parts

Item = TypeVar("Item")
Shown = TypeVar("Shown", bound=Message)
DEFAULT_PAGE = 100
MAX_PAGE = 1000
MAX_TOKEN_LENGTH = 18


def page(
    items: Sequence[Item], page_size: int, page_token: str, show: Callable[[Item], Shown]
) -> tuple[list[Shown], str]:
    """Return one page as shown and the token of the next, empty at the end. Raises InvalidError."""
    if page_size < 0:
        raise invalid_field("page_size", "must not be negative")
    if page_token and not (page_token.isdecimal() and len(page_token) <= MAX_TOKEN_LENGTH):
        raise invalid_field("page_token", "is not one this server gave")
    start = int(page_token or 0)
    wanted = items[start : start + min(page_size or DEFAULT_PAGE, MAX_PAGE)]
    shown = next(in_parts(map(show, wanted)), [])
    end = start + len(shown)
    return shown, str(end) if end < len(items) else ""
