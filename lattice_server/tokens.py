"""Owns tokens and the tokens file. Rule: the server stores digests of tokens, never a token.

[[token]]
subject = "alice"                  # the bearer of the token: in the log, and the owner of the nodes of its workers
sha256 = "9f86d081…"               # the SHA-256 digest of the token; `lattice token new` makes both
tenant = "search"                  # the tenant whose runs, workflows and uploads it reaches; "*" for all tenants
scopes = ["submit"]                # read, submit (includes read), worker, admin (includes both, for all tenants)
expires = 2027-01-31T00:00:00Z     # optional
nodes = ["gpu-*"]                  # optional: the node ids its workers may have
"""

import hashlib
import logging
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Callable, Collection
from datetime import datetime
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from lattice_server.core.frozen import frozen
from lattice_server.security import SecurityError
from lattice_server.watching import changes

log = logging.getLogger(__name__)

Content = TypeVar("Content")

MAX_FILE_BYTES = 4 * 1024 * 1024
MAX_NAME = 128
ANY_TENANT = "*"
# Lets secret scanners recognise a token.
PREFIX = "lattice_"
TOKEN_BYTES = 32
DIGEST = re.compile(r"[0-9a-f]{64}")
KEYS = frozenset({"subject", "sha256", "tenant", "scopes", "expires", "nodes"})


class Scope(Enum):
    """A set of RPCs that a token may call."""

    READ = "read"
    SUBMIT = "submit"
    WORKER = "worker"
    ADMIN = "admin"


IMPLIED = {Scope.SUBMIT: {Scope.READ}, Scope.ADMIN: {Scope.READ, Scope.SUBMIT}}
SCOPES = {scope.value: scope for scope in Scope}


@frozen
class Credential:
    """The subject, tenant and scopes of a token. `digest` is the token's SHA-256 in hex.

    With `is_any_tenant` the runs, workflows and uploads of all tenants are within reach, and `tenant` is used for new
    ones unless a request names another. `nodes` are patterns for node ids; empty for any. `expires_s` is in seconds
    since the epoch.
    """

    subject: str
    digest: str
    scopes: frozenset[Scope]
    tenant: str = ""
    is_any_tenant: bool = False
    nodes: tuple[str, ...] = ()
    expires_s: float | None = None

    def may_serve(self, node_id: str) -> bool:
        """Whether its workers may serve a node."""
        return not self.nodes or any(fnmatchcase(node_id, pattern) for pattern in self.nodes)


def credential(
    subject: str,
    token_digest: str,
    scopes: Collection[Scope],
    *,
    tenant: str = "",
    nodes: tuple[str, ...] = (),
    expires_s: float | None = None,
) -> Credential:
    """Return a credential with the scopes that its scopes imply."""
    given = frozenset(scopes).union(*(IMPLIED.get(scope, frozenset()) for scope in scopes))
    is_any = tenant == ANY_TENANT or Scope.ADMIN in given
    return Credential(subject, token_digest, given, "" if tenant == ANY_TENANT else tenant, is_any, nodes, expires_s)


def digest_of(token: str) -> str:
    """Return the digest a token is known by."""
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


def new_token() -> str:
    """Return a new random token of 256 bits."""
    return PREFIX + secrets.token_urlsafe(TOKEN_BYTES)


def read_tokens(path: Path) -> tuple[Credential, ...]:
    """Return the credentials of a tokens file. Raises SecurityError when it is unsafe, unreadable or malformed."""
    source = f"--tokens-file {path}"
    try:
        found = tomllib.loads(read_private(path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SecurityError(f"{source}: it is not TOML in UTF-8: {error}") from None
    except OSError as error:
        raise SecurityError(f"{source}: {error.strerror or error}") from None
    except SecurityError as error:
        raise SecurityError(f"{source}: {error}") from None
    entries = found.pop("token", [])
    if found:
        raise SecurityError(f"{source}: there is no {', '.join(map(repr, found))}; each token stands under [[token]]")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SecurityError(f"{source}: each token stands under [[token]]")
    made = tuple(_credential(entry, f"{source}: token {number}") for number, entry in enumerate(entries, 1))
    digests = [one.digest for one in made]
    if twice := next((digest for digest in digests if digests.count(digest) > 1), None):
        subjects = ", ".join(one.subject for one in made if one.digest == twice)
        raise SecurityError(f"{source}: the same sha256 stands there twice, for {subjects}")
    return made


async def reload_on_change(
    path: Path, flag: str, read: Callable[[Path], Content], apply: Callable[[Content], object]
) -> None:
    """Pass what `read` returns of a file to `apply` whenever the file changes; never returns.

    A file that is unsafe or malformed is logged and not applied: its earlier content stays valid.
    """
    try:
        async for _ in changes(path):
            try:
                apply(read(path))
            except SecurityError as error:
                log.error("%s; its earlier content stays valid", error)
            except Exception:
                log.exception("%s %s cannot be read; its earlier content stays valid", flag, path)
    except OSError as error:
        log.error("%s %s: its changes cannot be watched: %s", flag, path, error.strerror)
    log.error("%s %s: its changes are no longer watched; restart the server to watch them", flag, path)


def read_private(path: Path) -> bytes:
    """Return the content of a file that only this user may read. Raises OSError, SecurityError."""
    # Not blocking: a pipe without a writer would otherwise hold the server up.
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        # The opened file is checked: its name may refer to another file by now.
        check_mode(os.fstat(file.fileno()))
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise SecurityError(f"it is longer than {MAX_FILE_BYTES} bytes")
    return data


def check_mode(status: os.stat_result) -> None:
    """Raise SecurityError unless a file is regular and only this user, or root, may read or write it."""
    if not stat.S_ISREG(status.st_mode):
        raise SecurityError("it is no regular file")
    if status.st_uid not in {0, os.geteuid()}:
        raise SecurityError(f"it belongs to user {status.st_uid}; chown it to the user of the server")
    if status.st_mode & 0o077:
        raise SecurityError(f"its mode is {stat.S_IMODE(status.st_mode):04o}, so others may use it: chmod 600")


def _credential(entry: dict[str, Any], where: str) -> Credential:
    if unknown := entry.keys() - KEYS:
        raise SecurityError(f"{where} has {', '.join(sorted(unknown))}; known are {', '.join(sorted(KEYS))}")
    if missing := {"subject", "sha256", "scopes"} - entry.keys():
        raise SecurityError(f"{where} has no {', '.join(sorted(missing))}")
    digest, scopes, expires = entry["sha256"], entry["scopes"], entry.get("expires")
    nodes = entry.get("nodes", [])
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise SecurityError(f"{where}: sha256 must be 64 hexadecimal digits in lower case")
    if not isinstance(scopes, list) or not scopes or not all(isinstance(s, str) and s in SCOPES for s in scopes):
        raise SecurityError(f"{where}: scopes must be a list of {', '.join(SCOPES)}")
    if expires is not None and (not isinstance(expires, datetime) or expires.tzinfo is None):
        raise SecurityError(f"{where}: expires must be a time with its offset, such as 2027-01-31T00:00:00Z")
    if not isinstance(nodes, list) or ("nodes" in entry and not nodes):
        raise SecurityError(f"{where}: nodes must be a list of node ids or patterns")
    return credential(
        check_name(entry["subject"], f"{where}: subject"),
        digest,
        {SCOPES[scope] for scope in scopes},
        tenant=check_name(entry.get("tenant", ""), f"{where}: tenant", may_be_empty=True),
        nodes=tuple(check_name(node, f"{where}: nodes") for node in nodes),
        expires_s=None if expires is None else expires.timestamp(),
    )


def check_name(name: Any, where: str, *, may_be_empty: bool = False) -> str:
    """Return a name. Raises SecurityError."""
    is_name = isinstance(name, str) and len(name) <= MAX_NAME and name.isprintable()
    if not is_name or not (name or may_be_empty):
        raise SecurityError(f"{where} must have 1 to {MAX_NAME} characters, all of them printable")
    found: str = name
    return found
