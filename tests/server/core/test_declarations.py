"""What `@frozen` and `Symbol` promise."""

import copy
import pickle

from lattice_server.core.frozen import frozen
from lattice_server.core.model import Resources
from lattice_server.core.states import TaskState


@frozen
class Pair:
    """A class with a hash from its fields."""

    one: int
    other: str = "x"


@frozen
class Named:
    """A class with a hash of its own."""

    name: str

    def __hash__(self) -> int:
        return 7


def test_objects_with_equal_fields_are_equal_and_found_in_sets() -> None:
    assert Pair(1) == Pair(1, "x") != Pair(2)
    assert Pair(1) in {Pair(1)}
    assert hash(Named("a")) == 7
    assert not hasattr(Pair(1), "__dict__")
    assert pickle.loads(pickle.dumps(Resources(2.0))) == Resources(2.0)


def test_members_of_enumerations_are_found_whether_copied_or_pickled() -> None:
    for member in TaskState:
        for found in (copy.deepcopy(member), pickle.loads(pickle.dumps(member)), TaskState(member.value)):
            assert found is member
            assert found in {member}
