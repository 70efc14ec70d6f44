"""Owns the messages that cross between threads. Rule: an event is named in the past tense, an effect as a command."""

from lattice_server.core.messages.calls import *  # noqa: F403
from lattice_server.core.messages.network import *  # noqa: F403
from lattice_server.core.messages.queries import *  # noqa: F403
from lattice_server.core.messages.questions import *  # noqa: F403
from lattice_server.core.messages.runs import *  # noqa: F403
from lattice_server.core.messages.scheduler import *  # noqa: F403
from lattice_server.core.messages.signals import *  # noqa: F403
from lattice_server.core.messages.streams import *  # noqa: F403
from lattice_server.core.messages.tasks import *  # noqa: F403
from lattice_server.core.messages.workers import *  # noqa: F403
