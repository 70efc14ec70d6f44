"""The points at which tests kill a journal: each is in the code and does its action."""

import errno
import re
from pathlib import Path

import pytest

import lattice_server.journal
from lattice_server.journal.failpoints import NAMES, Failpoints


def test_every_name_is_a_point_in_the_code() -> None:
    (folder,) = lattice_server.journal.__path__
    source = "".join(path.read_text() for path in Path(folder).glob("*.py"))
    assert set(re.findall(r'failpoint\("([^"]*)"\)', source)) == NAMES


def test_point_does_nothing_until_it_was_reached_as_often_as_set() -> None:
    failpoints = Failpoints("commit.before_commit=error@3,file.before_sync=full")
    failpoints.reach("commit.before_commit")
    failpoints.reach("commit.before_commit")
    with pytest.raises(OSError, match="Input/output") as raised:
        failpoints.reach("commit.before_commit")
    assert raised.value.errno == errno.EIO
    failpoints.reach("commit.before_commit")
    with pytest.raises(OSError, match="No space"):
        failpoints.reach("file.before_sync")


def test_points_are_not_active_without_settings() -> None:
    failpoints = Failpoints()
    assert not failpoints.is_active
    failpoints.set("commit.before_commit=kill")
    assert failpoints.is_active
    failpoints.set("")
    assert not failpoints.is_active


@pytest.mark.parametrize("settings", ["nowhere=kill", "commit.before_commit=explode", "commit.before_commit"])
def test_unknown_names_and_actions_are_refused(settings: str) -> None:
    with pytest.raises(ValueError, match="no failpoint"):
        Failpoints(settings)
