"""Owns the secrets file: values that tasks may name, by tenant. Rule: no message about the file shows a value.

OPENAI_API_KEY = "sk-..."          # of the tenant without a name

[search]                           # of the tenant `search`
OPENAI_API_KEY = "sk-..."
"""

import tomllib
from pathlib import Path
from typing import Any

from lattice_server.engine.runs.secrets import Secrets
from lattice_server.security import SecurityError
from lattice_server.tokens import MAX_NAME, read_private


def read_secrets(path: Path) -> Secrets:
    """Return the secrets of a file. Raises SecurityError when it is unsafe, unreadable or malformed."""
    source = f"--secrets {path}"
    try:
        found = tomllib.loads(read_private(path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        # Their messages may quote the file.
        raise SecurityError(f"{source}: it is not TOML in UTF-8") from None
    except OSError as error:
        raise SecurityError(f"{source}: {error.strerror or error}") from None
    except SecurityError as error:
        raise SecurityError(f"{source}: {error}") from None
    tables = {tenant: table for tenant, table in found.items() if isinstance(table, dict)}
    unnamed = {name: value for name, value in found.items() if name not in tables}
    return {tenant: _checked(table, f"{source}: [{tenant}]") for tenant, table in tables.items()} | {
        "": _checked(unnamed, source)
    }


def _checked(table: dict[str, Any], where: str) -> dict[str, str]:
    for name, value in table.items():
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise SecurityError(f"{where}: a secret has a name of 1 to {MAX_NAME} printable characters")
        if not isinstance(value, str) or not value or "\0" in value:
            raise SecurityError(f"{where}: the value of {name!r} must be a text that is not empty")
    return table
