"""Serves `ClusterService`: the server itself, and the nodes in the ledger."""

from collections.abc import Awaitable, Callable
from functools import partial

from lattice.v1 import cluster_pb2, cluster_pb2_grpc

from lattice_server.core import messages
from lattice_server.core.errors import NotFoundError
from lattice_server.core.messages import NodeView
from lattice_server.engine.bus import MessageBus
from lattice_server.engine.queries import SchedulerQueries
from lattice_server.engine.workers.sessions import Sessions
from lattice_server.rpc.convert.cluster import node_to_proto
from lattice_server.rpc.convert.times import drain_deadline_from_proto
from lattice_server.rpc.handlers import Context
from lattice_server.rpc.paging import page
from lattice_server.rpc.request_cache import RequestCache


class ClusterServicer(cluster_pb2_grpc.ClusterServiceServicer):
    """The `ClusterService`."""

    def __init__(
        self,
        bus: MessageBus,
        sessions: Sessions,
        cache: RequestCache,
        queries: SchedulerQueries,
        describe: Callable[[], Awaitable[cluster_pb2.GetServerInfoResponse]],
    ) -> None:
        self._bus = bus
        self._sessions = sessions
        self._cache = cache
        self._queries = queries
        self._describe = describe

    async def GetServerInfo(
        self, request: cluster_pb2.GetServerInfoRequest, context: Context
    ) -> cluster_pb2.GetServerInfoResponse:
        """Return the server's version, limits, features and load."""
        return await self._describe()

    async def ListNodes(self, request: cluster_pb2.ListNodesRequest, context: Context) -> cluster_pb2.ListNodesResponse:
        """List the nodes in the ledger."""
        found = sorted((await self._queries.nodes()).nodes, key=lambda node: node.node_id)
        rows = ((node.node_id, node) for node in found if node.node_id > request.page_token)
        nodes, token = page(request, rows, self._node)
        return cluster_pb2.ListNodesResponse(nodes=nodes, next_page_token=token)

    async def DrainNode(self, request: cluster_pb2.DrainNodeRequest, context: Context) -> cluster_pb2.DrainNodeResponse:
        """Drain a node."""
        return await self._cache.once(request, partial(self._drain, request))

    async def _drain(self, request: cluster_pb2.DrainNodeRequest) -> cluster_pb2.DrainNodeResponse:
        nodes = (await self._queries.nodes()).nodes
        node = next((node for node in nodes if node.node_id == request.node_id), None)
        if node is None:
            raise NotFoundError("NODE_NOT_FOUND", f"there is no node {request.node_id!r}")
        shown = self._node(node)
        shown.state = cluster_pb2.NODE_STATE_DRAINING
        deadline_s = drain_deadline_from_proto(request)
        self._bus.post([messages.DrainRequested(request.node_id, deadline_s)])
        return cluster_pb2.DrainNodeResponse(node=shown)

    def _node(self, node: NodeView) -> cluster_pb2.Node:
        return node_to_proto(node, self._sessions.heard_at(node.session_id))
