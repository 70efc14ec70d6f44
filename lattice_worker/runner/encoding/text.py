"""Text as it may travel: valid UTF-8, of bounded length; and the texts of errors, which user code makes."""

MESSAGE_CHARACTERS = 8 * 1024


def utf8(text: str) -> str:
    """Return text that UTF-8 can encode; surrogates, as a cut emoji leaves them, become escapes such as `\\ud83d`."""
    plain = str.__str__(text)  # A subclass may have methods of its own.
    return plain if plain.isascii() else plain.encode("utf-8", "backslashreplace").decode("utf-8")


def clipped(text: str, limit: int) -> str:
    """Return text of at most about `limit` characters: its head and its tail, with a note between them."""
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    tail = limit - head
    return f"{text[:head]}\n... [{len(text) - limit} characters left out] ...\n{text[-tail:]}"


def message_of(error: BaseException) -> str:
    """Return an error's text. Never raises."""
    try:
        return clipped(utf8(str(error)), MESSAGE_CHARACTERS)
    except BaseException as second:
        return f"<its text cannot be shown: str() of it raised {_plain_name(type(second))}>"


def type_name(cls: type) -> str:
    """Return the name of a class as retry policies know it."""
    module, name = str(cls.__module__), str(cls.__qualname__)
    return utf8(name if module in {"builtins", "__main__"} else f"{module}.{name}")[:256]


def _plain_name(cls: type) -> str:
    try:
        return type_name(cls)
    except BaseException:
        return "an error without a name"
