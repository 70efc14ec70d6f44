"""Tokens files, and who shows which token."""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc

from lattice_server.tokens import digest_of

Metadata = Sequence[tuple[str, str]]


def token_of(subject: str) -> str:
    """Return the token of a subject."""
    return f"token-of-{subject}"


def bearer(token: str) -> Metadata:
    """Return what shows a token."""
    return (("authorization", f"Bearer {token}"),)


def entry(subject: str, *, scopes: Sequence[str], tenant: str = "", token: str = "", **more: str) -> str:
    """Return the entry of a subject's token; `more` are values as TOML writes them."""
    values = {
        "subject": json.dumps(subject),
        "sha256": json.dumps(digest_of(token or token_of(subject))),
        "tenant": json.dumps(tenant),
        "scopes": json.dumps(list(scopes)),
        **more,
    }
    return "\n".join(["[[token]]", *(f"{name} = {value}" for name, value in values.items()), ""])


def write_tokens(path: Path, *entries: str) -> Path:
    """Put a tokens file in the place of the one there is, as a careful editor does."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text("\n".join(entries))
    draft.chmod(0o600)
    os.replace(draft, path)
    return path


class Signed:
    """A channel for stubs, whose every call shows a token, and may name a tenant in its header."""

    def __init__(self, channel: grpc.Channel, token: str, tenant: str = "") -> None:
        self._channel = channel
        self._metadata = (*bearer(token), *((("lattice-tenant", quote(tenant)),) if tenant else ()))

    def __getattr__(self, kind: str) -> Any:
        make = getattr(self._channel, kind)
        return lambda *args, **kwargs: functools.partial(make(*args, **kwargs), metadata=self._metadata)
