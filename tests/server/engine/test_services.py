"""The log of a service, and the keys of attempts."""

from lattice_server.engine.services.keys import Grant, Keys
from lattice_server.engine.services.log import MAX_LINE_BYTES, ServiceLog

FIRST, SECOND = ("run", "task", 1), ("run", "task", 2)


def test_log_keeps_the_newest_lines_and_numbers_all() -> None:
    log = ServiceLog(max_lines=3)
    log.add("a-1", ["one", "two"], 1.0)
    log.add("a-2", ["three", "four"], 2.0)
    lines, last = log.after(0, "", 1000)
    assert [(line.number, line.text) for line in lines] == [(2, "two"), (3, "three"), (4, "four")]
    assert last == 4
    assert log.after(4, "", 1000) == ([], 4)
    assert [line.text for line in log.after(0, "a-2", 1000)[0]] == ["three", "four"]
    assert log.after(3, "a-1", 1000) == ([], 4)
    assert log.tail("a-1") == ["two"]


def test_log_is_read_in_parts_and_bounded_in_bytes() -> None:
    log = ServiceLog(max_bytes=50)
    log.add("a-1", [f"{number:010d}" for number in range(10)], 1.0)
    first, reached = log.after(0, "", 25)
    second, end = log.after(reached, "", 1000)
    assert [line.number for line in first + second] == [6, 7, 8, 9, 10]
    assert (reached, end) == (7, 10)
    log.add("a-1", ["x" * (MAX_LINE_BYTES + 5)], 1.0)
    assert log.after(0, "", 1000) == ([], 11)


def test_key_is_valid_until_its_attempt_ends() -> None:
    keys = Keys()
    key = keys.issue("t", "tiny", FIRST, "n")
    assert keys.issue("t", "tiny", FIRST, "n") == key
    other = keys.issue("t", "tiny", SECOND, "n")
    assert other != key
    assert keys.find(key, "n") == Grant("t", "tiny", FIRST, "n")
    # A gateway of another node, and one that the server does not know.
    assert keys.find(key, "m") is None
    assert keys.find(key, None) is None
    assert keys.revoke([FIRST]) == [key]
    assert (keys.find(key, "n"), len(keys), keys.nodes()) == (None, 1, {"n"})
    assert keys.revoke([FIRST]) == []
