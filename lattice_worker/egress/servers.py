"""Which servers an attempt may connect to, by name. Rule: a name is compared as text, and no address is a name."""

from collections.abc import Iterable

MAX_PORT = 65535


def authority(text: str, default_port: int = 0) -> tuple[str, int]:
    """Return the name, in lower case, and the port of `NAME:PORT`. Raises ValueError."""
    name, colon, number = text.rpartition(":")
    if not colon or "]" in number:
        name, number = text, str(default_port or "")
    if not (number.isascii() and number.isdigit() and 0 < int(number) <= MAX_PORT):
        raise ValueError(f"{text[:100]!r} names no port")
    name = name.lower().removesuffix(".")
    if not name.isascii() or not name:
        raise ValueError(f"{text[:100]!r} names no server")
    return name, int(number)


class AllowList:
    """The servers of a policy, each `NAME:PORT` or `*.NAME:PORT`; the second stands for every name below `NAME`."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._names: set[tuple[str, int]] = set()
        self._parents: set[tuple[str, int]] = set()
        for entry in entries:
            name, port = authority(entry)
            if name.startswith("*."):
                self._parents.add((name[2:], port))
            else:
                self._names.add((name, port))

    def allows(self, name: str, port: int) -> bool:
        """Whether a server is listed."""
        if (name, port) in self._names:
            return True
        labels = name.split(".")
        return all(labels) and any((".".join(labels[at:]), port) in self._parents for at in range(1, len(labels)))
