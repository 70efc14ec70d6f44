"""Owns the runtimes that code needs and that workers have. Rule: pure."""

from lattice_server.core.frozen import frozen


@frozen
class Runtime:
    """A language, and a version in parts between dots, that run a user's code. Empty means any."""

    language: str = ""
    version: str = ""

    def admits(self, other: "Runtime") -> bool:
        """Whether code that needs this runtime runs on another one, whose version begins with the same parts."""
        if not self.language:
            return True
        return self.language == other.language and f"{other.version}.".startswith(
            f"{self.version}." * bool(self.version)
        )

    def __str__(self) -> str:
        """Return it as text."""
        return f"{self.language} {self.version}".rstrip()


ANY_RUNTIME = Runtime()
