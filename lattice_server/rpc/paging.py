"""Owns pages of lists. Rule: a page token is a position; lists are walked in one direction."""

from collections.abc import Sequence
from typing import TypeVar

from lattice_server.core.errors import invalid_field

Item = TypeVar("Item")
DEFAULT_PAGE = 100
MAX_PAGE = 1000
MAX_TOKEN_LENGTH = 18


def page(items: Sequence[Item], page_size: int, page_token: str) -> tuple[Sequence[Item], str]:
    """Return one page and the token of the next, empty at the end. Raises InvalidError."""
    if page_size < 0:
        raise invalid_field("page_size", "must not be negative")
    if page_token and not (page_token.isdecimal() and len(page_token) <= MAX_TOKEN_LENGTH):
        raise invalid_field("page_token", "is not one this server gave")
    start = int(page_token or 0)
    end = start + min(page_size or DEFAULT_PAGE, MAX_PAGE)
    return items[start:end], str(end) if end < len(items) else ""
