"""LangGraph on Lattice: nodes, tools and tasks run in the processes of a cluster; the loop of a graph stays here.

    from lattice_client import LangGraphClient

    lattice = LangGraphClient()
    app = lattice.compile(builder, resources={"embed": {"gpu": 1}}, checkpointer=saver)

`client` has the public class. `stubs` stand in for functions in the graph's process; `remote` runs a function in a
worker; `codec`, `references` and `proxies` carry values and live objects between the two; `invocation` owns the open
run of one invocation. Only the process of a graph, and a worker that runs one of its nodes, need LangGraph installed.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lattice_client.langgraph.client import LangGraphClient
else:

    def __getattr__(name):
        """Import the public class when it is used: a worker imports `remote`, which needs neither it nor gRPC."""
        if name != "LangGraphClient":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from lattice_client.langgraph.client import LangGraphClient

        return LangGraphClient


__all__ = ["LangGraphClient"]
