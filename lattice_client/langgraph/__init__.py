"""LangGraph on Lattice: nodes, tools and tasks run in the processes of a cluster; the loop of a graph stays here.

    from lattice_client import LangGraphClient

    lattice = LangGraphClient()
    app = lattice.compile(builder, resources={"embed": {"gpu": 1}}, checkpointer=saver)

`client` has the public class. `stubs` stand in for functions in the graph's process; `remote` runs a function in a
worker; `codec`, `references` and `proxies` carry values and live objects between the two; `invocation` owns the open
run of one invocation. Only the process of a graph, and a worker that runs one of its nodes, need LangGraph installed.
"""

from lattice_client.langgraph.client import LangGraphClient

__all__ = ["LangGraphClient"]
